"""What is logged, as lines on the terminal, and the option `--log-level`. Imports nothing heavy
until there is a line."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.cli.common import UsageError
from pipeline.config.option_names import spelled
from pipeline.runtime.log import on_main_process

PACKAGES = ("pipeline", "stage1_tokenizer", "stage2_prior")
LEVELS = ("debug", "info", "warning", "error")
_ROOT = Path(__file__).resolve().parents[2]


def log_level(rest: Sequence[str]) -> tuple[str, list[str]]:
    """The level that `--log-level` gives, the last one where there are several; and what else
    there is on the command line.

    Raises:
        UsageError: there is no such level.
    """
    level, left = "info", list(rest)
    others: list[str] = []
    while left:
        argument = left.pop(0)
        if argument == "--":  # what follows is no option
            return level, [*others, argument, *left]
        name, equals, value = argument.partition("=")
        if spelled([name], "-") != ["--log-level"]:
            others.append(argument)
            continue
        if not equals:
            value = left.pop(0) if left else ""
        if value not in LEVELS:
            raise UsageError(f"--log-level is {value!r}; choose one of: {', '.join(LEVELS)}")
        level = value
    return level, others


@contextmanager
def logging_to_terminal(level: str) -> Iterator[None]:
    """Shows what our packages log and warn of from this level on; afterwards all is as before."""
    handler, shown = _Terminal(), warnings.showwarning
    loggers = [logging.getLogger(name) for name in PACKAGES]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]

    def show(
        message: Warning | str, category: type[Warning], filename: str, *rest: Any, **options: Any
    ) -> None:
        if any(Path(filename).is_relative_to(_ROOT / package) for package in PACKAGES):
            loggers[0].warning("%s", message)
        else:
            shown(message, category, filename, *rest, **options)

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
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(threshold)


class _Terminal(logging.Handler):
    """Lines above a progress bar: what is going on to stdout as it is, what is amiss to stderr
    with its level before it. Both are looked up anew for each line."""

    def __init__(self) -> None:
        super().__init__()
        self.addFilter(on_main_process)

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        amiss = record.levelno >= logging.WARNING
        before = f"{record.levelname.lower()}: " if amiss else ""
        stream = sys.stderr if amiss else sys.stdout
        tqdm.write(before + record.getMessage(), file=stream)
        stream.flush()
