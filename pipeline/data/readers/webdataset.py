"""Webdataset shards on this disk, read in any order: .tar files in which NAME.jpg, NAME.txt,
NAME.json belong together. Decodes nothing.

An index holds the position of each member. Nothing is unpacked to disk.
"""

from __future__ import annotations

import glob
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.config.data import CaptionLines
from pipeline.data.readers.base import (
    Record,
    SkipCounter,
    content_fingerprint,
    existing_column,
    file_signature,
    is_text,
    listed,
)
from pipeline.data.readers.captions import lines_of
from pipeline.data.readers.images import EXTENSIONS

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
        caption_lines: how the lines of a text become captions.

    Raises:
        ValueError: the shards hold no images, or none of that extension; or they are compressed.
    """

    def __init__(
        self,
        name: str,
        shards: Sequence[str],
        image: str | None,
        caption_lines: CaptionLines = "each",
    ) -> None:
        self.name = name
        self._caption_lines = caption_lines
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
        return self._read(row, *self._places[row, 1:])

    def records(self, columns: Sequence[str]) -> Iterator[list[Record]]:
        plain = [column for column in columns if column in self._texts and column != "json"]
        for row in range(len(self)):
            record: Record = {}
            for column in plain:
                text = self._read(row, *self._texts[column][row])
                record[column] = lines_of(text, self._caption_lines)
            if len(plain) < len(columns):
                record = self._json(row) | record
            yield [record]

    def _json(self, row: int) -> dict[str, Any]:
        try:
            value = json.loads(self._read(row, *self._texts["json"][row]) or b"{}")
        except (ValueError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}

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
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if not member.isfile() or path.name.startswith("."):
                    continue
                if path.is_absolute() or ".." in path.parts or not is_text(member.name):
                    tally.add(
                        "members of shards whose names lead out of them left out",
                        ascii(member.name),
                    )
                    continue
                stem, _, extension = path.name.partition(".")
                key = (path.parent / stem).as_posix()
                if held is None or held[0] != key:
                    if held is not None:
                        yield held
                    held = (key, {})
                held[1][extension.lower()] = (member.offset_data, member.size)
                tar.members = []  # type: ignore[attr-defined]  # it remembers all headers otherwise
    except (tarfile.TarError, EOFError, OverflowError, ValueError, OSError) as error:
        if held is None and _is_compressed(shard):
            raise ValueError(
                f"{shard} is compressed; unpack it to a plain .tar, or set data.streaming=true"
            ) from error
        tally.add("shards that are truncated or corrupted, read up to there", shard)
    if held is not None:
        yield held


def _is_compressed(shard: str) -> bool:
    with open(shard, "rb") as file:
        start = file.read(6)
    return start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))
