"""A text file of prompts, one per line, as editors write it. Knows lines; samples nothing."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

from pipeline.data.readers.base import text_of
from pipeline.runtime.log import on_main_process

_log = logging.getLogger(__name__)
_log.addFilter(on_main_process)

_LARGEST = 64 * 2**20
"""Bytes of a file of prompts, at most."""
_EMPTY = "minidalle generate '' samples without a prompt"


class Prompt(NamedTuple):
    """A prompt, and where it was given, for messages."""

    text: str
    given_in: str


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file in UTF-8, or in UTF-16 with a byte-order mark. Byte-order marks are
    dropped; empty lines are skipped and counted.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no text file, too large, in another encoding, or holds no prompt; names
            the line.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"there is no prompt file {path}; give a text file with one prompt per line"
        )
    if not (path.is_file() or path.is_fifo()):
        raise ValueError(f"{path} is no text file; give a text file with one prompt per line")
    if (size := path.stat().st_size) > _LARGEST:
        raise ValueError(
            f"{path} has {size:,} bytes, and at most {_LARGEST:,} are read; split it into several"
        )
    text = text_of(path)
    # Not splitlines(): it also splits at characters that a prompt may hold.
    lines = text.replace("\ufeff", "").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if not lines[-1]:  # what follows the last newline is no line
        lines.pop()
    prompts = [
        Prompt(line.strip(), f"{path} line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    empty = len(lines) - len(prompts)
    if not prompts:
        what = "its only line is empty" if empty == 1 else f"all of its {empty} lines are empty"
        raise ValueError(
            f"{path} holds no prompt: {what if lines else 'it is empty'}; write one prompt per "
            f"line ({_EMPTY})"
        )
    if empty:
        _log.info(f"{path}: empty lines skipped: {empty} ({_EMPTY})")
    return prompts
