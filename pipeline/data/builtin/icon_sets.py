"""Sets of icons: Iconify JSON files and folders of SVGs. Knows files, names and code points; knows
no pixels and no splits.

The format: https://iconify.design/docs/types/iconify-json.html. `chars.json` beside `icons.json`
gives the code points of names. An icon's key is its code points in hexadecimal, such as
`1f469-1f3fd-200d-1f373`, by which drawings of several designers are joined. Variation selectors are
left out.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.data.builtin.emoji import TONES
from pipeline.data.readers.files import MAX_TEXT_BYTES, parse_json, read_file
from pipeline.runtime.printable import printable

MAX_SET_BYTES = 2**26
"""Of an Iconify JSON file; the largest set of emoji has 25 MB."""
STYLES = {"fluent-emoji-flat": "fluent", "noto-v1": "blob"}
"""Styles that captions call otherwise than the set's prefix."""
_SELECTORS = "\ufe0e\ufe0f"
_SHORT_POINTS = {"23", "2a", "a9", "ae", *(f"3{digit}" for digit in range(10))}
"""Code points of fewer than four digits that begin an emoji: keycaps, and two signs."""
_KEYCAP = re.compile("[0-9#*]\ufe0f?\u20e3")
_PREFIX = re.compile(r"\w[\w .-]{0,99}")
"""A set's prefix: a word of captions, and a part of a file's name."""
_REPLACE = "replace it by a whole copy, which `make icons` does for its own sets"
_OTHER_FILES = (".svgz", ".ai", ".eps")
"""Drawings that are left out of a folder of SVGs."""


@dataclass(frozen=True)
class IconSet:
    """The drawings of one designer."""

    style: str
    """What captions call it."""
    drawings: dict[str, str]
    """SVG by key: code points, or the icon's own name where it has none."""
    own_names: dict[str, str]
    """Name in words by key, as the set has it."""
    further_names: dict[str, str] = field(default_factory=dict)
    """Key by the letters of other names of the drawings: aliases that have no key of their own."""
    problems: list[str] = field(default_factory=list)
    """What was left out, one line each."""
    licence: str | None = None
    """SPDX identifier or title."""
    licence_url: str | None = None
    author: str | None = None
    author_url: str | None = None

    @property
    def terms(self) -> dict[str, str | None]:
        """Who drew the style and under what licence, as a model card lists it; None where the set
        does not say."""
        return {
            "style": self.style,
            "licence": self.licence,
            "licence_url": self.licence_url,
            "author": self.author,
            "author_url": self.author_url,
        }


def key_of(text: str) -> str:
    """The key of an emoji: '👩\u200d🍳' -> '1f469-200d-1f373'."""
    return "-".join(f"{ord(letter):x}" for letter in text if letter not in _SELECTORS)


def name_of_slug(slug: str) -> str:
    """A name in words: 'woman-cook-medium-dark-skin-tone' -> 'woman cook: medium-dark skin tone',
    as the CLDR writes it."""
    for tone in sorted(TONES, key=len, reverse=True):
        ending = "-" + tone.replace(" ", "-")
        if slug.endswith(ending):
            return f"{name_of_slug(slug.removesuffix(ending))}: {tone}"
    return slug.replace("-", " ").replace("_", " ").strip()


def key_index(names: Mapping[str, str]) -> dict[str, str]:
    """Keys by the letters of names, in words and as in Unicode, for `read_set`."""
    single = [key for key in names if re.fullmatch(r"[0-9a-f]+", key)]
    older = {
        letters_of(found): key
        for key in single
        if (found := unicodedata.name(chr(int(key, 16)), ""))
    }
    return older | {letters_of(name): key for key, name in names.items()}


def read_set(path: Path, known: Mapping[str, str]) -> IconSet:
    """A set from an Iconify JSON file, from a folder that has one as `icons.json`, or from a folder
    of SVGs.

    Args:
        known: keys by the letters of names, for icons that come without code points.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: a file is corrupted or too large; says which.
    """
    if path.is_file():
        return _read_iconify(path, known)
    if (path / "icons.json").is_file():
        return _read_iconify(path / "icons.json", known)
    below = sorted(path.iterdir()) if path.is_dir() else []
    files = [file for file in below if file.suffix.lower() == ".svg"]
    if not files:
        raise FileNotFoundError(
            f"{path} has no icons: give an Iconify JSON file, a folder with icons.json, or a "
            "folder of .svg files"
        )
    problems = _left_out_of(path, below)
    drawings: dict[str, str] = {}
    for file in files:
        if file.stem in drawings:
            problems.append(
                f"{printable(file.name)} is left out: another file has its name; rename one"
            )
            continue
        try:
            drawings[file.stem] = utf8_text(read_file(file, MAX_TEXT_BYTES))
        except (OSError, ValueError) as error:
            problems.append(f"{printable(file.name)} is left out: {error}")
    chars = _beside(path / "icons.json", "chars.json", None)
    joined = _joined(path.name, drawings, chars, known, problems, "chars.json")
    return replace(joined, **_terms(_beside(path / "icons.json", "info.json", None)))


