"""The styles and names that a bundle of icons was trained on, and what a prompt asks beyond them.
Knows words; samples nothing."""

from __future__ import annotations

import heapq
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
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
_STYLE_OF = re.compile(r"(?P<name>.+?),?(?: drawn)? in the style of (?:the )?(?P<style>[^,]+)")
"""Of any style."""
_STYLE = re.compile(
    r"(?P<name>.+?)(?:,|(?: drawn)? in| with) (?:(?:the|an?) )?(?P<style>[^,]+?) style"
)
"""Of a style that was not trained."""
_BEFORE_STYLE = re.compile(r"(?:,|,?(?: drawn)? in|,? with)(?: (?:the|an?))?$")
"""What stands between a name and its style."""
_ARTICLE = re.compile(r"^(?:the|an?)\s+")


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
        name, style = self._parts(text)
        if style is not None and style not in self._styles:
            pairs = _letter_pairs(style)
            nearest = sorted(
                self.styles, key=lambda s: -_likeness(pairs, _letter_pairs(s.casefold()))
            )
            lines.append(
                f"the style {style[:_MAX_LETTERS]!r} was not trained, and some other is drawn; "
                f"trained styles, the nearest first: {', '.join(nearest)}"
            )
        if line := self._name_problem(name):
            lines.append(line)
        return lines

    def _parts(self, text: str) -> tuple[str, str | None]:
        """The name and the style that a prompt asks for."""
        if self._is_name(text):
            return text, None
        if found := _STYLE_OF.fullmatch(text):
            return found["name"], found["style"]
        for style in self._styles:
            for ending in (f" {style} style", f" {style}-style", f" {style}"):
                if text.endswith(ending):
                    name = text.removesuffix(ending)
                    return _BEFORE_STYLE.sub("", name), style
        if found := _STYLE.fullmatch(text):
            return found["name"], found["style"]
        rest, _, last = text.rpartition(", ")
        return (rest, last) if self._is_name(rest) else (text, None)  # "red heart, pixel"

    def _is_name(self, text: str) -> bool:
        """Whether a text is a name, with an article or without."""
        return text in self._names or _ARTICLE.sub("", text, count=1) in self._names

    def _name_problem(self, name: str) -> str | None:
        """A line where no set has a name."""
        name = name[:_MAX_LETTERS]
        bare = _ARTICLE.sub("", name, count=1)
        without_style = [
            bare.removeprefix(before)
            for style in self._styles
            for before in (f"{style} style ", f"{style}-style ", f"{style} ")
            if bare.startswith(before)
        ]
        spellings = [name, bare, *without_style]
        if not self.names or any(one in self._names for one in spellings):
            return None
        plain = min(spellings, key=len)
        pairs = _letter_pairs(plain)
        nearest = heapq.nlargest(
            _SHOWN, self._names, key=lambda one: _likeness(pairs, self._pairs[one])
        )
        shown = ", ".join(repr(self._names[one]) for one in nearest if pairs & self._pairs[one])
        hint = f"the nearest names: {shown}; " if shown else ""
        return f"no icon is named {plain!r}; {hint}the image may show anything"

    @cached_property
    def _styles(self) -> list[str]:
        """Styles by how they are compared; one that ends in another comes before it."""
        return sorted({style.casefold() for style in self.styles}, key=lambda s: (-len(s), s))

    @cached_property
    def _names(self) -> dict[str, str]:
        """Names by how they are compared."""
        return {" ".join(name.casefold().split()): name for name in self.names}

    @cached_property
    def _pairs(self) -> dict[str, frozenset[str]]:
        return {name: _letter_pairs(name) for name in self._names}


def _letter_pairs(text: str) -> frozenset[str]:
    """Pairs of neighbouring letters, the ends of words included."""
    spaced = f" {text} "
    return frozenset(spaced[at : at + 2] for at in range(len(spaced) - 1))


def _likeness(one: frozenset[str], other: frozenset[str]) -> float:
    """The share of pairs that two words have in common (Dice 1945). A server compares a prompt with
    thousands of names, and an edit distance would take it a second."""
    return 2 * len(one & other) / (len(one) + len(other))


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
