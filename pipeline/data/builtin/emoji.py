"""Real images: the Noto Color Emoji font, named by the Unicode CLDR. Knows fonts and names; knows
no training.

The held-out names are new combinations of words seen in training: one skin tone each of names whose
four other tones are trained on. There are as many as `data.val_fraction` asks for, and
`data.emoji.split_seed` chooses which.
"""

from __future__ import annotations

import hashlib
import importlib.util
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.config.data import DataConfig, background
from pipeline.data.readers.images import random_crop, say_background
from pipeline.data.source import Source

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
ANNOTATIONS = "/usr/share/unicode/cldr/common"
TONES = tuple(
    f"{tone} skin tone" for tone in ("light", "medium-light", "medium", "medium-dark", "dark")
)
_GENDERS = {
    "man": "",
    "woman": "",
    "person": "",
    "men": "",
    "women": "",
    "people": "",
    "boy": "child",
    "girl": "child",
    "mermaid": "merperson",
    "merman": "merperson",
    "princess": "prince",
    "older": "old",
    "santa": "",
    "mrs.": "",
    "mx": "",
}
"""Words that tell siblings apart, and what stands for all of them."""
BITMAP_SIZE = 109
"""The only size of the font's bitmaps."""
_GLYPH = (136, 128)
"""Width and height of a bitmap, in pixels."""


@dataclass(frozen=True)
class Emoji:
    """One image of the font."""

    text: str
    name: str
    image: np.ndarray
    """uint8 (S,S,C)."""


def tone_of(name: str) -> tuple[str, str | None]:
    """A name's family and its skin tone: 'astronaut: dark skin tone' -> ('astronaut', 'dark skin
    tone'). The tone is None for names without a tone, or with two.
    """
    base, _, rest = name.partition(": ")
    parts = rest.split(", ") if rest else []
    tones = [part for part in parts if part in TONES]
    if len(tones) != 1:
        return name, None
    others = [part for part in parts if part not in TONES]
    return base + (": " + ", ".join(others) if others else ""), tones[0]


def base_name(name: str) -> str:
    """What a name has in common with its siblings, which differ in tones and genders: 'man cook:
    dark skin tone' -> 'cook'."""
    head, _, rest = name.partition(": ")
    details = [part for part in rest.split(", ") if part not in TONES]
    parts = [_without_gender(part) for part in (head, *details)]
    return ": ".join([parts[0], *filter(None, parts[1:])])


def _without_gender(text: str) -> str:
    words = text.lower().replace("woman and man", "people").split()
    return " ".join(filter(None, (_GENDERS.get(word, word) for word in words)))


def held_out_names(names: Sequence[str], share: float, seed: int = 0) -> set[str]:
    """The fraction `share` of all names: one tone each of some families that have all five tones. A
    hash of the seed and the family's name chooses both."""
    families: dict[str, dict[str, str]] = {}
    for name in names:
        family, tone = tone_of(name)
        if tone:
            families.setdefault(family, {})[tone] = name
    # A seed of 0 hashes the name alone.
    hashes = {family: _hash(f"{seed}/{family}" if seed else family) for family in families}
    whole = [family for family, tones in families.items() if len(tones) == len(TONES)]
    chosen = sorted(whole, key=lambda family: hashes[family])[: round(share * len(names))]
    return {families[family][TONES[hashes[family] % len(TONES)]] for family in chosen}


def read_names(folder: Path) -> dict[str, str]:
    """Text -> English name, from the CLDR's annotations/en.xml and annotationsDerived/en.xml.

    Raises:
        ValueError: a file is no XML; says which.
    """
    names: dict[str, str] = {}
    for part in ("annotations", "annotationsDerived"):
        path = folder / part / "en.xml"
        if not path.is_file():
            continue
        try:
            root = ElementTree.parse(path).getroot()
        except ElementTree.ParseError as error:
            raise ValueError(f"{path} is no XML ({error}); replace it by a whole copy") from error
        for entry in root.iter("annotation"):
            if entry.get("type") == "tts" and entry.text:
                names[entry.get("cp", "")] = entry.text.strip()
    return names


def installed_names(annotations: str | None) -> dict[str, str]:
    """Text -> English name, from the CLDR, or without it from the package `emoji`; empty without
    either.

    Args:
        annotations: the CLDR's folder `common`, where it is not in its usual place.

    Raises:
        FileNotFoundError: that folder has no names.
    """
    named = read_names(Path(annotations or ANNOTATIONS).expanduser())
    if annotations and not named:
        raise FileNotFoundError(
            f"{annotations} has no names in annotations/en.xml; give the CLDR's folder 'common', "
            "or leave annotations out"
        )
    return named or names_of_package()


def names_of_package() -> dict[str, str]:
    """Text -> English name, from the PyPI package `emoji`; empty where it is not installed."""
    if importlib.util.find_spec("emoji") is None:
        return {}
    import emoji

    named = {
        text: data["en"].strip(":").replace("_", " ") for text, data in emoji.EMOJI_DATA.items()
    }
    # 'astronaut medium skin tone' -> 'astronaut: medium skin tone', as the CLDR writes it.
    for text, name in named.items():
        for tone in sorted(TONES, key=len, reverse=True):
            if name.endswith(f" {tone}"):
                named[text] = f"{name.removesuffix(f' {tone}')}: {tone}"
                break
    return named


