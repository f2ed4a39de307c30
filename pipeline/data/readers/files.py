"""Reads data files with a limit on their size, and JSON with a limit on its depth. Knows no
layouts.

Only regular files are opened: a FIFO, a socket or a device may have no end, or never begin.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

MAX_IMAGE_BYTES = 2**30
"""Most bytes of an image's file."""
MAX_TABLE_BYTES = 2**32
"""Most bytes of a table of captions, which may hold images in base64."""
MAX_TEXT_BYTES = 2**20
"""Most bytes of a text file next to an image, or in a shard."""
MAX_JSON_DEPTH = 100
"""Most lists and objects inside each other."""
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


class TooLarge(ValueError):
    """A file or an image is larger than a limit."""


class LeavesFolder(ValueError):
    """A link leads out of the folder that is read."""


def read_file(path: str | Path, most: int) -> bytes:
    """A regular file's bytes.

    Raises:
        FileNotFoundError: there is no such file.
        TooLarge: it has more than `most` bytes.
        ValueError: it is no regular file.
        OSError: it cannot be read.
    """
    # Without O_NONBLOCK, opening a FIFO waits for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        size = _regular_size(path, os.fstat(descriptor))
        if size > most:
            raise TooLarge(f"{path} has {size:,} bytes; at most {most:,} are read")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(most)
    finally:
        os.close(descriptor)


def check_regular(path: str | Path) -> int:
    """The size of a file in bytes. Raises ValueError for a path to anything but a regular file;
    FileNotFoundError where nothing is there."""
    return _regular_size(path, os.stat(path))


def _regular_size(path: str | Path, state: os.stat_result) -> int:
    if not stat.S_ISREG(state.st_mode):
        kind = _KINDS.get(stat.S_IFMT(state.st_mode), "no file")
        raise ValueError(f"{path} is {kind} and no regular file; put the file itself there")
    return state.st_size


def leaves(path: Path, folder: Path) -> bool:
    """Whether a file in a folder is a link to somewhere outside of it. Folders above the file are
    not asked: links to folders are not walked through."""
    if not path.is_symlink():
        return False
    # Not `Path.resolve`, which raises where links lead in a circle.
    target = Path(os.path.realpath(path))
    own = Path(os.path.realpath(folder))
    # The cache of the Hub links to its own files.
    caches = [one.parent / "blobs" for one in (own, *own.parents) if one.name == "snapshots"]
    return not any(target.is_relative_to(allowed) for allowed in (own, *caches))


def check_link(path: Path, folder: Path, follow_links: bool) -> Path:
    """The path of a file in a folder.

    Raises:
        LeavesFolder: it is a link to somewhere outside of the folder.
    """
    if not follow_links and leaves(path, folder):
        raise LeavesFolder(
            f"{path} is a link to a file outside of {folder}; copy the file there, or set "
            "data.follow_links=true"
        )
    return path


def parse_json(text: str | bytes) -> object:
    """A JSON value.

    Raises:
        ValueError: it is no JSON, or nested too deeply.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise _too_deep() from None
    check_depth(value)
    return value


def check_depth(value: object) -> None:
    """Raises ValueError where lists and objects are nested more than `MAX_JSON_DEPTH` deep. What
    reads values recursively would fail on them."""
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        inner: list[object] = []
        for one in level:
            if isinstance(one, dict):
                inner += one.values()
            elif isinstance(one, list | tuple):
                inner += one
        if not inner:
            return
        level = inner
    if any(isinstance(one, dict | list | tuple) for one in level):
        raise _too_deep()


def _too_deep() -> ValueError:
    return ValueError(f"lists and objects are more than {MAX_JSON_DEPTH} deep in each other")
