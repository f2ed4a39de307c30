"""Files and folders that are written whole or not at all: to a temporary name, synced, renamed.
Knows no tensors."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import platform
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil
from PIL import Image
from safetensors import SafetensorError

_REMEDIES = {
    errno.ENOSPC: "free some space, then run the same command again",
    errno.EDQUOT: "free some space, then run the same command again",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or write to another disk",
    errno.EROFS: "write to another folder",
    errno.EACCES: "make its folder writable, or write to another one",
    errno.EPERM: "make its folder writable, or write to another one",
    errno.EEXIST: "remove what is in the way, or write to another folder",
    errno.ENOTDIR: "remove what is in the way, or write to another folder",
    errno.EISDIR: "remove what is in the way, or write to another folder",
}
_ALWAYS_OF_WRITES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_HOST = f"{zlib.crc32(platform.node().encode()):08x}"
"""Names this machine, whose processes alone can be looked up."""
_TEMPORARY = re.compile(
    r"\.(?P<name>.+?)(?:\.(?P<host>[0-9a-f]{8})-(?P<pid>\d+))?\.(?:writing|old)"
)
"""A name of `_beside`. Earlier versions wrote none of host and process."""


class WriteError(OSError):
    """A file or folder could not be written; the text names it and says what to do."""


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Raises an error of the disk as `WriteError`, which names `path`. Errors of files elsewhere,
    which may be read meanwhile, pass."""
    try:
        yield
    except WriteError:
        raise
    except SafetensorError as error:  # its own error for a full disk
        problem = str(error)
        remedy = _REMEDIES[errno.ENOSPC]
    except OSError as error:
        named = Path(error.filename) if isinstance(error.filename, str | os.PathLike) else None
        is_ours = named is not None and (
            path.is_relative_to(named)
            or named.is_relative_to(path)
            or named.is_relative_to(_beside(path, "writing"))
        )
        if error.errno not in _REMEDIES or not (is_ours or error.errno in _ALWAYS_OF_WRITES):
            raise
        problem = str(error.strerror)
        remedy = _REMEDIES[error.errno]
    else:
        return
    raise WriteError(f"cannot write {path} ({problem}); {remedy}")


def atomic_write_dir(target: Path, write: Callable[[Path], object]) -> None:
    """Calls `write(folder)` on a temporary folder, syncs what it wrote and replaces `target` by it.

    A failure on the way (a full disk, a kill) leaves what `target` held before. Of two processes
    that write it at the same time, the later replaces what the earlier wrote.

    Raises:
        WriteError: the disk is full or the folder cannot be written.
    """
    if target.is_symlink():  # the folder that it leads to, which may be on another disk
        target = target.resolve()
    beside = _beside(target, "writing")
    old = _beside(target, "old")
    with write_errors(target):
        _make_folder(target.parent)
        _recover(old)
        _write_beside(beside, write)
        while not _replaced(target, beside, old):
            _remove(old)
        _sync(target.parent)
        _remove(old)


def _replaced(target: Path, beside: Path, old: Path) -> bool:
    """Replaces `target` by `beside`; false where another process wrote it in between."""
    if target.exists():
        with suppress(FileNotFoundError):
            target.rename(old)
    # A kill here leaves no target; `clean_partial_writes`, or the next command, restores the old
    # one.
    try:
        beside.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def atomic_write_files(folder: Path, write: Callable[[Path], object]) -> None:
    """Calls `write(folder)` on a temporary folder, and moves each file that it wrote into `folder`
    once all are synced. What else `folder` holds stays.

    Raises:
        WriteError: the disk is full or the folder cannot be written.
    """
    beside = _beside(folder / "files", "writing")
    with write_errors(folder):
        _make_folder(folder)
        _write_beside(beside, write)
        for path in sorted(beside.iterdir()):
            with write_errors(folder / path.name):
                path.rename(folder / path.name)
        beside.rmdir()
        _sync(folder)


