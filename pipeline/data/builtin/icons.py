"""The source `icons`: the same names drawn by several designers. Knows captions, splits and
rendered images; knows no file formats and no training.

The held-out split that training is validated by has the tuning cells alone; `reported` gives the
others (see `icon_split`). Where so few drawings are there that none is a tuning cell, one in twenty
of those to train on, one at least, is held out in their place, by a hash.
"""

from __future__ import annotations

import hashlib
import logging
import os
import zlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from pipeline.config.data import DataConfig
from pipeline.data.builtin.emoji import installed_names
from pipeline.data.builtin.icon_captions import captions_of_icon
from pipeline.data.builtin.icon_sets import (
    IconSet,
    key_index,
    key_of,
    key_of_slug,
    letters_of,
    read_set,
)
from pipeline.data.builtin.icon_split import Kind, cell_of, without_tones
from pipeline.data.builtin.svg import RENDER_VERSION, UnusableSvg, require_renderer
from pipeline.data.builtin.svg_process import Renderers, TooSlow
from pipeline.data.readers.images import random_crop, say_background
from pipeline.data.readers.transparency import composed
from pipeline.data.source import Source
from pipeline.runtime.atomic_io import atomic_write

_log = logging.getLogger(__name__)

_FEW_HELD_OUT = 20
"""Of few drawings one in so many is held out."""


@dataclass(frozen=True, eq=False)
class Icon:
    """One drawing."""

    style: str
    key: str
    """Code points, or the name of an icon that has none."""
    name: str
    image: np.ndarray
    """(S,S,4) uint8: red, green, blue and alpha, not premultiplied."""

    @property
    def label(self) -> str:
        return f"{self.style}/{self.name}"


@lru_cache(maxsize=2)
def load_icons(
    folder: str, sets: tuple[str, ...], annotations: str | None, size: int, workers: int
) -> tuple[tuple[Icon, ...], tuple[str, ...]]:
    """Every drawing of the sets that can be rendered, in the order of the sets, and what was left
    out, one line each. Drawings that are the same pixels in one style count once.

    Raises:
        FileNotFoundError: a set is not there; says how to get it.
        ValueError: a set is corrupted, or has no drawing that can be rendered, or two have one
            style.
        ModuleNotFoundError: resvg-py is not installed.
    """
    names = emoji_names(annotations)
    found: list[Icon] = []
    problems: list[str] = []
    known = key_index(names)
    further: dict[str, str] = {}
    loaded: list[IconSet] = []
    for entry in sets:
        one = read_set(locate_set(Path(folder).expanduser(), entry), further | known)
        loaded.append(one)
        # Names and aliases of one set find the code points of a later set that has none.
        known = {letters_of(name): key for key, name in one.own_names.items()} | known
        further = one.further_names | further
    styles = Counter(one.style for one in loaded)
    if twice := [style for style, count in styles.items() if count > 1]:
        raise ValueError(f"data.icons.sets has the style {twice[0]} twice; name each set once")
    if not names and any(key_of_slug(key, {}) for one in loaded for key in one.drawings):
        problems.append(
            "no English names of emoji are installed, so icons are called as in their sets; "
            "pip install emoji"
        )
    for one in loaded:
        problems += one.problems
        if one.licence is None:
            problems.append(f"{one.style} states no licence; ask before you share what it trains")
        images, left_out = _rendered(one, size, Path(folder).expanduser(), workers)
        if not images:
            reasons = [*left_out, *one.problems]
            raise ValueError(
                f"the style {one.style} has no drawing that can be rendered"
                f"{f' ({reasons[0]})' if reasons else ''}; mend its set, or leave it out of "
                "data.icons.sets"
            )
        problems += left_out
        icons = [
            Icon(one.style, key, names.get(key) or _first_name(loaded, key), image)
            for key, image in images.items()
        ]
        found += _distinct(icons)
    return tuple(found), tuple(problems)


def _distinct(icons: Sequence[Icon]) -> list[Icon]:
    """The icons of one style, in order; of those that are the same pixels, the one of the shortest
    name: the flag of France is that of Clipperton Island, too."""
    by_pixels: dict[bytes, Icon] = {}
    for icon in sorted(icons, key=lambda icon: len(icon.name)):
        by_pixels.setdefault(icon.image.tobytes(), icon)
    kept = set(by_pixels.values())
    return [icon for icon in icons if icon in kept]


