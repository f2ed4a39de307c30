"""Names of the command line's options. Imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Sequence


def spelled(arguments: Sequence[str], separator: str) -> list[str]:
    """Option names with this separator of words, '-' or '_', however the user wrote them; values as
    they are."""
    result = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if re.fullmatch(r"--[A-Za-z][\w.-]*", name):
            argument = "--" + re.sub("[-_]", separator, name.removeprefix("--")) + equals + value
        result.append(argument)
    return result


def has_config(arguments: Sequence[str]) -> bool:
    """Whether `--config FILE` is among them."""
    return any(argument.partition("=")[0] == "--config" for argument in arguments)
