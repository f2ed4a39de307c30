"""Which icons are held out: a pure function of code points and style. Knows no files and no pixels.

Three kinds of cells (a drawing of a name in a style) test three kinds of new combinations:

- `cell`: a twentieth of all drawings. Their names are seen in other styles.
- `tone`: one skin tone of a quarter of the people and hands in each style. Their other tones are
  seen in the style, and the tone in other styles.
- `name`: a fiftieth of the names, in all styles, skin tones and sexes. Never seen.

A quarter of each kind are tuning cells, by which settings and checkpoints are chosen. The others
are reported. A name that is never seen is either, in all styles alike.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

Kind = Literal["train", "cell", "tone", "name"]
HELD_OUT_KINDS: tuple[Kind, ...] = ("cell", "tone", "name")
_TONES = ("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff")
_PEOPLE = {"1f468": "1f9d1", "1f469": "1f9d1", "1f474": "1f9d3", "1f475": "1f9d3"}
"""Man and woman count as person, and old man and old woman as older person."""
_SEXES = ("2640", "2642")
_JOINER = "200d"


@dataclass(frozen=True)
class Cell:
    """Where one drawing belongs."""

    kind: Kind
    tuning: bool = False
    """Whether settings are chosen by it, where it is held out."""


def cell_of(key: str, style: str) -> Cell:
    """Where the drawing of a key (see `icon_sets`) in a style belongs."""
    base = base_of(key)
    if _fraction(f"name/{base}") < 0.02:
        return Cell("name", _fraction(f"tuning/{base}") < 0.25)
    tuning = _fraction(f"tuning/{style}/{key}") < 0.25
    tone = tone_of(key)
    if tone is not None:
        family = f"tone/{style}/{without_tones(key)}"
        if _fraction(family) < 0.25 and int(_fraction(f"which {family}") * 5) == tone:
            return Cell("tone", tuning)
    if _fraction(f"cell/{style}/{key}") < 0.05:
        return Cell("cell", tuning)
    return Cell("train")


def tone_of(key: str) -> int | None:
    """The skin tone of a key, 0 (light) to 4 (dark); None where it has none, or two."""
    tones = [part for part in key.split("-") if part in _TONES]
    return _TONES.index(tones[0]) if len(tones) == 1 and tones[0] != key else None


def without_tones(key: str) -> str:
    """A key in whatever skin tone: '1f469-1f3fd-200d-1f373' -> '1f469-200d-1f373'."""
    return "-".join(part for part in key.split("-") if part not in _TONES) or key


def base_of(key: str) -> str:
    """What a key has in common with its siblings, which differ in skin tones and sexes."""
    parts = [_PEOPLE.get(part, part) for part in without_tones(key).split("-")]
    kept = [part for part in parts if part not in _SEXES]
    while kept and kept[-1] == _JOINER:
        kept.pop()
    return "-".join(kept) or key


def _fraction(text: str) -> float:
    """A number in [0, 1) by a hash of a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
