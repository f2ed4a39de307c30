"""Which processes log, and whether progress bars are shown. Knows no handlers: those are the
program's, here those of pipeline/cli/log.py."""

from __future__ import annotations

import logging
import os


def on_main_process(record: logging.LogRecord) -> bool:
    """A filter of loggers: several processes log as one, the first; errors are everybody's own."""
    return record.levelno >= logging.ERROR or os.environ.get("RANK", "0") == "0"


def shows_progress() -> bool:
    """Whether progress bars are shown: not where `pipeline` logs warnings and errors alone."""
    return logging.getLogger("pipeline").level <= logging.INFO
