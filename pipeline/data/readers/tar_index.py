"""Where the members of a .tar file lie. Reads headers alone; unpacks nothing.

Headers may say anything: sizes that are negative or beyond the file, names of many megabytes,
extensions of extensions. So every number is checked against the file before it is used, in memory
that does not grow with them.

Formats: POSIX.1-1988 ustar, POSIX.1-2001 pax and GNU tar
(https://www.gnu.org/software/tar/manual/html_node/Standard.html).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.readers.base import SkipCounter
from pipeline.data.readers.files import check_regular

SPARSE = "sparse members of shards left out"
_BLOCK = 512
_LONGEST = 2**20
"""Most bytes of a name or of pax records."""
_FILES = (b"0", b"\0", b"7")
"""Types of regular files."""
_FOLLOWED = (*_FILES, b"S", b"g", b"x", b"X", b"L", b"K", b"D", b"M", b"N", b"V")
"""Types whose contents follow the header; others, such as links, have none."""


@dataclass(frozen=True)
class Member:
    """A file in a shard: its name, and where its bytes start and how many there are."""

    name: str
    start: int
    length: int


def tar_members(path: str | Path, tally: SkipCounter) -> Iterator[Member]:
    """The regular files of an uncompressed .tar file, in order. Sparse ones are counted, since
    their bytes do not lie together.

    Raises:
        ValueError: it is no .tar file, or is corrupted or truncated from some place on.
        OSError: it cannot be read.
    """
    size = check_regular(path)
    with open(path, "rb", buffering=0) as file:
        yield from _members(file.fileno(), size, tally)


def _members(descriptor: int, size: int, tally: SkipCounter) -> Iterator[Member]:
    at = 0
    name: str | None = None  # of the next member, where an extension says it
    records: dict[str, str] = {}
    everywhere: dict[str, str] = {}
    while at < size or not at:
        header = os.pread(descriptor, _BLOCK, at)
        if len(header) == _BLOCK and not any(header):
            return
        kind, length = _checked(header, at)
        at += _BLOCK
        if "size" in records and kind not in (b"x", b"g", b"X", b"L", b"K"):
            length = _decimal(records["size"], at)
        if kind not in _FOLLOWED:
            length = 0
        if length < 0 or length > size - at:
            raise ValueError(
                f"the header at {at - _BLOCK} says {length} bytes, and {max(size - at, 0)} follow"
            )
        if kind == b"S" and header[482]:  # further maps follow the header
            at = _after_maps(descriptor, at, size)
        start = at
        at += -(-length // _BLOCK) * _BLOCK
        if kind in (b"x", b"g", b"X", b"L", b"K"):
            if length > _LONGEST:
                raise ValueError(f"the header at {start - _BLOCK} has a name of {length:,} bytes")
            content = os.pread(descriptor, length, start)
            if kind == b"L":
                name = _text(content)
            elif kind == b"g":
                everywhere |= _pax(content)
            elif kind != b"K":
                records = everywhere | _pax(content)
            continue
        records = records or everywhere
        name = records.get("path", name) or _name(header)
        if kind == b"S" or any(key.startswith("GNU.sparse") for key in records):
            tally.add(SPARSE, ascii(name))
        elif kind in _FILES and not name.endswith("/"):
            yield Member(name, start, length)
        name = None
        records = {}


def _after_maps(descriptor: int, at: int, size: int) -> int:
    """Where the contents of a sparse member begin, whose maps lie from `at` on."""
    while at < size:
        block = os.pread(descriptor, _BLOCK, at)
        at += _BLOCK
        if len(block) == _BLOCK and not block[504]:
            return at
    raise ValueError("it ends within a sparse member")


def _checked(header: bytes, at: int) -> tuple[bytes, int]:
    """The type and the size that a header says."""
    if len(header) < _BLOCK:
        raise ValueError(f"it ends at {at + len(header)} within a header")
    told = _number(header[148:156])
    # Some programs sum signed bytes.
    unsigned = 256 + sum(header[:148]) + sum(header[156:])
    signed = unsigned - 256 * sum(byte > 127 for byte in header[:148] + header[156:])
    if told not in (unsigned, signed):
        raise ValueError(f"there is no header at {at}")
    length = _number(header[124:136])
    if length is None:
        raise ValueError(f"the header at {at} has no size")
    return header[156:157], length


def _number(field: bytes) -> int | None:
    """An octal number, or a binary one of GNU tar."""
    if field[0] in (0o200, 0o377):
        value = int.from_bytes(field[1:], "big")
        return value - 256 ** (len(field) - 1) if field[0] == 0o377 else value
    digits = field.split(b"\0")[0].strip()
    if not all(digit in b"01234567" for digit in digits):
        return None
    return int(digits or b"0", 8)


def _decimal(text: str, at: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ValueError(f"the header at {at} has no size")
    return int(text)


def _name(header: bytes) -> str:
    name = _text(header[:100])
    if header[257:263] == b"ustar\0" and (prefix := _text(header[345:500])):
        return f"{prefix}/{name}"
    return name


def _text(field: bytes) -> str:
    return field.split(b"\0")[0].decode("utf-8", "surrogateescape")


def _pax(content: bytes) -> dict[str, str]:
    """The records of an extension: "LENGTH KEY=VALUE" and a line end, each."""
    records = {}
    at = 0
    while at < len(content) and content[at]:
        digits, space, _ = content[at : at + 20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        record = content[at + len(digits) + 1 : at + length]
        key, equals, value = record[:-1].partition(b"=")
        if not space or not equals or length <= len(digits) or not record.endswith(b"\n"):
            raise ValueError("an extended header is corrupted")
        records[_text(key)] = value.decode("utf-8", "surrogateescape")
        at += length
    return records
