"""Drawings rendered in processes of their own: one that crashes the renderer, or keeps it busy, is
left out, and this process goes on. Knows processes; what is drawn is svg.py's.

Each message is its length in four bytes, and its bytes. A request is an SVG. An answer begins with
a letter, `P` or `U`: the pixels of the image, or why the drawing is unusable.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import threading
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
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""A library of many threads reserves more than that on a machine of many cores."""
_ROOT = Path(__file__).parents[3]
_START = (
    "import sys; sys.path.insert(0, sys.argv[1]); import {} as own; own.serve(int(sys.argv[2]))"
)


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
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):  # of what was not read
                    assert pipe is not None
                    pipe.close()

    def render(self, svg: str) -> np.ndarray:
        """As `svg.render`.

        Raises:
            UnusableSvg: also where the renderer crashes, or takes longer than `SECONDS`.
        """
        try:
            process = self._free.get_nowait()
        except Empty:
            process = self._started()
        late = threading.Timer(SECONDS, process.kill)
        late.start()
        try:
            assert process.stdin is not None and process.stdout is not None
            _write(process.stdin, svg.encode())
            answer = _read(process.stdout)
        except (BrokenPipeError, EOFError):
            reason = "ended the renderer" if late.is_alive() else f"took more than {SECONDS:g} s"
            raise UnusableSvg(f"it {reason}") from None
        finally:
            late.cancel()
        self._free.put(process)
        if answer[:1] == b"U":
            raise UnusableSvg(answer[1:].decode())
        pixels = np.frombuffer(answer[1:], np.uint8)
        return pixels.reshape(self.size, self.size, 4).copy()

    def _started(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START.format(__name__), str(_ROOT), str(self.size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # what a crash says
            env=os.environ | _ONE_THREAD,
        )
        self._all.append(process)
        return process


def serve(size: int) -> None:
    """Renders what standard input asks for until it ends."""
    with suppress(ImportError):  # elsewhere than on Unix there is no such limit
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    while True:
        try:
            svg = _read(sys.stdin.buffer).decode()
        except EOFError:
            return
        try:
            answer = b"P" + render(svg, size).tobytes()
        except UnusableSvg as error:
            answer = b"U" + str(error).encode()
        except MemoryError:
            answer = b"U" + b"it takes too much memory"
        _write(sys.stdout.buffer, answer)


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
