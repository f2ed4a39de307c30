"""Which processes log, and whether progress bars are shown. Knows no handlers: those are the
program's, here those of pipeline/cli/log.py."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager


def on_main_process(record: logging.LogRecord) -> bool:
    """A filter of loggers: several processes log as one, the first; errors are everybody's own."""
    return record.levelno >= logging.ERROR or os.environ.get("RANK", "0") == "0"


@contextmanager
def hidden_progress_bars() -> Iterator[None]:
    """Hides transformers' progress bars. Saving a model of a few megabytes takes a split second,
    and its bar would only break up the lines of the log."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def shows_progress() -> bool:
    """Whether progress bars are shown: not where `pipeline` logs warnings and errors alone."""
    return logging.getLogger("pipeline").level <= logging.INFO
