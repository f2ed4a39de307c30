"""What verbs share: settings from the command line, the one process that prints. Imports nothing
heavy until it is asked."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.config.experiment import Experiment


class UsageError(Exception):
    """The command line itself is wrong."""


def parse_experiment(rest: Sequence[str]) -> Experiment:
    from pipeline.config.load import load_experiment, parser

    if "--help" in rest or "-h" in rest:
        print(
            re.sub(
                r"--[a-z_.]+", lambda option: option[0].replace("_", "-"), parser().format_help()
            ),
            end="",
        )
        raise SystemExit(0)
    try:
        return load_experiment(rest)
    except FileNotFoundError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error


def require_single_process(verb: str) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"{verb} is the work of one process; start it without torchrun or accelerate launch"
        )


def print_rank0(text: str) -> None:
    """Prints on the first process alone."""
    if os.environ.get("RANK", "0") == "0":
        print(text)
