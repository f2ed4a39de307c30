"""`Rows`: a source's images, undecoded, and what is written of them; and what all layouts share.
Decodes nothing."""

from __future__ import annotations

import codecs
import difflib
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np

from pipeline.data.readers.files import MAX_TABLE_BYTES, TooLarge, read_file
from pipeline.runtime.printable import printable as printable  # readers take it from here

Record = dict[str, Any]
"""What is written of an image, by column."""
IMAGE_COLUMNS = ("image", "file_name", "path", "jpg", "jpeg", "png", "webp")
"""Columns that hold images where `data.image_column` names none."""
BAD_CAPTION = "captions that are not UTF-8 left out (save them as UTF-8)"
LONG_CAPTION = "captions that are too long left out"
NO_FILE = "captions that are no regular files left out"
OUTSIDE = "links to files outside of the folder left out (data.follow_links=true reads them)"
_USUAL = {
    "data.text_column": (
        "text",
        "texts",
        "caption",
        "captions",
        "txt",
        "description",
        "title",
        "alt",
        "prompt",
        "label",
        "name",
    ),
    "data.image_column": (
        *IMAGE_COLUMNS,
        "img",
        "picture",
        "filename",
        "file",
        "image_path",
        "url",
    ),
    "it names the image": ("file", "filename", "path", "image", "name"),
}
"""Names of columns in other data, for suggestions."""
_NAMED = 3
"""Names per reason that are remembered."""
_SAMPLES = 16
_SAMPLE = 4096
"""Samples of a large file that identify it, and bytes of each."""
_LONG = 200
"""Characters of the message of a library."""


class NoCaptions(ValueError):
    """A source of images has no captions, and they are required."""


class SkipCounter:
    """Counts what was skipped, by reason, and remembers the first names."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}
        self._lock = Lock()

    def add(self, reason: str, name: str, count: int = 1) -> None:
        with self._lock:  # several threads read
            self._counts[reason] = self._counts.get(reason, 0) + count
            names = self._names.setdefault(reason, [])
            if len(names) <= _NAMED:
                names.append(printable(name))

    def merge(self, other: SkipCounter, prefix: str = "") -> None:
        """Adds what another one counted; its names get the prefix."""
        for reason, count in other._counts.items():
            names = [prefix + name for name in other._names[reason]]
            for name in names[:-1]:
                self.add(reason, name)
            self.add(reason, names[-1], count - len(names) + 1)

    def drop(self, reason: str) -> None:
        """Forgets a reason: what was counted by it is used after all."""
        self._counts.pop(reason, None)
        self._names.pop(reason, None)

    def count(self, reason: str) -> int:
        return self._counts.get(reason, 0)

    def first(self, reason: str) -> str:
        names = self._names.get(reason, [])
        return ", ".join(names[:_NAMED]) + (", ..." if self.count(reason) > _NAMED else "")

    def counts(self) -> dict[str, int]:
        """Reason -> how many."""
        return dict(self._counts)

    def lines(self) -> list[str]:
        """One line per reason."""
        return [
            f"{count:,} {reason}: {self.first(reason)}" for reason, count in self._counts.items()
        ]


class Rows(Protocol):
    """Images and what is written of them, numbered."""

    name: str
    columns: list[str]
    """What captions can be made of."""
    stamp: str
    """Changes when a file's name, size or time does."""
    tally: SkipCounter
    """What the layout itself skipped."""
    layout: str = ""
    """How the source was understood, for the user."""
    facts: Sequence[tuple[str, str]] = ()
    """Details of it, as names and values."""
    held_out: np.ndarray | None = None
    """Whether each row is held out (N), where the data say so; otherwise a hash of names does."""
    note: str = ""
    """What the data hold out, for the user."""
    problems: Sequence[str] = ()
    """What else was left out or lacks, one line each."""

    def __len__(self) -> int: ...

    def label(self, row: int) -> str:
        """A row's name, for messages and for the choice of held-out rows."""
        ...

    def image(self, row: int) -> bytes:
        """The image's file. Raises OSError or ValueError where it cannot be read."""
        ...

    def records(self, columns: Sequence[str]) -> Iterator[list[Record]]:
        """What is written of each row, in order; several records where an image is listed several
        times."""
        ...


def is_held_out(name: str, share: float) -> bool:
    """Whether a name is held out, by its hash: adding images moves no other image."""
    return split_hash(name) < share * 2**64


