"""What ends a training from outside: signals, a full disk, a process that is gone. Knows signals;
imports nothing heavy."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class TrainingInterrupted(KeyboardInterrupt):
    """A signal ended the work. `number` is the signal's; the text says how far the work came."""

    def __init__(self, number: int, text: str = "") -> None:
        super().__init__(f"stopped by {NAMES.get(signal.Signals(number), number)}{text}")
        self.number = number

    @property
    def status(self) -> int:
        """Exit status that shells expect: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.number


class RecoverableError(OSError):
    """Something outside the training ended it; the same command resumes from the last
    checkpoint."""


class SignalState:
    """The first signal received, or 0; and whether a step is done, so that there is something to
    save."""

    number = 0
    begun = False


@contextmanager
def catch_signals() -> Iterator[SignalState]:
    """Catches Ctrl-C and SIGTERM, so that a step can be finished and saved; a second Ctrl-C ends
    the process at once.

    Only the main thread receives signals: in any other nothing changes. The previous handlers are
    restored at the end.
    """
    caught = SignalState()

    def handler(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and caught.number == signal.SIGINT:
            # An exception would wait for the threads that read data, however long they take.
            os.write(2, b"\nCtrl-C twice: nothing more is saved\n")
            os._exit(TrainingInterrupted(number).status)
        if not caught.number:
            caught.number = number
            if os.environ.get("RANK", "0") == "0":
                again = (
                    "; Ctrl-C again stops at once, without saving"
                    if number == signal.SIGINT
                    else ""
                )
                does = (
                    "saving after this step"
                    if caught.begun
                    else "stopping after this step, which may take a minute to compile"
                )
                # Not print, which is not reentrant: the signal may have interrupted one.
                os.write(2, f"\n{NAMES[signal.Signals(number)]}: {does}{again}\n".encode())

    with _handled(handler):
        yield caught


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Raises `TrainingInterrupted` on SIGTERM, as Python does KeyboardInterrupt on Ctrl-C, where
    nothing else catches it."""

    def handler(number: int, frame: FrameType | None) -> None:
        raise TrainingInterrupted(number)

    with _handled(handler, signal.SIGTERM):
        yield


@contextmanager
def _handled(
    handler: Callable[[int, FrameType | None], None], *numbers: signal.Signals
) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers or NAMES}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)