def emoji_names(annotations: str | None) -> dict[str, str]:
    """English names by key, from the Unicode CLDR or the package `emoji`; empty without either,
    where icons keep the names of their sets."""
    return {key_of(text): name for text, name in installed_names(annotations).items()}


def _first_name(sets: Sequence[IconSet], key: str) -> str:
    return next(one.own_names[key] for one in sets if key in one.own_names)


def locate_set(folder: Path, entry: str) -> Path:
    """The path of a set: its name in the folder of sets, or a path of its own. What begins with a
    dot is a path.

    Raises:
        FileNotFoundError: neither exists; says what the folder has.
    """
    own = Path(entry).expanduser()
    in_folder = () if entry.startswith(".") else (folder / entry, folder / f"{entry}.json")
    for path in (*in_folder, Path(os.path.abspath(own))):
        if path.exists():
            return path
    there = sorted(path.stem for path in folder.glob("*") if not path.name.startswith("."))
    raise FileNotFoundError(
        f"data.icons.sets names {entry!r}, which is neither in {folder} (it has "
        f"{', '.join(there) or 'nothing'}) nor a path; run `make icons`, or give the path of an "
        "Iconify JSON file or of a folder of .svg files"
    )


def _rendered(
    icons: IconSet, size: int, folder: Path, workers: int
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Images by key, and what was left out, one line each. Both are kept in the folder of sets,
    where it can be written. A drawing that took too long is tried again after all others, when the
    machine is less busy."""
    require_renderer()
    digest = hashlib.sha256(f"{size} {RENDER_VERSION} {version('resvg-py')}\n".encode())
    for key, svg in icons.drawings.items():
        digest.update(f"{key}\0{svg}\n".encode())
    path = folder / ".rendered" / f"{icons.style}-{size}-{digest.hexdigest()[:16]}.npz"
    if (kept := _kept(path)) is not None:
        return kept
    _log.info("rendering %d icons of %s at %dx%d", len(icons.drawings), icons.style, size, size)

    too_slow: list[str] = []

    def one(key: str) -> np.ndarray | str:
        try:
            return renderers.render(icons.drawings[key])
        except UnusableSvg as error:
            if isinstance(error, TooSlow):
                too_slow.append(key)
            name = icons.own_names[key]
            return (
                f"{icons.style}: the drawing of {name} is left out ({error}); save it as a plain "
                "SVG"
            )

    with Renderers(size) as renderers, ThreadPoolExecutor(workers) as pool:
        results = dict(zip(icons.drawings, pool.map(one, icons.drawings), strict=True))
        for key in list(too_slow):
            results[key] = one(key)
    images = {key: one for key, one in results.items() if isinstance(one, np.ndarray)}
    problems = [one for one in results.values() if isinstance(one, str)]
    if images:
        try:
            with atomic_write(path) as beside, beside.open("wb") as file:
                np.savez_compressed(
                    file,
                    keys=np.array(list(images)),
                    images=np.stack(list(images.values())),
                    problems=np.array(problems, dtype=str),
                )
        except OSError as error:
            _log.warning(
                "rendered icons are not kept for the next run (%s); give a data.icons.folder that "
                "can be written",
                error,
            )
    return images, problems


def _kept(path: Path) -> tuple[dict[str, np.ndarray], list[str]] | None:
    """What `_rendered` kept; None where it is not there, or damaged."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file, np.load(file) as kept:
            images = dict(zip(kept["keys"].tolist(), kept["images"], strict=True))
            return images, kept["problems"].tolist()
    except (OSError, ValueError, EOFError, KeyError, BadZipFile, zlib.error) as error:
        _log.info("%s is damaged (%s); its icons are rendered again", path, error)
        return None


class IconSource(Source):
    """One split of the icons: `train`, `held_out`, or `reported`, which no setting is chosen by.
    `images` has three channels, or four with `data.alpha: keep`."""

    name = "icons"

    def __init__(self, config: DataConfig, split: str) -> None:
        everything, problems = _icons_of(config)
        self._problems = list(problems)
        self.everything = everything
        if split == "reported":
            # In an order whose first ones are of all kinds and styles.
            self.icons = by_hash([icon for kind in reported(config).values() for icon in kind])
        else:
            self.icons = _split(everything, split, config.icons.untoned_repeats)
        self.num_images = len(self.icons)
        self._config = config
        if config.alpha != "keep":
            say_background(config.alpha)
        digest = hashlib.sha256(f"{config.alpha}\n".encode())
        for icon in self.icons:
            digest.update(f"{icon.label}\0{icon.key}\n".encode() + icon.image.tobytes())
        self.fingerprint = digest.hexdigest()[:16]

    @property
    def problems(self) -> list[str]:
        return self._problems

    def images(self, indices: Sequence[int], draws: Sequence[int] | None = None) -> np.ndarray:
        """Images (N,S,S,C) uint8; see `Source`."""
        found = [composed(self.icons[int(i)].image, self._config.alpha) for i in indices]
        if draws is not None and self._config.flip:
            found = [
                random_crop(p, (len(p), len(p)), crop=False, flip=True, draw=draw)
                for p, draw in zip(found, draws, strict=True)
            ]
        return np.stack(found)

    def all_captions(self, indices: Sequence[int]) -> list[list[str]]:
        own = [self.icons[int(i)] for i in indices]
        return [captions_of_icon(icon.name, icon.style) for icon in own]

    def names(self, indices: Sequence[int]) -> list[str]:
        return [self.icons[int(i)].label for i in indices]


def _icons_of(config: DataConfig) -> tuple[tuple[Icon, ...], tuple[str, ...]]:
    own = config.icons
    return load_icons(own.folder, tuple(own.sets), own.annotations, config.size[0], config.workers)


def _split(everything: Sequence[Icon], split: str, untoned_repeats: int = 1) -> list[Icon]:
    """The drawings of a split: those to train on, or those that training is validated by."""
    trained = [icon for icon in everything if cell_of(icon.key, icon.style).kind == "train"]
    validation = [icon for icon in everything if _is_tuning(icon)]
    if not validation:  # few drawings, of a user's own
        validation = by_hash(trained)[: max(len(trained) // _FEW_HELD_OUT, 1)]
        chosen = set(validation)
        trained = [icon for icon in trained if icon not in chosen]
    if split == "train":
        untoned = [icon for icon in trained if without_tones(icon.key) == icon.key]
        return trained + untoned * (untoned_repeats - 1)
    return validation


def by_hash(icons: Sequence[Icon]) -> list[Icon]:
    """Icons by a hash of their style and name: in one order, whatever else there is."""
    return sorted(icons, key=lambda icon: hashlib.sha256(icon.label.encode()).digest())


def _is_tuning(icon: Icon) -> bool:
    cell = cell_of(icon.key, icon.style)
    return cell.kind != "train" and cell.tuning


def reported(config: DataConfig, *, tuning: bool = False) -> dict[Kind, list[Icon]]:
    """The drawings that no setting was chosen by, by kind, for `evaluate`; or the tuning cells. Of
    the kinds `cell` and `tone`, those alone whose name is trained on in another style."""
    everything, _ = _icons_of(config)
    kinds: dict[Kind, list[Icon]] = {"cell": [], "tone": [], "name": []}
    trained = {icon.key for icon in everything if cell_of(icon.key, icon.style).kind == "train"}
    for icon in everything:
        cell = cell_of(icon.key, icon.style)
        if cell.kind == "train" or cell.tuning != tuning:
            continue
        if cell.kind == "name" or icon.key in trained:
            kinds[cell.kind].append(icon)
    return kinds


def styles_and_names(config: DataConfig) -> tuple[list[str], list[str]]:
    """The styles that are trained on, and every name, held-out ones too; each in order."""
    everything, _ = _icons_of(config)
    styles = {icon.style for icon in _split(everything, "train")}
    return sorted(styles), sorted({icon.name for icon in everything})


def licences(config: DataConfig) -> list[dict[str, str | None]]:
    """`IconSet.terms` of each set."""
    own = config.icons
    folder = Path(own.folder).expanduser()
    return [read_set(locate_set(folder, entry), {}).terms for entry in own.sets]
