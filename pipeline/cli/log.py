"""What is logged, as lines on the terminal. Imports nothing heavy until there is a line."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from pipeline.runtime.log import on_main_process
from pipeline.runtime.printable import escaped

PACKAGES = ("pipeline", "stage1_tokenizer", "stage2_prior")
_ROOT = Path(__file__).resolve().parents[2]


def print_rank0(text: str) -> None:
    """Prints on the first process alone. Control characters, as names may hold, are escaped."""
    if os.environ.get("RANK", "0") == "0":
        print(escaped(text))


def print_error(text: str) -> None:
    """Prints to stderr, with control characters escaped."""
    print(escaped(text), file=sys.stderr)


@contextmanager
def logging_to_terminal(level: str) -> Iterator[None]:
    """Shows what our packages log and warn of from this level on; afterwards all is as before."""
    handler = _Terminal()
    shown = warnings.showwarning
    loggers = [logging.getLogger(name) for name in PACKAGES]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if any(Path(filename).is_relative_to(_ROOT / package) for package in PACKAGES):
            loggers[0].warning("%s", message)
        else:
            shown(escaped(str(message)), category, filename, lineno, file, line)

    try:
        for logger in loggers:
            others = [other for other in logger.handlers if not isinstance(other, _Terminal)]
            logger.handlers = [*others, handler]
            logger.setLevel(level.upper())
            logger.propagate = False
        warnings.showwarning = show
        yield
    finally:
        warnings.showwarning = shown
        for logger, (handlers, threshold, propagate) in zip(loggers, before, strict=True):
            logger.handlers = handlers
            logger.propagate = propagate
            logger.setLevel(threshold)


class _Terminal(logging.Handler):
    """Lines above a progress bar: information to stdout as it is, warnings and errors to stderr
    with their level before them. Both streams are looked up for each line."""

    def __init__(self) -> None:
        super().__init__()
        self.addFilter(on_main_process)
        self.setFormatter(_Escaped())

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        severe = record.levelno >= logging.WARNING
        before = f"{record.levelname.lower()}: " if severe else ""
        stream = sys.stderr if severe else sys.stdout
        tqdm.write(before + self.format(record), file=stream)
        stream.flush()


class _Escaped(logging.Formatter):
    """The message alone, with control characters escaped."""

    def format(self, record: logging.LogRecord) -> str:
        return escaped(record.getMessage())