def _write_beside(beside: Path, write: Callable[[Path], object]) -> None:
    """Writes and syncs a temporary folder; removes it after a failure."""
    _remove(beside)
    try:
        beside.mkdir()
        write(beside)
        # safetensors writes files that their owner alone can read, whatever the umask is.
        readable = beside.stat().st_mode & 0o666
        for path in (*beside.rglob("*"), beside):
            if path.is_file():
                path.chmod(readable)
            _sync(path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary file to write, which is synced and renamed to `path` afterwards; a failure
    leaves what `path` held before. Makes the folder.

    Raises:
        WriteError: the disk is full or the file cannot be written.
    """
    beside = _beside(path, "writing")
    with write_errors(path):
        _make_folder(path.parent)
        try:
            yield beside
            _sync(beside)
            beside.rename(path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        _sync(path.parent)


def clean_partial_writes(folder: Path) -> None:
    """Removes what killed runs left half-written in a folder, and restores what they had replaced:
    of every process, so only where this one holds the lock of the run."""
    for path in _temporary_in(folder):
        _clean(path)


def _make_folder(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _clean_after_others(folder)


@cache
def _clean_after_others(folder: Path) -> None:
    """Cleans up, once, after processes of this machine that are gone. Others may be writing."""
    for path, made in _temporary_in(folder).items():
        if made["host"] == _HOST and not psutil.pid_exists(int(made["pid"])):
            _clean(path)


def _temporary_in(folder: Path) -> dict[Path, re.Match[str]]:
    found = {path: _TEMPORARY.fullmatch(path.name) for path in folder.glob(".*")}
    return {path: made for path, made in found.items() if made}


def _beside(path: Path, ending: str) -> Path:
    """The name under which this process writes `path`, or keeps what it replaces."""
    return path.with_name(f".{path.name}.{_HOST}-{os.getpid()}.{ending}")


def _clean(path: Path) -> None:
    if path.suffix == ".old":
        _recover(path)
    else:
        _remove(path)


def _recover(old: Path) -> None:
    made = _TEMPORARY.fullmatch(old.name)
    assert made is not None
    target = old.with_name(made["name"])
    if old.exists() and not target.exists():
        old.rename(target)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
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
    """Writes a text file in UTF-8 by `atomic_write`."""
    with atomic_write(path) as beside:
        beside.write_text(text, encoding="utf-8")


def atomic_write_png(path: Path, image: Image.Image) -> None:
    """Writes an image as PNG by `atomic_write`."""
    # In memory first: PIL's errors of a file do not say that the disk is full.
    png = io.BytesIO()
    image.save(png, "PNG")
    with atomic_write(path) as beside:
        beside.write_bytes(png.getvalue())


@dataclass
class WrittenImages:
    """Images of one command in one folder: `done` of `total` are complete."""

    folder: Path
    total: int
    done: int = 0

    def save(self, name: str, image: Image.Image) -> None:
        """Writes an image as PNG and counts it."""
        atomic_write_png(self.folder / name, image)
        self.done += 1


def check_folder(out: Path, what: str) -> None:
    """Raises NotADirectoryError where `what` cannot go into `out`, before it is computed."""
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file; name a folder for the {what}")


def short_stem(file: Path) -> str:
    """A file's name without its ending, cut so that other files' names can contain it: most systems
    allow 255 bytes."""
    return file.stem.encode(errors="surrogateescape")[:180].decode(errors="ignore")


@contextmanager
def writing_images(folder: Path, total: int) -> Iterator[WrittenImages]:
    """Around everything that a command writes to a folder of the user's.

    Raises:
        WriteError: of any file in it; also says how many images are complete.
    """
    written = WrittenImages(folder, total)
    try:
        yield written
    except WriteError as error:
        raise WriteError(
            f"{error}; {written.done} of {total} images are complete in {folder}"
        ) from error


def sha256_of(path: Path) -> str:
    """The hash of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_output_dir(out: Path, marker: str, what: str) -> None:
    """Raises FileExistsError where `out` is there and holds no file `marker`, so that it is not
    `what` and not ours to replace."""
    if out.exists() and not (out / marker).is_file():
        raise FileExistsError(f"{out} is there already and holds no {what}; choose another folder")
