"""Webdataset shards on this disk, read in any order: .tar files in which NAME.jpg, NAME.txt,
NAME.json belong together. Decodes nothing.

A sample's name ends at the first dot of the file's name, and what follows is the member's name:
`jpg`, or `input.jpg`. An index holds the position of each member. Nothing is unpacked to disk.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa

from pipeline.config.data import CaptionLines, DataConfig
from pipeline.data.readers.base import (
    IMAGE_COLUMNS,
    Record,
    Rows,
    SkipCounter,
    bytes_signature,
    content_fingerprint,
    existing_column,
    is_text,
    listed,
)
from pipeline.data.readers.captions import CAPTION_FILES, LINES_READ, lines_of
from pipeline.data.readers.files import MAX_IMAGE_BYTES, MAX_TEXT_BYTES, TooLarge, parse_json
from pipeline.data.readers.images import EXTENSIONS
from pipeline.data.readers.locate import check_links, refuse_pointers
from pipeline.data.readers.splits import rows_by_file
from pipeline.data.readers.tar_index import tar_members

DAMAGED = "shards that are truncated or corrupted, read up to there"
LEADS_OUT = "members of shards whose names lead out of them left out"
LONG_TEXT = f"texts of more than {MAX_TEXT_BYTES:,} bytes left out"
NO_IMAGE = "samples without an image left out"
SEVERAL = "further images of a sample left out (a sample's name ends at its first dot)"
_TEXTS = ("txt", "text", "caption", "cls")
"""Endings of members that are texts; members in JSON hold columns of their own."""
_ABSENT = (0, 0, 0)
_COLUMNS_SHOWN = 100
"""Samples whose JSON says which columns there are."""

Place = tuple[int, int, int]
"""Where a member lies: shard, start, length."""


def member_name(path: str) -> tuple[str, str] | None:
    """(sample, member) of a file of a shard; None where it belongs to no sample."""
    file = PurePosixPath(path)
    stem, dot, member = file.name.partition(".")
    if not stem or not dot or not member or stem.startswith("__"):
        return None
    return (file.parent / stem).as_posix(), member.lower()


def is_outside(path: str) -> bool:
    """Whether a member's name leads out of the shard, or cannot be written."""
    parts = PurePosixPath(path)
    return parts.is_absolute() or ".." in parts.parts or not is_text(path)


def ending(member: str) -> str:
    return member.rpartition(".")[2]


def is_image(member: str) -> bool:
    return f".{ending(member)}" in EXTENSIONS


def images_of(members: Iterable[str], wanted: str | None) -> list[str]:
    """The members of a sample that are its image, the one to use first: that of the setting, or
    those that end as images do."""
    own = list(members)
    if wanted is not None:
        named = [member for member in own if member == wanted.lower()]
        return named or [member for member in own if member.endswith(f".{wanted.lower()}")]
    found = [member for member in own if is_image(member)]
    # Plain endings before named parts, in the order of `data.image_column`.
    return sorted(found, key=lambda one: one not in IMAGE_COLUMNS)


def is_caption(member: str) -> bool:
    """Whether a member says something of the image."""
    return ending(member) in (*_TEXTS, "json")


def record_of(members: Mapping[str, bytes], lines: CaptionLines) -> Record:
    """What the members of a sample say of its image, by column: texts by their lines, and the
    entries of JSON are columns."""
    record: Record = {}
    for member, content in members.items():
        if ending(member) == "json":
            record = _from_json(content) | record
    return record | {
        member: lines_of(content, lines)
        for member, content in members.items()
        if ending(member) in _TEXTS
    }


def columns_of(members: Sequence[str], records: Sequence[Record]) -> list[str]:
    """The columns that captions can be made of."""
    texts = [member for member in members if ending(member) in _TEXTS]
    return list(dict.fromkeys([*texts, *(column for record in records for column in record)]))


def facts_of(members: Sequence[str], lines: CaptionLines) -> list[tuple[str, str]]:
    """Which members are texts whose lines are captions, for the user."""
    texts = [member for member in members if ending(member) in _TEXTS]
    return [(CAPTION_FILES, f"members {', '.join(texts)}; {LINES_READ[lines]}")] if texts else []


