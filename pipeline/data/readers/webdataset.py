"""Webdataset shards on this disk, read in any order: .tar files in which NAME.jpg, NAME.txt,
NAME.json belong together. Decodes nothing.

An index holds the position of each member. Nothing is unpacked to disk.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.data.readers.base import (
    Record,
    SkipCounter,
    content_fingerprint,
    existing_column,
    file_signature,
    is_text,
    listed,
)
from pipeline.data.readers.files import MAX_IMAGE_BYTES, MAX_TEXT_BYTES, TooLarge, parse_json
from pipeline.data.readers.images import EXTENSIONS
from pipeline.data.readers.tar_index import tar_members

DAMAGED = "shards that are truncated or corrupted, read up to there"
LONG_TEXT = f"texts of more than {MAX_TEXT_BYTES:,} bytes left out"
_TEXTS = ("txt", "caption", "cls")
"""Members that are texts; members in JSON hold columns of their own."""
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


def is_remote(source: str) -> bool:
    return "://" in source


def shard_names(source: str) -> list[str] | None:
    """The shards that a folder, a file, a glob or a URL with {000..123} names; None where it names
    none."""
    if match := _BRACES.search(source):
        first, last = match.groups()
        numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
        return [
            name
            for n in numbers
            for name in shard_names(source[: match.start()] + n + source[match.end() :]) or []
        ]
    if is_remote(source):
        return [source] if ".tar" in source else None
    path = Path(source).expanduser()
    if path.is_dir():
        return sorted(str(p) for p in path.glob("*.tar")) or None
    if path.suffix == ".tar":
        found = [str(path)] if path.is_file() else sorted(glob.glob(str(path)))
        if not found:
            raise FileNotFoundError(
                f"there is no shard {source}; give a .tar file, a folder of them, or a glob in "
                "quotes ('shards/*.tar')"
            )
        return found
    return None


class ShardRows:
    """Samples of local shards, in the shards' order.

    Args:
        name: of the source, for messages.
        shards: paths of .tar files.
        image: extension of the images (`data.image_column`); None takes any.

    Raises:
        ValueError: the shards hold no images, or none of that extension; or they are compressed.
    """

    def __init__(self, name: str, shards: Sequence[str], image: str | None) -> None:
        self.name = name
        self.tally = SkipCounter()
        self._shards = list(shards)
        self.stamp = content_fingerprint(
            [name, image, *(file_signature(Path(shard)) for shard in shards)]
        )
        keys: list[str] = []
        places: list[tuple[int, int, int]] = []  # shard, start and length of the image
        texts: dict[str, list[tuple[int, int]]] = {}
        extensions: set[str] = set()
        for number, shard in enumerate(shards):
            for key, members in _samples(shard, self.tally):
                extensions |= set(members)
                images = [
                    e for e in members if (f".{e}" in EXTENSIONS if image is None else e == image)
                ]
                if not images:
                    self.tally.add("samples without an image left out", key)
                    continue
                for extension, place in members.items():
                    if extension in (*_TEXTS, "json"):
                        column = texts.setdefault(extension, [])
                        column.extend([(0, 0)] * (len(keys) - len(column)))
                        column.append(place)
                places.append((number, *members[images[0]]))
                keys.append(key)
        if not keys:
            if image is not None and extensions:
                existing_column(name, image, sorted(extensions), "data.image_column")
            why = "; ".join(self.tally.lines()) or f"members: {listed(sorted(extensions))}"
            raise ValueError(
                f"{name} has {len(shards)} shards and no image ({why}); a sample is NAME.jpg "
                "next to NAME.txt in the .tar"
            )
        self._keys = pa.array(keys, pa.large_string())
        self._places = np.array(places, np.int64)
        self._texts = {
            extension: np.array(column + [(0, 0)] * (len(keys) - len(column)), np.int64)
            for extension, column in texts.items()
        }
        self.columns = [extension for extension in self._texts if extension != "json"]
        if "json" in self._texts:
            columns: dict[str, None] = {}
            for row in range(min(len(keys), 100)):
                columns |= dict.fromkeys(self._json(row))
            self.columns += [column for column in columns if column not in self.columns]

    def __len__(self) -> int:
        return len(self._keys)

    def label(self, row: int) -> str:
        return self._keys[row].as_py()

    def image(self, row: int) -> bytes:
        start, length = self._places[row, 1:]
        if length > MAX_IMAGE_BYTES:
            raise TooLarge(f"it has {length:,} bytes; at most {MAX_IMAGE_BYTES:,} are read")
        return self._read(row, start, length)

    def records(self, columns: Sequence[str]) -> Iterator[list[Record]]:
        plain = [column for column in columns if column in self._texts and column != "json"]
        for row in range(len(self)):
            record: Record = {}
            for column in plain:
                record[column] = self._text(row, column).splitlines()
            if len(plain) < len(columns):
                record = self._json(row) | record
            yield [record]

    def _json(self, row: int) -> dict[str, Any]:
        try:
            value = parse_json(self._text(row, "json") or b"{}")
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}

    def _text(self, row: int, column: str) -> bytes:
        """A member that is a text; empty, and counted, where it is too long."""
        start, length = self._texts[column][row]
        if length > MAX_TEXT_BYTES:
            self.tally.add(LONG_TEXT, f"{self.label(row)}.{column}")
            return b""
        return self._read(row, start, length)

    def _read(self, row: int, start: int, length: int) -> bytes:
        shard = int(self._places[row, 0])
        # Opened every time, which takes some microseconds: a process may have no more than some
        # thousand open files.
        with open(self._shards[shard], "rb", buffering=0) as file:
            content = os.pread(file.fileno(), int(length), int(start))
        if len(content) < length:
            raise ValueError(
                f"{self._shards[shard]} is truncated: at {start} it has {len(content)} of {length} "
                "bytes"
            )
        return content


def _samples(shard: str, tally: SkipCounter) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """(key, extension -> start and length) of each sample of a shard, in order."""
    held: tuple[str, dict[str, tuple[int, int]]] | None = None
    try:
        for member in tar_members(shard, tally):
            path = PurePosixPath(member.name)
            if path.name.startswith("."):
                continue
            if path.is_absolute() or ".." in path.parts or not is_text(member.name):
                tally.add(
                    "members of shards whose names lead out of them left out", ascii(member.name)
                )
                continue
            stem, _, extension = path.name.partition(".")
            key = (path.parent / stem).as_posix()
            if held is None or held[0] != key:
                if held is not None:
                    yield held
                held = (key, {})
            held[1][extension.lower()] = (member.start, member.length)
    except (ValueError, OSError) as error:
        if held is None and os.path.isfile(shard) and _is_compressed(shard):
            raise ValueError(
                f"{shard} is compressed; unpack it to a plain .tar, or set data.streaming=true"
            ) from error
        tally.add(DAMAGED, f"{shard} ({error})")
    if held is not None:
        yield held


def _is_compressed(shard: str) -> bool:
    with open(shard, "rb") as file:
        start = file.read(6)
    return start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))
