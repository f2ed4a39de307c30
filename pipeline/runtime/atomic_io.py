"""Files and folders that are written whole or not at all: to a temporary name, synced, renamed.
Knows no tensors."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def atomic_write_dir(target: Path, write: Callable[[Path], object]) -> None:
    """Calls `write(folder)` on a temporary folder, syncs what it wrote and replaces `target` by it.

    A failure on the way (a full disk, a kill) leaves what `target` held before.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.writing")
    old = target.with_name(f".{target.name}.old")
    _remove(beside)
    _recover(old)
    beside.mkdir()
    try:
        with disk_errors():
            write(beside)
        for path in (*beside.rglob("*"), beside):
            _sync(path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    if target.exists():
        # A kill between these two leaves no target; `clean_partial_writes`, or the next call,
        # restores the old one.
        target.rename(old)
    beside.rename(target)
    _sync(target.parent)
    _remove(beside)
    _remove(old)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary file to write, which is synced and renamed to `path` afterwards; a failure
    leaves what `path` held before."""
    beside = path.with_name(f".{path.name}.writing")
    try:
        try:
            yield beside
            _sync(beside)
            beside.rename(path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise OSError(
            f"cannot write {path} ({error.strerror}); free some space, then run the same command "
            "again"
        ) from error
    _sync(path.parent)


def clean_partial_writes(folder: Path) -> None:
    """Removes what killed runs left half-written in a folder, and restores what they had
    replaced."""
    for beside in folder.glob(".*.writing"):
        _remove(beside)
    for old in folder.glob(".*.old"):
        _recover(old)


def _recover(old: Path) -> None:
    target = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
    if old.exists() and not target.exists():
        old.rename(target)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Flushes a file, or a folder's list of names, to the disk."""
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write_text(path: Path, text: str) -> None:
    """Writes a text file by `atomic_write`."""
    with atomic_write(path) as beside:
        beside.write_text(text)


def sha256_of(path: Path) -> str:
    """The hash of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_output_dir(out: Path, marker: str, what: str) -> None:
    """Raises FileExistsError where `out` is there and holds no file `marker`, so that it is not
    `what` and not ours to replace."""
    if out.exists() and not (out / marker).is_file():
        raise FileExistsError(f"{out} is there already and holds no {what}; choose another folder")


@contextmanager
def disk_errors() -> Iterator[None]:
    """Raises safetensors' own error for a full disk as the OSError that it is."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(
            f"cannot write the weights: {error}; free some space, then run the same command again"
        ) from error
