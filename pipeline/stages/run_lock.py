"""One run at a time in a run folder. Knows files and processes; knows no stage.

The lock is the kernel's (`flock`) on `RUN/.lock`, so it ends with the process that holds it,
however that ends; the file only says who it is. It is removed when the work is done, and one that a
kill left behind locks nothing.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from pipeline.config.experiment import Experiment
from pipeline.runtime.log import on_main_process

_log = logging.getLogger(__name__)
_log.addFilter(on_main_process)

P = ParamSpec("P")
T = TypeVar("T")

_LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)
_held: set[Path] = set()
"""Run folders that this process holds: a verb's stages come in after the verb."""


def with_run_lock(
    stage: Callable[Concatenate[Experiment, P], T],
) -> Callable[Concatenate[Experiment, P], T]:
    """Has a stage - a function of the experiment - hold the run folder while it works; one told to
    write to another `folder` needs none."""

    @wraps(stage)
    def locked(experiment: Experiment, *given: P.args, **options: P.kwargs) -> T:
        with (
            nullcontext()
            if options.get("folder") is not None
            else run_lock(experiment.folder, experiment.process_timeout)
        ):
            return stage(experiment, *given, **options)

    return locked


@contextmanager
def run_lock(folder: Path, process_timeout: int) -> Iterator[None]:
    """Holds a folder, for all processes of the job, by its main one.

    Args:
        process_timeout: minutes that processes wait for one another.

    Raises:
        ValueError: another job holds it; on all processes, and nothing was written.
    """
    folder = folder.resolve()
    if folder in _held:
        yield
        return
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    main = os.environ.get("RANK", "0") == "0"
    file, refusal = _acquire(folder) if main else (None, None)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from pipeline.runtime.distributed import broadcast_from_main, distributed_state

        distributed_state(process_timeout)  # the first to ask decides for how long they wait
        refusal = broadcast_from_main(refusal)
    if refusal:
        raise ValueError(refusal)
    _held.add(folder)
    try:
        yield
    finally:
        _held.discard(folder)
        if file is not None:
            (folder / _LOCK).unlink(missing_ok=True)
            os.close(file)
        if main:
            _remove_empty(made)


def _acquire(folder: Path) -> tuple[int | None, str | None]:
    """The open lock file, None where there are no locks; or why the folder is not to be had."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        _say_unlocked(folder, "this system has no such locks")
        return None, None
    path = folder / _LOCK
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            if (
                error.errno in _NOT_WRITABLE
            ):  # a finished run is read there; what is to be written says more than a lock could
                return None, None
            raise
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(file, 1000, 0)
            os.close(file)
            if error.errno in _NO_LOCKS:
                _say_unlocked(folder, str(error))
                return None, None
            return (
                None,
                f"{folder} is in use by {_named(holder)}; wait for it or stop it, or choose "
                "another name for this run (--name)",
            )
        # The holder from before may have removed the file between our opening and locking it: that
        # lock would keep out nobody.
        try:
            current = os.stat(path).st_ino == os.fstat(file).st_ino
        except FileNotFoundError:
            current = False
        if current:
            break
        os.close(file)
    said = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps(said).encode() + b"\n", 0)
    return file, None


def _named(holder: bytes) -> str:
    try:
        said = json.loads(holder)
        return f"process {said['pid']} on {said['host']} since {said['since']}"
    except (ValueError, TypeError, KeyError):
        return "another process"


def _say_unlocked(folder: Path, why: str) -> None:
    _log.info(f"note: {folder} cannot be locked ({why}); see that no other run writes to it")


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