@lru_cache(maxsize=4)
def load_emoji(
    image_size: int, font: str | None, annotations: str | None, alpha: str = "white"
) -> tuple[Emoji, ...]:
    """Every distinct image of the font that has a name, in the order of the names' list. Around
    them is what `alpha` says (`data.alpha`).

    Raises:
        FileNotFoundError: the font or the names are missing; says how to install them.
    """
    font_path = Path(font or FONT)
    if not font_path.is_file():
        raise FileNotFoundError(
            f"the emoji font {font_path} is not there; install it (Debian: apt-get install "
            "fonts-noto-color-emoji) or give its path as data.emoji.font"
        )
    names = installed_names(annotations)
    if not names:
        raise FileNotFoundError(
            f"the names of the emoji are not in {annotations or ANNOTATIONS}; install them "
            "(Debian: apt-get install unicode-cldr-core, or: pip install emoji) or give the CLDR's "
            "folder 'common' as data.emoji.annotations"
        )
    try:
        face = ImageFont.truetype(str(font_path), BITMAP_SIZE)
    except OSError as error:
        raise ValueError(
            f"{font_path} is no font with bitmaps of size {BITMAP_SIZE} ({error}); data.emoji.font "
            "needs NotoColorEmoji.ttf"
        ) from error
    found: dict[bytes, Emoji] = {}
    for text, name in names.items():
        image = _draw(face, text, image_size, alpha)
        if image is not None:
            found.setdefault(image.tobytes(), Emoji(text, name, image))
    return tuple(found.values())


def _draw(
    face: ImageFont.FreeTypeFont, text: str, image_size: int, alpha: str
) -> np.ndarray | None:
    """One glyph; None where the font has no single image for the text."""
    box = face.getbbox(text)
    if (box[2] - box[0], box[3] - box[1]) != _GLYPH:
        return None  # an unknown letter is empty, and an unknown sequence is several glyphs wide
    side = max(_GLYPH)
    canvas = Image.new("RGBA", (side, side), (255, 255, 255, 0))
    top = (side - _GLYPH[1]) // 2 - int(box[1])
    ImageDraw.Draw(canvas).text(
        ((side - _GLYPH[0]) // 2 - box[0], top), text, font=face, embedded_color=True
    )
    from stage1_tokenizer.pixels import to_filterable, to_rgb  # imports torch
    from stage1_tokenizer.transparency import filtered

    colour = background(alpha)
    pixels = to_filterable(canvas) if colour is None else to_rgb(canvas, background=colour)
    return filtered(pixels.resize((image_size, image_size), Image.Resampling.BICUBIC))


class EmojiSource(Source):
    """One split of the emoji."""

    name = "emoji"

    def __init__(self, config: DataConfig, split: str) -> None:
        if config.alpha != "keep":
            say_background(config.alpha)
        everything = load_emoji(
            config.size[0], config.emoji.font, config.emoji.annotations, config.alpha
        )
        kept_back = held_out_names(
            [e.name for e in everything], config.val_fraction, config.emoji.split_seed
        )
        self._emoji = [e for e in everything if (e.name in kept_back) == (split == "held_out")]
        self.num_images = len(self._emoji)
        self._families: dict[str, list[Emoji]] = {}
        self._siblings: dict[str, list[Emoji]] = {}
        for one in everything:
            self._siblings.setdefault(base_name(one.name), []).append(one)
            family, tone = tone_of(one.name)
            if tone:
                self._families.setdefault(family, []).append(one)
        self._flip = config.flip
        own = [e.name for e in self._emoji]
        digest = hashlib.sha256("\n".join(own).encode())
        for one in self._emoji:
            digest.update(one.image.tobytes())
        self.fingerprint = digest.hexdigest()[:16]

    def images(self, indices: Sequence[int], draws: Sequence[int] | None = None) -> np.ndarray:
        """Images (N,S,S,C) uint8; see `Source`."""
        found = [self._emoji[int(i)].image for i in indices]
        if draws is not None and self._flip:
            found = [
                random_crop(p, (len(p), len(p)), crop=False, flip=True, draw=draw)
                for p, draw in zip(found, draws, strict=True)
            ]
        return np.stack(found)

    def all_captions(self, indices: Sequence[int]) -> list[list[str]]:
        return [[name] for name in self.names(indices)]

    def names(self, indices: Sequence[int]) -> list[str]:
        return [self._emoji[int(i)].name for i in indices]

    def siblings(self, index: int) -> tuple[np.ndarray, int]:
        """The images (n,S,S,C) of an image's base name in all tones and genders, of both splits,
        and the index of its own; n is 1 without siblings."""
        own = self._emoji[index]
        return _among(self._siblings[base_name(own.name)], own)

    def tone_siblings(self, index: int) -> tuple[np.ndarray, int]:
        """The images (n,S,S,C) of an image's name in all its tones, and the index of its own tone;
        n is 1 without tones."""
        own = self._emoji[index]
        return _among(self._families.get(tone_of(own.name)[0], [own]), own)


def _among(candidates: Sequence[Emoji], own: Emoji) -> tuple[np.ndarray, int]:
    """The images (n,S,S,C) of all candidates, and the index of one of them."""
    names = [one.name for one in candidates]
    return np.stack([one.image for one in candidates]), names.index(own.name)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