def split_hash(name: str) -> int:
    """A number below 2^64 by which a name is held out or not."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big")


def held_out_of(rows: Rows, used: np.ndarray, share: float) -> np.ndarray:
    """Which rows are held out (N,): those that the data name, or a share of the rows that are
    `used` (N,), by the hash of their names. Of few rows the hash may choose none; then the one with
    the lowest is held out."""
    if rows.held_out is not None:
        return np.asarray(rows.held_out, bool)
    hashes = {row: split_hash(rows.label(row)) for row in np.flatnonzero(used).tolist()}
    chosen = [row for row, value in hashes.items() if value < share * 2**64]
    if not chosen and share > 0 and len(hashes) > 1:
        chosen = [min(hashes, key=hashes.__getitem__)]
    held_out = np.zeros(len(rows), bool)
    held_out[chosen] = True
    return held_out


def content_fingerprint(parts: Iterable[object]) -> str:
    """A short hash of everything that identifies the files."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def file_signature(path: Path, name: str | None = None) -> object:
    """A file's name, size and time; the name alone where the file does not exist.

    Args:
        name: relative to the source, in place of the path.
    """
    try:
        state = path.stat()
    except (OSError, ValueError):
        return name or path
    return name or path, state.st_size, state.st_mtime_ns


def bytes_signature(path: Path) -> object:
    """A file's size and a hash of samples of its bytes, in bounded time: it stays the same when the
    file is copied or moved. None where there is no such regular file."""
    if not path.is_file():
        return None
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            last = max(size - _SAMPLE, 0)
            for number in range(_SAMPLES):
                file.seek(last * number // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE))
    except (OSError, ValueError):
        return None
    return size, digest.hexdigest()


def image_column(name: str, wanted: str | None, columns: Sequence[str]) -> str:
    """The column of the images.

    Raises:
        ValueError: there is none; names the existing columns and the nearest.
    """
    if wanted is None:
        for column in IMAGE_COLUMNS:
            if column in columns:
                return column
        wanted = IMAGE_COLUMNS[0]
    return existing_column(name, wanted, columns, "data.image_column")


def existing_column(name: str, wanted: str, columns: Sequence[str], setting: str) -> str:
    """A column that must exist.

    Raises:
        ValueError: it does not; names the existing columns, the nearest, and the setting that
            chooses another.
    """
    if wanted not in columns:
        if named := _by_ending(wanted, columns):
            return named
        near = difflib.get_close_matches(
            wanted.lower(), [str(c).lower() for c in columns], n=1, cutoff=0.5
        )
        usual = [c for known in _USUAL.get(setting, ()) for c in columns if str(c).lower() == known]
        nearest = next(
            (c for c in columns if near and str(c).lower() == near[0]), usual[0] if usual else None
        )
        hint = f"; did you mean {nearest!r}?" if nearest else ""
        raise ValueError(
            f"{name} has no column {wanted!r}; it has {listed(columns)}{hint} ({setting})"
        )
    return wanted


def _by_ending(wanted: str, columns: Sequence[str]) -> str | None:
    """The column of a named part, such as `input.jpg` for `jpg`, where it is the only one."""
    named = [column for column in columns if str(column).endswith(f".{wanted}")]
    return named[0] if len(named) == 1 else None


def listed(names: Sequence[str]) -> str:
    return printable(", ".join(str(name) or "''" for name in names)) or "none"


def reason_of(error: Exception) -> str:
    """The first line of what a library says, or the kind of its error."""
    return (str(error).splitlines() or [type(error).__name__])[0][:_LONG]


class OtherEncoding(ValueError):
    """A text file is not in UTF-8."""


def text_of(path: Path, most: int = MAX_TABLE_BYTES) -> str:
    """A text file in UTF-8, or in UTF-16 with a byte-order mark; without any NUL character.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is in another encoding, and names the line; it has more than `most` bytes,
            or is no regular file.
    """
    content = read_file(path, most)
    try:
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            text = content.decode("utf-16")
        else:
            text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise OtherEncoding(
            f"{path} is not UTF-8 (line {line}: {error}); save it in that encoding"
        ) from error
    before, zero, _ = text.partition("\0")
    if zero:  # of an encoding with two or four bytes per letter
        line = len(before.splitlines()) or 1
        raise OtherEncoding(
            f"{path} line {line} holds a NUL character; save the file as text in UTF-8"
        )
    return text


def unread_caption(error: OSError | ValueError) -> str:
    """The reason for a `SkipCounter` why `text_of` could not read a caption."""
    if isinstance(error, TooLarge):
        return LONG_CAPTION
    return BAD_CAPTION if isinstance(error, OtherEncoding) else NO_FILE


def is_text(name: str) -> bool:
    """Whether a name can be written in UTF-8; file systems may have others."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
