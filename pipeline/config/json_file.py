"""One JSON object per file, and what to do where the file is no longer whole. Knows no settings."""

from __future__ import annotations

from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any


def read_json(path: Path, remedy: str = "copy it again", *needed: str) -> dict[str, Any]:
    """A JSON object.

    Args:
        remedy: what the error tells the user to do.
        needed: dotted names of values that it must have.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not safe to read, holds no JSON object, or lacks a value.
    """
    # Here, since the package of stage 1 imports torch, which light modules go without.
    from stage1_tokenizer.file_checks import UnsafeFile, read_json_object

    try:
        content = read_json_object(path)
        for name in needed:
            reduce(getitem, name.split("."), content)
    except UnsafeFile:
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is truncated or corrupted ({error}); {remedy}") from error
    return content
