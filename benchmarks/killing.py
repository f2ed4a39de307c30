"""A command in a fork of this process, which SIGKILL ends at a given place. Knows no command."""

from __future__ import annotations

import mmap
import os
import signal
import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import cli
from pipeline.training.prefetch import BatchPrefetcher

_FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


class Progress:
    """What a fork says of itself, in memory that is shared with it: its first and its last step, -1
    before one, and its file operations."""

    _FORM = "qqq"

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, struct.calcsize(self._FORM))
        self.write(-1, -1, 0)

    def write(self, *values: int) -> None:
        self._memory[:] = struct.pack(self._FORM, *values)

    def read(self) -> tuple[int, int, int]:
        return struct.unpack(self._FORM, self._memory[:])


@dataclass
class Kill:
    """Where a fork is killed: before step `at`, before file operation `at`, or after `at`
    milliseconds."""

    kind: str
    at: int


@dataclass
class Attempt:
    """What became of a fork."""

    killed: bool
    status: int
    first: int
    last: int
    operations: int
    seconds: float


def attempt(arguments: Sequence[str], folder: Path, log: Path, kill: Kill | None) -> Attempt:
    """Runs a command in a fork, which `kill` may end."""
    progress = Progress()
    start = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        _watch(folder, progress, kill)
        status = 70
        try:
            status = cli.main(arguments)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    if kill is not None and kill.kind == "time":
        time.sleep(kill.at / 1000)
        os.kill(pid, signal.SIGKILL)  # one that ended by itself is still there to be waited for
    _, ended = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(ended)
    return Attempt(code == -signal.SIGKILL, code, *progress.read(), time.perf_counter() - start)


def _watch(folder: Path, progress: Progress, kill: Kill | None) -> None:
    take = BatchPrefetcher.get

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def seen_step(batches: BatchPrefetcher, step: int) -> Any:
        first, _, operations = progress.read()
        progress.write(step if first < 0 else first, step, operations)
        if kill is not None and kill.kind == "step" and step == kill.at:
            die()
        return take(batches, step)

    def seen_file(event: str, given: tuple[Any, ...]) -> None:
        if event in _FILE_EVENTS and given and str(folder) in str(given[0]):
            first, last, operations = progress.read()
            progress.write(first, last, operations + 1)
            if kill is not None and kill.kind == "file" and operations == kill.at:
                die()

    BatchPrefetcher.get = seen_step
    sys.addaudithook(seen_file)
