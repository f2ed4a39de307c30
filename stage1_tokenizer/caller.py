"""Warnings that point at the line of the user's call, or are meant for it alone. Knows the names of
our modules alone."""

from __future__ import annotations

import sys
import warnings

_SKIPPED = {"pipeline", "stage1_tokenizer", "stage2_prior", "torch", "accelerate", "contextlib"}
"""Packages whose lines are not the user's: ours, and the decorators and modules that call them."""
_MODEL = {f"stage1_tokenizer.{name}" for name in ("caller", "pixels", "model")}
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


def model_called_by_user() -> bool:
    """Whether the innermost call of a method of `TokenizerModule` comes from outside of our
    packages."""
    frame = sys._getframe()
    while frame.f_back is not None and _is_of_the_model(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
    return frame.f_globals.get("__name__", "").partition(".")[0] not in _SKIPPED


def _is_of_the_model(module: str) -> bool:
    """Whether a module is a part of such a call: the methods, what they ask, and decorators."""
    return module in _MODEL or module.partition(".")[0] in ("torch", "contextlib")


def _is_skipped(module: str) -> bool:
    ours = module.partition(".")[0] in _SKIPPED
    return ours and not f"{module}.".startswith(f"{_COMMANDS}.")
