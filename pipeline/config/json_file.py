"""One JSON object per file, and what to do where the file is no longer whole. Knows no settings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

Types = Mapping[str, type | tuple[type, ...]]
"""Types of JSON values, by dotted name; `*` stands for every name or number of a list. A value that
is missing counts as None."""


def read_json(
    path: Path, remedy: str = "copy it again", *needed: str, types: Types | None = None
) -> dict[str, Any]:
    """A JSON object.

    Args:
        remedy: what the error tells the user to do.
        needed: dotted names of values that it must have.
        types: what is checked as `check_types` does.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not safe to read, holds no JSON object, lacks a value, or has one of
            another type.
    """
    # Here, since the package of stage 1 imports torch, which light modules go without.
    from stage1_tokenizer.file_checks import UnsafeFile, read_json_object

    try:
        content = read_json_object(path)
        for name in needed:
            reduce(getitem, name.split("."), content)
        check_types(content, types or {})
    except UnsafeFile:
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is truncated or corrupted ({error}); {remedy}") from error
    return content


def check_types(content: object, types: Types) -> None:
    """Raises ValueError for a value of another type, a whole number below 0, or a number that is
    not finite; names the first."""
    for name, kinds in types.items():
        for path, value in _values(content, name.split("."), []):
            allowed = kinds if isinstance(kinds, tuple) else (kinds,)
            fits = type(value) in allowed
            if isinstance(value, int):
                fits = fits and value >= 0
            elif isinstance(value, float):
                fits = fits and math.isfinite(value)
            if not fits:
                raise ValueError(f"{'.'.join(path)} is {value!a:.80}")


def _values(
    content: object, names: list[str], path: list[str]
) -> Iterator[tuple[list[str], object]]:
    """The values that a dotted name stands for, each with its own name. Below a value that is
    neither object nor list there are none: its own type is checked."""
    if not names:
        yield path, content
        return
    first, *rest = names
    if first == "*":
        if isinstance(content, dict):
            inner = list(content.items())
        else:
            inner = list(enumerate(content)) if isinstance(content, list) else []
    else:
        inner = [(first, content.get(first))] if isinstance(content, dict) else []
    for key, value in inner:
        yield from _values(value, rest, [*path, str(key)])
