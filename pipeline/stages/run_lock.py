"""One run at a time in a run folder. Knows files and processes; knows no stage.

The lock is the kernel's (`flock` by filelock) on `RUN/.lock`. It ends with the process that holds
it, however that ends. The file's content only names the holder. It is removed when the work is
done; a file that a kill left behind locks nothing.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from filelock import BaseFileLock, FileLock, Timeout

from pipeline.config.experiment import Experiment
from pipeline.config.json_file import read_json
from pipeline.runtime.atomic_io import write_errors
from pipeline.runtime.log import on_main_process

_log = logging.getLogger(__name__)
_log.addFilter(on_main_process)

P = ParamSpec("P")
T = TypeVar("T")

_LOCK = ".lock"
_PATIENCE = 0.1
"""Seconds in which to try again: a holder that removes its file meanwhile looks like one that
stays."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)
_held: set[Path] = set()
"""Run folders that this process holds: the stages of a command come after the command."""


def with_run_lock(
    stage: Callable[Concatenate[Experiment, P], T],
) -> Callable[Concatenate[Experiment, P], T]:
    """Makes a stage - a function of the experiment - hold the run folder while it works. With
    another `folder` to write to it needs none."""

    @wraps(stage)
    def locked(experiment: Experiment, *given: P.args, **options: P.kwargs) -> T:
        with (
            nullcontext()
            if options.get("folder") is not None
            else run_lock(experiment.folder, experiment.process_timeout)
        ):
            return stage(experiment, *given, **options)

    return locked  # type: ignore[return-value]  # callers may name the experiment


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
    created = [p for p in (folder, *folder.parents) if not p.exists()]
    lock = FileLock(
        folder / _LOCK, timeout=_PATIENCE, fallback_to_soft=False, on_acquired=_write_holder
    )
    is_main = os.environ.get("RANK", "0") == "0"
    refusal = _acquire(lock) if is_main else None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from pipeline.runtime.distributed import broadcast_from_main, distributed_state

        distributed_state(process_timeout)  # the first call decides how long all later ones wait
        refusal = broadcast_from_main(refusal)
    if refusal:
        raise ValueError(refusal)
    _held.add(folder)
    try:
        yield
    finally:
        _held.discard(folder)
        if lock.is_locked:
            # Before the release: a later removal could hit the file of the next holder.
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()
        if is_main:
            with suppress(OSError):  # the first that is not empty ends it
                for path in created:
                    path.rmdir()


def _acquire(lock: BaseFileLock) -> str | None:
    """Why the folder cannot be had; None where it is held, or cannot be locked at all."""
    folder = Path(lock.lock_file).parent
    try:
        lock.acquire()
    except Timeout:
        return (
            f"{folder} is in use by {_read_holder(folder)}; wait for it or stop it, or choose "
            "another name for this run (setting: name)"
        )
    except OSError as error:
        if error.errno in _NO_LOCKS:
            _log.info(
                f"note: {folder} cannot be locked ({error}); see that no other run writes to it"
            )
            Path(lock.lock_file).unlink(missing_ok=True)
        # A finished run can be read where nothing can be written; an error of a write says more.
        elif error.errno not in _NOT_WRITABLE:
            with write_errors(folder):
                raise
    return None


def _write_holder(file: int) -> None:
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps(holder).encode() + b"\n", 0)


def _read_holder(folder: Path) -> str:
    try:
        holder = read_json(folder / _LOCK)
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, TypeError, KeyError):
        return "another process"