def utf8_text(content: bytes) -> str:
    """The text of an SVG or of what lies beside it. Raises ValueError where it is no UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no UTF-8 (byte {error.start}); save it as UTF-8") from error


def _left_out_of(folder: Path, below: Sequence[Path]) -> list[str]:
    """What a folder of SVGs has beside them that a user may take for a part of the set."""
    problems = []
    others = [file for file in below if file.suffix.lower() in _OTHER_FILES]
    if others:
        problems.append(
            f"{folder.name}: {len(others)} files, such as {printable(others[0].name)}, are left "
            "out; save them as plain SVGs"
        )
    deeper = [one for one in below if one.is_dir() and any(one.rglob("*.[sS][vV][gG]"))]
    if deeper:
        problems.append(
            f"{folder.name}: SVGs in {len(deeper)} folders, such as {printable(deeper[0].name)}/, "
            "are left out; put all drawings of a style into one folder"
        )
    return problems


def _read_iconify(path: Path, known: Mapping[str, str]) -> IconSet:
    content = _read_object(path)
    prefix = content.get("prefix")
    icons = content.get("icons")
    if not isinstance(prefix, str) or not isinstance(icons, dict):
        raise ValueError(
            f"{path} is no Iconify set: it needs a text `prefix` and an object `icons`; {_REPLACE}"
        )
    if not _PREFIX.fullmatch(prefix):  # names a file of rendered icons
        raise ValueError(
            f"{path} has the prefix {printable(prefix)!r}; write one of at most 100 letters, "
            "digits, underscores, spaces, dots and hyphens, that begins with one of the first three"
        )
    problems: list[str] = []
    drawings: dict[str, str] = {}
    further = content.get("aliases")
    aliases: dict[str, str] = {}
    for name in [*icons, *(further if isinstance(further, dict) else {})]:
        try:
            drawing, same = _drawing(content, name)
            (name + drawing).encode()  # a lone surrogate is no letter
            drawings[name] = drawing
            if same not in (None, name):
                aliases[name] = same
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            problems.append(f"{prefix}:{printable(name)} is left out: {error}")
    chars = _beside(path, "chars.json", content.get("chars"))
    place = "chars.json" if path.name == "icons.json" else "`chars`"
    hidden = {name for name, icon in icons.items() if isinstance(icon, dict) and icon.get("hidden")}
    others = hidden | set(drawings) - set(icons)
    joined = _joined(prefix, drawings, chars, known, problems, place, others, aliases)
    return replace(joined, **_terms(_beside(path, "info.json", content.get("info"))))


def read_terms(path: Path) -> dict[str, str | None]:
    """Licence and author of a set, as `IconSet` has them; also of a folder of other images, whose
    `info.json` may be about something else."""
    file = path if path.is_file() else path / "icons.json"
    if file.is_file():
        return _terms(_beside(file, "info.json", _read_object(file).get("info")))
    try:
        return _terms(_beside(file, "info.json", None))
    except ValueError:
        return _terms({})


def _terms(info: Mapping[str, Any]) -> dict[str, Any]:
    """What `info.json` states."""
    licence = info.get("license")
    author = info.get("author")
    return {
        "licence": _title(licence, "spdx") or _title(licence, "title"),
        "licence_url": _title(licence, "url"),
        "author": _title(author, "name"),
        "author_url": _title(author, "url"),
    }


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(read_file(path, MAX_SET_BYTES))
    except ValueError as error:
        if path.suffix.lower() != ".json":
            raise ValueError(
                f"{path} is no Iconify JSON file; give one, or a folder of .svg files"
            ) from error
        raise ValueError(f"{path} cannot be read ({error}); {_REPLACE}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; {_REPLACE}")
    return content


def _title(value: object, name: str) -> str | None:
    found = value.get(name) if isinstance(value, dict) else None
    return found if isinstance(found, str) else None


def _beside(path: Path, name: str, inside: object) -> dict[str, Any]:
    """An object that is a file of its own beside `icons.json`, or part of it."""
    file = path.with_name(name)
    if path.name == "icons.json" and file.is_file():
        return _read_object(file)
    return inside if isinstance(inside, dict) else {}


class _Shown(NamedTuple):
    """How a drawing is shown."""

    box: tuple[float, ...]
    """Left, top, width and height of the part that is seen."""
    turns: int
    """Quarters of a turn to the right, 0 to 3."""
    mirrored: tuple[bool, ...]
    """Left with right; top with bottom."""

    @classmethod
    def of(cls, changes: Sequence[Mapping[str, Any]], content: Mapping[str, Any]) -> _Shown:
        """As the format says of an alias, of those that it leads to, and of the icon, in this
        order; and of the set."""
        sizes: dict[str, Any] = {"left": 0, "top": 0, "width": 16, "height": 16}
        for change in (content, *reversed(changes)):
            sizes |= {field: change[field] for field in sizes if field in change}
        return cls(
            tuple(map(float, sizes.values())),
            sum(int(change.get("rotate", 0)) for change in changes) % 4,
            tuple(
                sum(bool(change.get(field)) for change in changes) % 2 == 1
                for field in ("hFlip", "vFlip")
            ),
        )


def _drawing(content: Mapping[str, Any], name: str) -> tuple[str, str | None]:
    """The SVG of an icon or of an alias, which may mirror or turn another icon, or show another
    part of it; and the icon that is drawn the same, itself where it is one, None where an alias
    changes it."""
    changes: list[Mapping[str, Any]] = []  # from the alias to the icon
    for _ in range(10):
        if name in content["icons"]:
            break
        alias = content["aliases"].get(name)
        if alias is None:
            raise ValueError(f"it is an alias of {printable(name)!r}, which the set lacks")
        if not isinstance(alias, dict):
            raise TypeError("it is no object")
        changes.append(alias)
        parent = alias.get("parent")
        if not isinstance(parent, str):
            raise TypeError("it is an alias without a text `parent`")
        name = parent
    if name not in content["icons"]:
        raise ValueError("it is an alias of more than 10 aliases")
    icon = content["icons"][name]
    if not isinstance(icon, dict):
        raise TypeError("it is no object")
    own = _Shown.of([icon], content)
    shown = _Shown.of([*changes, icon], content)
    left, top, width, height = shown.box
    body = icon.get("body")
    if not isinstance(body, str):
        raise TypeError("it has no text `body`")
    centre = f"{left + width / 2} {top + height / 2}"
    if shown.mirrored != (False, False):
        scale = " ".join("-1" if one else "1" for one in shown.mirrored)
        back = f"{-(left + width / 2)} {-(top + height / 2)}"
        body = f'<g transform="translate({centre}) scale({scale}) translate({back})">{body}</g>'
    if shown.turns:
        body = f'<g transform="rotate({90 * shown.turns} {centre})">{body}</g>'
    if shown.turns % 2:  # the sides change places about the same centre
        left += (width - height) / 2
        top += (height - width) / 2
        width, height = height, width
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">{body}</svg>'
    )
    return svg, name if shown == own else None


def _joined(
    prefix: str,
    drawings: Mapping[str, str],
    chars: Mapping[str, Any],
    known: Mapping[str, str],
    problems: list[str],
    chars_place: str,
    others: Set[str] = frozenset(),
    aliases: Mapping[str, str] | None = None,
) -> IconSet:
    """A set whose drawings are known by key. Without code points of its own, names are looked up,
    those of an icon before those of its aliases; those that are no emoji's are keys themselves.

    Args:
        chars_place: where the code points are, or would be, for messages.
        others: names of drawings that need no code points: aliases, and what the set hides.
        aliases: icons by the aliases that draw the same.
    """
    aliases = aliases or {}
    slugs: dict[str, str] = {}  # key -> name in the set
    if chars:
        by_points: dict[str, Any] = {}
        for points, slug in chars.items():
            by_points.setdefault(_normal(points), slug)
        for key in sorted(by_points, key=_is_private):
            slug = by_points[key]
            if not isinstance(slug, str) or slug not in drawings:
                continue
            if _is_private(key):  # which each font uses as it likes
                own = key_of_slug(slug, known)
                key = f"{key}-{slug}" if own is None or own in slugs else own
            slugs[key] = slug
        if left_out := sorted(set(drawings) - set(slugs.values()) - others):
            problems.append(
                f"{prefix}: {len(left_out)} icons, such as {printable(left_out[0])}, have no code "
                f"points in {chars_place} and are left out; add them to it"
            )
    else:
        found: set[str] = set()
        for slug in drawings:  # icons, then aliases
            icon = aliases.get(slug, slug)
            own = key_of_slug(slug, known)
            if own is not None and own not in slugs and icon not in found:
                slugs[own] = icon
                found.add(icon)
        unknown = [slug for slug in drawings if slug not in found and slug not in aliases]
        if slugs:
            kept = f", such as {printable(unknown[0])}" if unknown else ""
            problems.append(
                f"{prefix} has no {chars_place}: {len(slugs)} icons are joined with other sets by "
                f"their names, and {len(unknown)} keep names of their own{kept}; add "
                f"{chars_place} if these are emoji"
            )
        slugs |= {slug: slug for slug in unknown}
    keys = {slug: key for key, slug in slugs.items()}
    return IconSet(
        style=STYLES.get(prefix, prefix.replace("_", "-").lower()),
        drawings={key: drawings[slug] for key, slug in sorted(slugs.items())},
        own_names={key: name_of_slug(slug) for key, slug in slugs.items()},
        further_names={
            letters_of(name): keys[icon]
            for name, icon in aliases.items()
            if icon in keys and name not in keys
        },
        problems=problems,
    )


def key_of_slug(slug: str, known: Mapping[str, str]) -> str | None:
    """The key of a drawing by its file's name: code points (emoji_u1f600, 1f600), an emoji, or the
    name of one; None where it is none of these."""
    if _is_points(slug):
        return _normal(slug)
    if _is_emoji(slug):
        return key_of(slug)
    letters = letters_of(slug)
    return known.get(letters) if letters else None


def _is_emoji(text: str) -> bool:
    """Whether a text is symbols alone: an emoji, or several."""
    symbols = _KEYCAP.sub("", text)
    return bool(text) and all(
        not letter.isascii() and unicodedata.category(letter)[0] in "SCM" for letter in symbols
    )


def _is_private(key: str) -> bool:
    """Whether a key is code points that Unicode leaves to each font, as fonts of icons use them."""
    parts = key.split("-")
    return all(
        re.fullmatch(r"[0-9a-f]{4,6}", part) is not None
        and int(part, 16) <= sys.maxunicode
        and unicodedata.category(chr(int(part, 16))) == "Co"
        for part in parts
    )


def _is_points(slug: str) -> bool:
    """Whether a name is code points of symbols, as in the files of Noto and Twemoji. Words such as
    `face` and `bed-01` are none."""
    plain = slug.lower()
    if re.fullmatch(r"(emoji_)?u?[0-9a-f]{2,6}([-_][0-9a-f]{2,6})*", plain) is None:
        return False
    parts = re.split(r"[-_]", plain.removeprefix("emoji_u").removeprefix("u"))
    if len(slug) < 4 or any(len(part) < 4 and part not in _SHORT_POINTS for part in parts):
        return False
    # ASCII, symbols, joiners, and what this Python does not know yet; no letters of any script.
    points = [int(part, 16) for part in parts]
    return max(points) <= sys.maxunicode and all(
        point < 128 or unicodedata.category(chr(point))[0] in "SCMP" for point in points
    )


def _normal(points: str) -> str:
    parts = re.split(r"[-_]", points.lower().removeprefix("emoji_u").removeprefix("u"))
    return "-".join(part.lstrip("0") for part in parts if part not in ("fe0f", "fe0e"))


def letters_of(name: str) -> str:
    """A name's letters and digits of any script, as names are compared."""
    plain = unicodedata.normalize("NFKD", name.lower()).replace("&", "and")
    plain = re.sub(r"^flag-for-(flag-)?", "flag ", plain)
    return "".join(letter for letter in plain if letter.isalnum() or _is_vowel_mark(letter))


def _is_vowel_mark(letter: str) -> bool:
    """Whether it is a mark that makes another word, as in Hindi and Japanese; accents of Latin,
    Greek and Cyrillic letters do not count."""
    accent = "\u0300" <= letter <= "\u036f" or letter in _SELECTORS
    return unicodedata.category(letter)[0] == "M" and not accent
