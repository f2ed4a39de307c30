"""What ends a training from outside: signals, a full disk, a process that is gone. Knows signals;
imports nothing heavy."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
if hasattr(signal, "SIGHUP"):  # not on Windows
    NAMES[signal.SIGHUP] = "SIGHUP"


class TrainingInterrupted(KeyboardInterrupt):
    """A signal ended the work. `number` is the signal's; the text says how far the work came."""

    def __init__(self, number: int, text: str = "") -> None:
        super().__init__(f"stopped by {NAMES.get(signal.Signals(number), number)}{text}")
        self.number = number

    @property
    def status(self) -> int:
        """Exit status that shells expect: 129 for SIGHUP, 130 for Ctrl-C, 143 for SIGTERM."""
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
    """Catches Ctrl-C, SIGTERM and SIGHUP (a closed terminal, a lost connection), so that a step can
    be finished and saved; a second signal may end the process at once (`_ends_at_once`).

    Only the main thread receives signals: in any other nothing changes. The previous handlers are
    restored at the end.
    """
    caught = SignalState()

    def handler(number: int, frame: FrameType | None) -> None:
        name = NAMES[signal.Signals(number)]
        if _ends_at_once(caught.number, number):
            # An exception would wait for the threads that read data, however long they take.
            _say(f"\n{name}: stopping at once, nothing more is saved\n")
            os._exit(TrainingInterrupted(number).status)
        if not caught.number:
            caught.number = number
            if os.environ.get("RANK", "0") == "0":
                again = "Ctrl-C again" if number == signal.SIGINT else "Ctrl-C"
                does = (
                    "saving after this step"
                    if caught.begun
                    else "stopping after this step, which may take a minute to compile"
                )
                _say(f"\n{name}: {does}; {again} stops at once, without saving\n")

    with _handled(handler):
        yield caught


@contextmanager
def interrupts_raise(describe: Callable[[TrainingInterrupted], str]) -> Iterator[None]:
    """Raises `TrainingInterrupted` on SIGTERM, SIGHUP and Ctrl-C, where nothing else catches them.

    A signal during an import ends the process: modules turn the exception into an error of their
    own, or lose it.

    Args:
        describe: the line that says so, where the process is ended.
    """
    first = 0

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if first and not _ends_at_once(first, number):
            return  # it must not interrupt what the first one's exception removes
        error = TrainingInterrupted(number)
        if first or _imports(frame):
            _say(describe(error) + "\n")
            os._exit(error.status)
        first = number
        raise error

    with _handled(handler, *_heeded()):
        yield


@contextmanager
def exits_on_ctrl_c(program: str) -> Iterator[None]:
    """Ends the process at once on Ctrl-C, with one line."""

    def handler(number: int, frame: FrameType | None) -> None:
        error = TrainingInterrupted(number)
        _say(f"{program}: {error}\n")
        os._exit(error.status)

    if signal.SIGINT not in _heeded():
        yield
        return
    with _handled(handler, signal.SIGINT):
        yield


def _ends_at_once(first: int, second: int) -> bool:
    """Whether a signal after another (0: none) asks to stop without saving: Ctrl-C after any, and
    SIGTERM after Ctrl-C.

    SIGTERM and SIGHUP also come in pairs, for one request: `timeout` sends SIGTERM twice, Slurm
    again before it kills; a closed terminal SIGHUP by the kernel and by the shell; systemd both.
    """
    if second == signal.SIGINT:
        return first != 0
    return (first, second) == (signal.SIGINT, signal.SIGTERM)


def _heeded() -> list[signal.Signals]:
    """The signals, without a Ctrl-C that is ignored or that the caller handles in its own way."""
    is_own = signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    return [number for number in NAMES if not (is_own and number == signal.SIGINT)]


def _imports(frame: FrameType | None) -> bool:
    """Whether a frame is part of an import."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _say(text: str) -> None:
    """Writes to stderr, if it is still there. Not by print, which is not reentrant: a signal may
    have interrupted one."""
    with suppress(OSError):
        os.write(2, text.encode())


@contextmanager
def _handled(
    handler: Callable[[int, FrameType | None], None], *numbers: signal.Signals
) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers or NAMES}
    if hasattr(signal, "SIGHUP") and before.get(signal.SIGHUP) is signal.SIG_IGN:
        del before[signal.SIGHUP]  # nohup asks for this
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)
