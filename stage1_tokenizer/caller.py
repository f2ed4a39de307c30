"""Warnings that point at the line of the user's call. Knows the names of our packages alone."""

from __future__ import annotations

import sys
import warnings

_SKIPPED = {"pipeline", "stage1_tokenizer", "stage2_prior", "torch", "accelerate", "contextlib"}
"""Packages whose lines are not the user's: ours, and the decorators and modules that call them."""
_COMMANDS = "pipeline.cli"
"""Calls as a user does."""


def warn_user(message: str) -> None:
    """Warns at the innermost call from outside of our packages. `skip_file_prefixes` does so from
    Python 3.12 on."""
    frame = sys._getframe()
    level = 1
    while frame.f_back is not None and _is_skipped(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
        level += 1
    warnings.warn(message, stacklevel=level)


def _is_skipped(module: str) -> bool:
    ours = module.partition(".")[0] in _SKIPPED
    return ours and not f"{module}.".startswith(f"{_COMMANDS}.")
