"""Lists of texts that were written as one text, as in "['a cat', 'a tabby']": by Python, JSON or
numpy. Evaluates nothing."""

from __future__ import annotations

import json
import re

_LONGEST = 100_000
"""Characters of a list; longer texts are left as they are."""
_STRING = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_LIST = re.compile(
    rf"[\[(]\s*(?:(?:{_STRING}|None|nan|null)(?:\s*,\s*|\s+|(?=[\])])))*[\])]", re.DOTALL
)
"""Numpy separates items by spaces."""
_ITEM = re.compile(_STRING, re.DOTALL)
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
_CONTROL = {"n": "\n", "t": "\t", "r": "\r"}


def texts_of_list(text: str) -> list[str] | None:
    """The texts of a list, without items that are missing; None where it is no list of texts.
    A list without any text, such as `[]` and `[None]`, has none."""
    text = text.strip()
    if not text.startswith(("[", "(")) or not text.endswith(("]", ")")) or len(text) > _LONGEST:
        return None
    try:
        items = json.loads(text)
    except (ValueError, RecursionError):
        items = None
    if isinstance(items, list):
        texts = [item for item in items if isinstance(item, str)]
        missing = [item for item in items if item is None or item != item]
        return texts if len(texts) + len(missing) == len(items) else None
    if not _LIST.fullmatch(text):
        return None
    return [_ESCAPE.sub(_character, item[1:-1]) for item in _ITEM.findall(text)]


def _character(escape: re.Match[str]) -> str:
    """The character that an escape of Python's `repr` stands for."""
    digits = escape[1] or escape[2] or escape[3]
    if digits is not None:
        code = int(digits, 16)
        return chr(code) if code <= 0x10FFFF else escape[0]
    return _CONTROL.get(escape[4], escape[4])
