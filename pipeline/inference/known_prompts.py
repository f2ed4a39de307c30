"""The styles and names that a bundle of icons was trained on: what a prompt asks beyond them, and a
prompt in the words of training. Knows words; samples nothing."""

from __future__ import annotations

import heapq
import json
import logging
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from pipeline.config.json_file import read_json
from pipeline.data.builtin.icon_captions import styled_captions
from stage1_tokenizer.file_checks import check_file

_log = logging.getLogger(__name__)

FILE = "prompts.json"
MAX_BYTES = 2**18
"""Of the file; 4,500 names take half of it."""
_SHOWN = 3
"""Names that a message shows."""
_WHOLE = 4
"""What `KnownPrompts._fit` says where the name and the style are known, or the style is open."""
_MAX_LETTERS = 100
"""Of a prompt that are compared with names."""
_STYLE_OF = re.compile(
    r"(?P<name>.+?),?(?: drawn)?(?: in)?(?: the)? style of (?:the )?(?P<style>[^,]+?)(?: style)?"
)
_SEPARATOR = re.compile(r", (?:in )?|(?: drawn)? in | with ")
"""What stands between a name and its style."""
_BEFORE_STYLE = re.compile(r"(?:,|,?(?: drawn)? in|,? with)(?: (?:the|an?))?$")
_ARTICLE = re.compile(r"^(?:the|an?)(?:\s+|$)")
_QUOTES = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")


class _Reading(NamedTuple):
    """One way to read a prompt. Both parts are as `_plain` writes them."""

    name: str
    style: str | None
    """None where the prompt leaves it open."""
    told: bool
    """Whether the words say that it is a style."""


@dataclass(frozen=True)
class KnownPrompts:
    """What prompts may ask of a bundle of icons."""

    styles: tuple[str, ...]
    """Styles that were trained."""
    names: tuple[str, ...]
    """Names that a set has, held-out ones too. Without any, names are not checked."""

    def as_trained(self, prompt: str) -> str:
        """A prompt in the words that training read, where its name and its style are known: other
        words that mean the same are drawn worse. Any other prompt stays as it is."""
        plain = _plain(prompt)
        for one in self._readings(plain):
            if self._fit(one) == _WHOLE and prompt in self._captions(one):
                return prompt
        best = self._read(plain)
        captions = self._captions(best) if self._fit(best) == _WHOLE else []
        # Names that are spelled alike but for capitals have other captions.
        return captions[0] if len(self._spellings(best.name)) == 1 and captions else prompt

    def problems(self, prompt: str) -> list[str]:
        """What no training saw of a prompt, one line each, with the nearest that exist. Without a
        style, every style may be drawn."""
        text = _plain(prompt)
        if not text:
            return []
        lines = []
        name, style, _ = self._read(text)
        if style in self._styles and not self._is_name(name):  # it may name another style, too
            inner = self._read(name)
            if inner.style is not None and self._is_name(inner.name):
                if inner.style in self._styles:
                    two = " and ".join(repr(self._styles[one]) for one in (inner.style, style))
                    return [f"the prompt names the styles {two}, and one image has one; name one"]
                name, style = inner.name, inner.style
        if style is not None and style not in self._styles:
            pairs = _letter_pairs(style)
            nearest = sorted(self.styles, key=lambda s: -_likeness(pairs, _letter_pairs(_plain(s))))
            lines.append(
                f"the style {style[:_MAX_LETTERS]!r} was not trained, and some other is drawn; "
                f"trained styles, the nearest first: {', '.join(nearest)}"
            )
        if line := self._name_problem(name):
            lines.append(line)
        return lines

    def _read(self, text: str) -> _Reading:
        """The name and the style that a prompt asks for."""
        best = max(self._readings(text), key=self._fit)  # of those that fit alike, the first
        if best.style in self._styles and not self._is_name(best.name):
            inner = max(self._readings(best.name), key=self._fit)
            if inner.style == best.style and self._is_name(inner.name):  # the style twice
                return inner
        return best

    def _fit(self, one: _Reading) -> int:
        """How much of a reading is known."""
        if self._is_name(one.name):
            return _WHOLE if one.style is None or one.style in self._styles else 3
        return 2 if one.style in self._styles else int(one.told)

    def _captions(self, one: _Reading) -> list[str]:
        """What training reads for a name and a style that are known."""
        names = self._spellings(one.name)
        if one.style is None:
            return names
        style = self._styles[one.style]
        return [caption for name in names for caption in styled_captions(name, style)]

    def _spellings(self, name: str) -> list[str]:
        """Names that are compared as this one is, with its article or, where there are none,
        without."""
        return self._names.get(name) or self._names.get(_ARTICLE.sub("", name), [])

    def _readings(self, text: str) -> Iterator[_Reading]:
        """Ways to read a prompt: as captions of icons are worded, and as people word it."""
        yield _Reading(text, None, told=False)
        if found := _STYLE_OF.fullmatch(text):
            yield _Reading(found["name"], found["style"], told=True)
        bare = _ARTICLE.sub("", text)
        for style in self._styles:
            for words in (f"{style} style", style):
                if text.endswith(f" {words}"):
                    name = _BEFORE_STYLE.sub("", text.removesuffix(f" {words}"))
                    yield _Reading(name, style, told=False)
                if bare.startswith(f"{words} "):
                    yield _Reading(bare.removeprefix(f"{words} "), style, told=False)
        for place in reversed(list(_SEPARATOR.finditer(text))):  # names have such words, too
            name, rest = text[: place.start()], _ARTICLE.sub("", text[place.end() :])
            style = rest.removesuffix(" style")
            if "," not in style and (style != rest or "," in place[0]):
                yield _Reading(name, style, told=style != rest)

    def _is_name(self, text: str) -> bool:
        """Whether a text is a name, with an article or without."""
        return bool(self._spellings(text))

    def _name_problem(self, name: str) -> str | None:
        """A line where no set has a name."""
        plain = _ARTICLE.sub("", name)[:_MAX_LETTERS]
        if not plain or not self.names or self._is_name(name):
            return None
        if not any(letter.isalnum() for letter in plain):
            return (
                f"no icon is named {plain!r}; write its name in words; the image may show anything"
            )
        pairs = _letter_pairs(plain)
        nearest = heapq.nlargest(
            _SHOWN, self._names, key=lambda one: _likeness(pairs, self._pairs[one])
        )
        shown = ", ".join(repr(self._names[one][0]) for one in nearest if pairs & self._pairs[one])
        hint = f"the nearest names: {shown}; " if shown else ""
        return f"no icon is named {plain!r}; {hint}the image may show anything"

    @cached_property
    def _styles(self) -> dict[str, str]:
        """Styles by how they are compared; one that ends in another comes before it."""
        plain = {_plain(style): style for style in self.styles}
        return dict(sorted(plain.items(), key=lambda pair: (-len(pair[0]), pair[0])))

    @cached_property
    def _names(self) -> dict[str, list[str]]:
        """Names by how they are compared."""
        found: dict[str, list[str]] = {}
        for name in self.names:
            found.setdefault(_plain(name), []).append(name)
        return found

    @cached_property
    def _pairs(self) -> dict[str, frozenset[str]]:
        return {name: _letter_pairs(name) for name in self._names}


def _plain(text: str) -> str:
    """A text as prompts, names and styles are compared: small letters, plain quotes, hyphens as
    spaces, and one space after a comma."""
    plain = unicodedata.normalize("NFC", text).casefold().translate(_QUOTES)
    plain = re.sub(r"[\s_-]+", " ", plain)
    return re.sub(r" *, *", ", ", plain).strip(" .!,")


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