class ShardRows(Rows):
    """Samples of local shards, in the shards' order.

    The members of a sample may lie anywhere in a shard. Where a shard has the images alone and
    another one the captions, they are joined by name.

    Args:
        name: of the source, for messages.
        shards: paths of .tar files.
        image: member of the images (`data.image_column`); None takes any.
        caption_lines: how the lines of a text become captions.

    Raises:
        ValueError: the shards hold no images, or none of that ending; or they are compressed.
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
            [image, *(self._signature(shard) for shard in self._shards)]
        )
        samples: list[tuple[str, dict[str, Place]]] = []
        counts: Counter[str] = Counter()
        apart: dict[str, dict[str, Place]] = {}
        for number in range(len(self._shards)):
            for key, members in self._grouped(number):
                counts.update(list(members))
                if images_of(members, image):
                    samples.append((key, members))
                else:
                    apart.setdefault(key, {}).update(members)
        self._keys = pa.array([key for key, _ in samples], pa.large_string())
        self._join(samples, apart)
        self._images = np.zeros((len(samples), 3), np.int64)
        texts: dict[str, list[Place]] = {}
        for row, (key, members) in enumerate(samples):
            used, *others = images_of(members, image)
            if others:
                self.tally.add(SEVERAL, f"{key}: {others[0]}", len(others))
            self._images[row] = members[used]
            for member, place in members.items():
                if is_caption(member):
                    if place[2] > MAX_TEXT_BYTES:
                        self.tally.add(LONG_TEXT, f"{key}.{member}")
                    column = texts.setdefault(member, [])
                    column.extend([_ABSENT] * (row - len(column)))
                    column.append(place)
        if not samples:
            self._refuse(image, counts)
        self._texts = {
            member: np.array(column + [_ABSENT] * (len(samples) - len(column)), np.int64)
            for member, column in texts.items()
        }
        records = [
            self._record(row, list(texts)) for row in range(min(len(samples), _COLUMNS_SHOWN))
        ]
        self.columns = columns_of(list(texts), records)
        members_of = ", ".join(f"{member} {count:,}" for member, count in counts.most_common(8))
        self.layout = f"{len(shards)} webdataset shards, members {members_of}"
        self.facts = facts_of(list(texts), caption_lines)

    def __len__(self) -> int:
        return len(self._keys)

    def label(self, row: int) -> str:
        return self._keys[row].as_py()

    def image(self, row: int) -> bytes:
        length = int(self._images[row][2])
        if length > MAX_IMAGE_BYTES:
            raise TooLarge(f"it has {length:,} bytes; at most {MAX_IMAGE_BYTES:,} are read")
        return self._read(self._images[row])

    def records(self, columns: Sequence[str]) -> Iterator[list[Record]]:
        members = [member for member in self._texts if member in columns]
        if len(members) < len(columns):
            members += [m for m in self._texts if ending(m) == "json" and m not in members]
        for row in range(len(self)):
            yield [self._record(row, members)]

    def _record(self, row: int, members: Sequence[str]) -> Record:
        texts = {member: self._text(row, member) for member in members}
        return record_of(texts, self._caption_lines)

    def _text(self, row: int, member: str) -> bytes:
        """A member that is a text; empty where it is too long."""
        place = self._texts[member][row]
        return b"" if place[2] > MAX_TEXT_BYTES else self._read(place)

    def _join(
        self, samples: list[tuple[str, dict[str, Place]]], apart: dict[str, dict[str, Place]]
    ) -> None:
        """Gives captions that lie apart from their image to it, and counts the others."""
        if apart:
            alone: dict[str, list[dict[str, Place]]] = {}
            for key, members in samples:
                if not any(is_caption(member) for member in members):
                    alone.setdefault(key, []).append(members)
            for key, members in apart.items():
                if len(images := alone.get(key, [])) == 1:
                    images[0].update(members)
                else:
                    self.tally.add(NO_IMAGE, key)

    def _refuse(self, image: str | None, counts: Counter[str]) -> None:
        if image is not None and counts:
            existing_column(self.name, image, sorted(counts), "data.image_column")
        why = self.tally.lines() or [f"members: {listed(sorted(counts))}"]
        raise no_image(self.name, len(self._shards), why)

    def _signature(self, shard: str) -> object:
        # Without the folder: moving it moves no data. The time, as samples of bytes see not all.
        return Path(shard).name, bytes_signature(Path(shard)), Path(shard).stat().st_mtime_ns

    def _read(self, place: np.ndarray) -> bytes:
        shard, start, length = map(int, place)
        # Opened every time, which takes some microseconds: a process may have no more than some
        # thousand open files.
        with open(self._shards[shard], "rb", buffering=0) as file:
            content = os.pread(file.fileno(), length, start)
        if len(content) < length:
            raise ValueError(
                f"{self._shards[shard]} is truncated: at {start} it has {len(content)} of {length} "
                "bytes; copy it again"
            )
        return content

    def _grouped(self, number: int) -> list[tuple[str, dict[str, Place]]]:
        """(sample, member -> place) of a shard, in the order of the samples' first members. A name
        that has a member twice begins another sample."""
        samples: list[tuple[str, dict[str, Place]]] = []
        by_key: dict[str, dict[str, Place]] = {}
        for path, start, length in self._members(self._shards[number]):
            if is_outside(path):
                self.tally.add(LEADS_OUT, ascii(path))
                continue
            if (name := member_name(path)) is None:
                continue
            key, member = name
            if key not in by_key or member in by_key[key]:
                by_key[key] = {}
                samples.append((key, by_key[key]))
            by_key[key][member] = (number, start, length)
        return samples

    def _members(self, shard: str) -> Iterator[tuple[str, int, int]]:
        """(name, start, length) of each file of a shard that is not hidden."""
        found = False
        try:
            for member in tar_members(shard, self.tally):
                if not PurePosixPath(member.name).name.startswith("."):
                    found = True
                    yield member.name, member.start, member.length
        except (ValueError, OSError) as error:
            if not found and os.path.isfile(shard) and is_compressed(shard):
                raise ValueError(
                    f"{shard} is compressed; unpack it to a plain .tar, or set data.streaming=true"
                ) from error
            self.tally.add(DAMAGED, f"{shard} ({error})")


def no_image(name: str, shards: int, why: Sequence[str]) -> ValueError:
    """The error for shards without any image."""
    return ValueError(
        f"{name} has {shards} shards and no image ({'; '.join(why)}); a sample is NAME.jpg next to "
        "NAME.txt in the .tar"
    )


def _from_json(content: bytes) -> Record:
    try:
        value = parse_json(content or b"{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def is_compressed(shard: str) -> bool:
    """Whether a regular file begins as compressed ones do."""
    with open(shard, "rb") as file:
        start = file.read(6)
    return start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))


def shard_rows(config: DataConfig, files: Sequence[Path]) -> Rows:
    """The rows of local shards, by the splits that their names say. Raises as `ShardRows`, and
    ValueError where a file is a pointer of Git LFS."""
    check_links(config.source, files, config.follow_links)
    refuse_pointers(files)

    def read(own: list[Path]) -> ShardRows:
        shards = [str(file) for file in own]
        return ShardRows(config.source, shards, config.image_column, config.caption_lines)

    return rows_by_file(config.source, files, read, config, prefixed=False)
