"""The styles and names that a bundle of icons was trained on, and what a prompt asks beyond them.
Knows words; samples nothing."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher, get_close_matches
from functools import cached_property
from pathlib import Path

from pipeline.config.json_file import read_json
from stage1_tokenizer.file_checks import check_file

_log = logging.getLogger(__name__)

FILE = "prompts.json"
MAX_BYTES = 2**18
"""Of the file; 4,500 names take half of it."""
_SHOWN = 3
"""Names that a message shows."""
_MAX_LETTERS = 100
"""Of a prompt that are compared with names."""
_STYLE = re.compile(r"(?P<name>.+)(?:,| in)\s+(?:(?:the|an?)\s+)?(?P<style>[^,]+?)\s+style")
_ARTICLE = re.compile(r"(?:the|an?)\s+")


@dataclass(frozen=True)
class KnownPrompts:
    """What prompts may ask of a bundle of icons."""

    styles: tuple[str, ...]
    """Styles that were trained."""
    names: tuple[str, ...]
    """Names that a set has, held-out ones too. Without any, names are not checked."""

    def problems(self, prompt: str) -> list[str]:
        """What no training saw of a prompt, one line each, with the nearest that exist. Prompts are
        read as captions of icons are worded; without a style, every style may be drawn."""
        text = " ".join(prompt.casefold().split()).rstrip(".!")
        if not text:
            return []
        lines = []
        found = _STYLE.fullmatch(text)
        if found and found["style"] not in self._styles:
            nearest = sorted(self.styles, key=lambda s: -_likeness(found["style"], s.casefold()))
            lines.append(
                f"the style {found['style'][:_MAX_LETTERS]!r} was not trained; trained styles, the "
                f"nearest first: {', '.join(nearest)}"
            )
        name = found["name"] if found else text
        if line := self._name_problem(name):
            lines.append(line)
        return lines

    def _name_problem(self, name: str) -> str | None:
        """A line where no set has a name."""
        name = name[:_MAX_LETTERS]
        without_style = [
            name.removeprefix(f"{style} ") for style in self._styles if name.startswith(f"{style} ")
        ]
        spellings = [name, _ARTICLE.sub("", name, count=1), *without_style]
        if not self.names or any(one in self._names for one in spellings):
            return None
        plain = min(spellings, key=len)
        words = set(re.findall(r"\w{3,}", plain))
        alike = [one for one in self._names if words & set(re.findall(r"\w{3,}", one))]
        nearest = get_close_matches(plain, alike or list(self._names), _SHOWN, 0.0)
        shown = ", ".join(repr(self._names[one]) for one in nearest)
        return f"no icon is named {plain!r}; the nearest names: {shown}"

    @cached_property
    def _styles(self) -> frozenset[str]:
        return frozenset(style.casefold() for style in self.styles)

    @cached_property
    def _names(self) -> dict[str, str]:
        """Names by how they are compared."""
        return {" ".join(name.casefold().split()): name for name in self.names}


def _likeness(one: str, other: str) -> float:
    return SequenceMatcher(None, one, other).ratio()


def as_json(known: KnownPrompts) -> str:
    """The content of `prompts.json`, without the names where they would take too much."""

    def text(names: Sequence[str]) -> str:
        content = {"styles": list(known.styles), "names": list(names)}
        return json.dumps(content, ensure_ascii=False, indent=0) + "\n"

    content = text(known.names)
    if len(content.encode()) <= MAX_BYTES:
        return content
    _log.warning(
        "%s names take more than %s bytes and are left out of %s, so names of prompts are not "
        "checked; use fewer sets to have them checked",
        f"{len(known.names):,}",
        f"{MAX_BYTES:,}",
        FILE,
    )
    return text(())


def read_known_prompts(folder: Path) -> KnownPrompts | None:
    """What `as_json` made; None where a bundle has no such file.

    Raises:
        ValueError: the file is too large, corrupted, or of another form.
    """
    path = folder / FILE
    try:
        check_file(path, MAX_BYTES)
    except FileNotFoundError:
        return None
    types = {"styles": list, "names": list, "styles.*": str, "names.*": str}
    content = read_json(path, "copy the bundle again", types=types)
    return KnownPrompts(tuple(content["styles"]), tuple(content["names"]))
