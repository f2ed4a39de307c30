"""Drawings rendered in processes of their own: one that crashes the renderer, or keeps it busy, is
left out, and this process goes on. Knows processes; what is drawn is svg.py's.

Each message is its length in four bytes, and its bytes. A process first says `R`, that it is ready,
or `E`, why it cannot be. A request is an SVG. An answer begins with `P` or `U`: the pixels of the
image, or why the drawing is unusable.
"""

from __future__ import annotations

import faulthandler
import os
import struct
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import IO

import numpy as np

from pipeline.data.builtin.svg import UnusableSvg, render, require_renderer

SECONDS = 20.0
"""That one drawing may take."""
_MEMORY = 4 * 2**30
"""Bytes of address space of a process."""
_STACK = 8 * 2**20
"""Bytes, so that what is nested too deeply ends the renderer on every machine."""
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""A library of many threads reserves more than that on a machine of many cores."""
_ROOT = Path(__file__).parents[3]
_START = (
    "import sys; sys.path.insert(0, sys.argv[1]); import {} as own; "
    "own.serve(int(sys.argv[2]), float(sys.argv[3]))"
)


class TooSlow(UnusableSvg):
    """A drawing that took longer than `SECONDS`, which an idle machine may draw in time."""


class Renderers:
    """Renders drawings, for as many threads as ask. Each takes a process that is free, or starts
    one; all end with the context.

    Args:
        size: side of the images in pixels.

    Raises:
        ModuleNotFoundError: resvg-py is not installed; says how to install it.
    """

    def __init__(self, size: int) -> None:
        require_renderer()
        self.size = size
        self._free: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        self._all: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Renderers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self._all:
            _end(process)

    def render(self, svg: str) -> np.ndarray:
        """As `svg.render`.

        Raises:
            UnusableSvg: also where the drawing crashes the renderer, or takes longer than
                `SECONDS`.
            OSError: the renderer cannot start.
        """
        try:
            process = self._free.get_nowait()
        except Empty:
            process = self._started()
        try:
            answer = self._answer(process, svg)
        except EOFError:
            # Once more: something else may have ended it, such as a system that lacked memory.
            try:
                answer = self._answer(self._started(), svg)
            except EOFError:
                raise UnusableSvg("it ended the renderer") from None
        if answer[:1] == b"U":
            raise UnusableSvg(answer[1:].decode())
        pixels = np.frombuffer(answer[1:], np.uint8)
        return pixels.reshape(self.size, self.size, 4).copy()

    def _answer(self, process: subprocess.Popen[bytes], svg: str) -> bytes:
        """What a process says of a drawing. Raises EOFError where the process ends."""
        start = time.monotonic()
        try:
            assert process.stdin is not None and process.stdout is not None
            _write(process.stdin, svg.encode())
            answer = _read(process.stdout)
        except (BrokenPipeError, EOFError):
            self._all.remove(process)
            _end(process)
            if time.monotonic() - start >= SECONDS:
                raise TooSlow(f"it took more than {SECONDS:g} s") from None
            raise EOFError from None
        self._free.put(process)
        return answer

    def _started(self) -> subprocess.Popen[bytes]:
        numbers = (str(self.size), str(SECONDS))
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START.format(__name__), str(_ROOT), *numbers],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # what a crash says
            env=os.environ | _ONE_THREAD,
        )
        self._all.append(process)
        assert process.stdout is not None
        try:
            said = _read(process.stdout)
        except EOFError:
            said = b"Eit ended at once"
        if said != b"R":
            raise OSError(
                f"the renderer of drawings cannot start ({said[1:].decode()}); install resvg-py "
                "again, or give the process more memory"
            )
        return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):  # of what was not read
            assert pipe is not None
            pipe.close()


def serve(size: int, seconds: float) -> None:
    """Renders what standard input asks for until it ends. Ends itself where a drawing takes longer
    than `seconds`: who asked may be gone."""
    _limit_memory()
    try:
        require_renderer()
        import resvg_py  # noqa: F401  (here, since what is wrong with it is no fault of a drawing)
    except (ImportError, OSError) as error:
        _write(sys.stdout.buffer, b"E" + str(error).encode())
        return
    _write(sys.stdout.buffer, b"R")
    while True:
        try:
            svg = _read(sys.stdin.buffer).decode()
        except EOFError:
            return
        # A thread of its own, which ends the process while resvg computes.
        faulthandler.dump_traceback_later(seconds, exit=True)
        try:
            answer = b"P" + render(svg, size).tobytes()
        except UnusableSvg as error:
            answer = b"U" + str(error).encode()
        except MemoryError:
            answer = b"U" + b"it takes too much memory"
        faulthandler.cancel_dump_traceback_later()
        _write(sys.stdout.buffer, answer)


def _limit_memory() -> None:
    """Less than the limits where the process was given less; none where the system knows none."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        for kind, limit in ((resource.RLIMIT_AS, _MEMORY), (resource.RLIMIT_STACK, _STACK)):
            _, most = resource.getrlimit(kind)
            limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
            resource.setrlimit(kind, (limit, most))


def _write(file: IO[bytes], content: bytes) -> None:
    file.write(struct.pack(">I", len(content)) + content)
    file.flush()


def _read(file: IO[bytes]) -> bytes:
    """One message. Raises EOFError where it does not come whole."""
    head = file.read(4)
    if len(head) < 4:
        raise EOFError
    (length,) = struct.unpack(">I", head)
    content = file.read(length)
    if len(content) < length:
        raise EOFError
    return content
