"""`minidalle finetune`: the prior of a bundle learns a new style from a few drawings, by LoRA and a
token for the style's name. Knows drawings, captions and settings; the stages train."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from pipeline.config.data import DataConfig
from pipeline.config.experiment import Experiment
from pipeline.config.load import load_values
from pipeline.data.builtin.icon_captions import styled_captions
from pipeline.data.builtin.icon_sets import (
    STYLES,
    key_index,
    key_of_slug,
    name_of_slug,
    read_set,
    read_terms,
    utf8_text,
)
from pipeline.data.builtin.icons import emoji_names
from pipeline.data.builtin.svg import UnusableSvg
from pipeline.data.builtin.svg_process import Renderers
from pipeline.data.load import find_rows
from pipeline.data.map_source import SourceIndex
from pipeline.data.readers.files import MAX_TEXT_BYTES, read_file
from pipeline.data.readers.images import EXTENSIONS, prepared
from pipeline.data.readers.locate import files_below
from pipeline.inference.bundle import Bundle, read_bundle, read_description
from pipeline.inference.known_prompts import KnownPrompts, read_known_prompts
from pipeline.runtime.atomic_io import atomic_write_dir
from pipeline.runtime.printable import printable
from pipeline.stages.nearest_style import MOST_DRAWINGS, nearest_style
from stage2_prior import TextTokenizer

_log = logging.getLogger(__name__)

MIN_DRAWINGS = 5
DRAWINGS = "style-drawings"
"""In a run's folder: the drawings and their captions, as the stages read them."""
_TERMS = ".licence.json"
"""Beside the drawings: `IconSet.terms`. Readers of images pass over hidden files."""
_HELD_OUT = 10
"""One of so many drawings is held out, to choose the best weights by."""


class Drawing(NamedTuple):
    """A drawing of the new style."""

    name: str
    suffix: str
    content: bytes
    """Its image file."""


def style_experiment(
    bundle: Path, drawings: Path, *, style: str | None = None, settings: Sequence[str] = ()
) -> Experiment:
    """The experiment that teaches a bundle a style; `pipeline.run` does the rest. Writes the
    drawings with their captions into the run's folder.

    Args:
        drawings: a folder of images or SVGs, or an Iconify JSON file.
        style: what prompts call it; the name of `drawings` without one.
        settings: as on the command line, before the defaults of this function.

    Raises:
        FileNotFoundError: there is no such bundle, or there are no drawings.
        ValueError: the bundle cannot learn it or has the style, or there are too few drawings.
    """
    parent = read_bundle(bundle)
    parent.tokenizer.require_codes("`minidalle finetune`")
    height, width = parent.tokenizer.size
    if height != width:
        raise ValueError(
            f"{bundle} makes images of {width}x{height} pixels, and drawings are squares; give a "
            "bundle of square images"
        )
    style = _checked_style(style or _name_of(drawings.expanduser().resolve()))
    known = known_styles(bundle, parent.trained_on)
    if style in known:
        raise ValueError(
            f"{bundle} has the style {style} already (it has {', '.join(known)}); name the new "
            "one otherwise, by the option style"
        )
    found = _spelled_as(read_known_prompts(bundle), read_drawings(drawings.expanduser(), height))
    if len(found) < MIN_DRAWINGS:
        raise ValueError(
            f"{drawings} has {len(found)} drawings that can be used, and a style needs at least "
            f"{MIN_DRAWINGS}, better 20 to 50; add some"
        )
    values = _values(bundle, parent, style)
    experiment = load_values(values, settings)
    folder = experiment.folder / DRAWINGS
    values["data"]["source"] = str(folder)
    terms = _terms_of(drawings.expanduser(), style)
    if terms["licence"] is None:
        _log.info("%s states no licence; ask before you share what it trains", drawings)
    _write(folder, found, style, terms)
    values["data"]["icons"] = {"sets": [*known, style]}  # the styles that the new bundle has
    if values["text"]["num_new_tokens"] and not experiment.text.new_tokens_like:
        values["text"]["new_tokens_like"] = _alike(bundle, found, experiment.data, known)
    return load_values(values, settings)


def _spelled_as(known: KnownPrompts | None, drawings: Sequence[Drawing]) -> list[Drawing]:
    """Drawings whose names are those of the bundle where they differ in case alone: `Red-Heart.png`
    is its red heart."""
    names = {name.casefold(): name for name in known.names} if known else {}
    return [one._replace(name=names.get(one.name.casefold(), one.name)) for one in drawings]


def _alike(
    bundle: Path, drawings: Sequence[Drawing], data: DataConfig, styles: Sequence[str]
) -> list[str]:
    """The styles as whose mean the token of a new style starts: the one that its drawings look most
    like; all, where the bundle knows few of their names."""
    known = read_known_prompts(bundle)
    names = set(known.names) if known else set()
    compared = [one for one in drawings if one.name in names][:MOST_DRAWINGS]
    if len(compared) < MIN_DRAWINGS or not styles:
        return list(styles)
    whole = replace(data, crop="centre")
    images = {one.name: prepared(one.content, whole) for one in compared}
    nearest = nearest_style(bundle, images, styles)
    _log.info("the new style starts as %s, which the drawings look most like", nearest)
    return [nearest]


def teaches_style(data: DataConfig) -> bool:
    """Whether data are the drawings that `style_experiment` wrote."""
    return Path(data.source).name == DRAWINGS


def with_new_style(
    parent: Path, data: DataConfig
) -> tuple[KnownPrompts | None, list[dict[str, str | None]]]:
    """What prompts may ask of a bundle that learned a style: its parent's names and those of the
    drawings, in the old styles and the new one; and the licences of all styles. None and none where
    the parent has none, or is there no more."""
    if not (parent / "pipeline.json").is_file():
        return None, []
    style = data.icons.sets[-1]
    licences = read_description(parent)["trained_on"].get("licences", [])
    terms = json.loads((Path(data.source) / _TERMS).read_text(encoding="utf-8"))
    if licences or terms["licence"]:
        licences = [*licences, terms]
    known = read_known_prompts(parent)
    if known:
        first = styled_captions("", style)[0]
        own = {
            path.read_text(encoding="utf-8").partition("\n")[0].removesuffix(first)
            for path in Path(data.source).rglob("*.txt")
        }
        # Without any, names are not checked; with the own ones alone, all others would be unknown.
        names = {*known.names, *own} if known.names else ()
        known = KnownPrompts((*known.styles, style), tuple(sorted(names)))
    return known, licences


def known_styles(bundle: Path, trained_on: dict[str, Any]) -> list[str]:
    """The styles that prompts may ask of a bundle; of one without prompts.json those of its sets'
    names; none where it has none."""
    if (known := read_known_prompts(bundle)) is not None:
        return list(known.styles)
    data = trained_on.get("data", {})
    source = str(data.get("source", ""))
    if source != "icons" and Path(source).name != DRAWINGS:
        return []
    stems = [Path(entry).stem for entry in data.get("icons", {}).get("sets", [])]
    return [STYLES.get(stem, stem.replace("_", "-").lower()) for stem in stems]


def read_drawings(path: Path, size: int) -> list[Drawing]:
    """The drawings of an Iconify file or of a folder, at any depth, each with its name: its first
    caption, where it has captions, or its file's name. SVGs are rendered; other images stay as they
    are, and are resized where they are read.

    Args:
        size: side of rendered drawings in pixels.

    Raises:
        FileNotFoundError: there are no drawings.
    """
    names = emoji_names(None)
    if _is_set(path):
        with Renderers(size) as renderers:
            return _of_set(path, renderers, names)
    endings = {file.suffix.lower() for file in files_below(path)}
    if not endings & {".svg", *EXTENSIONS}:
        raise FileNotFoundError(
            f"there are no drawings in {path}; give a folder of .svg or .png files, or an Iconify "
            "JSON file"
        )
    known = key_index(names)

    def name_of(file: str) -> str:
        """'1f600.png' -> 'grinning face', where names of emoji are installed; 'red-heart.png' ->
        'red heart'."""
        stem = Path(file).stem
        return names.get(key_of_slug(stem, known) or "", name_of_slug(stem))

    images = _images(path, size, name_of) if endings & set(EXTENSIONS) else []
    if ".svg" not in endings:  # so that other images need no renderer
        return images
    with Renderers(size) as renderers:
        return [*_of_svgs(path, renderers, name_of), *images]


def _is_set(path: Path) -> bool:
    """Whether it is an Iconify file, or a folder that has one."""
    return path.is_file() or (path / "icons.json").is_file()


def _of_set(path: Path, renderers: Renderers, names: dict[str, str]) -> list[Drawing]:
    icons = read_set(path, key_index(names))
    for problem in icons.problems:
        _log.warning("%s", problem)
    return [
        Drawing(names.get(key, icons.own_names[key]), ".png", content)
        for key, svg in icons.drawings.items()
        if (content := _rendered(svg, renderers, icons.own_names[key])) is not None
    ]


def _of_svgs(folder: Path, renderers: Renderers, name_of: Callable[[str], str]) -> list[Drawing]:
    """SVGs at any depth. A text file beside one, NAME.txt, has its name in the first line."""
    found = []
    for file in files_below(folder):
        if file.suffix.lower() != ".svg":
            continue
        caption = file.with_suffix(".txt")
        try:
            svg = utf8_text(read_file(file, MAX_TEXT_BYTES))
            said = utf8_text(read_file(caption, MAX_TEXT_BYTES)) if caption.is_file() else ""
        except (OSError, ValueError) as error:
            _log.warning(
                "%s is left out (%s); mend it, or replace it by a whole copy",
                printable(file.name),
                error,
            )
            continue
        content = _rendered(svg, renderers, printable(file.stem))
        if content is not None:
            name = said.strip().partition("\n")[0].strip()
            found.append(Drawing(name or name_of(file.name), ".png", content))
    return found


def _rendered(svg: str, renderers: Renderers, name: str) -> bytes | None:
    """A drawing as PNG; None, with a warning, where it cannot be rendered."""
    try:
        image = renderers.render(svg)
    except UnusableSvg as error:
        _log.warning("the drawing of %s is left out (%s); save it as a plain SVG", name, error)
        return None
    png = io.BytesIO()
    Image.fromarray(image).save(png, "PNG")
    return png.getvalue()


def _images(path: Path, size: int, name_of: Callable[[str], str]) -> list[Drawing]:
    config = DataConfig(source=str(path), image_size=size, upscale=True, split_column="none")
    rows = find_rows(config, require_captions=False)
    read = SourceIndex(rows, config, require_captions=False)
    for problem in read.problems:
        _log.warning("%s", problem)
    return [
        Drawing(
            # One line, which is one caption in the file that is written.
            " ".join(read.captions[row][0].split())
            if read.captions[row]
            else name_of(rows.label(row)),
            Path(rows.label(row)).suffix.lower(),
            rows.image(row),
        )
        for row in sorted(np.concatenate(list(read.kept.values())).tolist())
    ]


def _terms_of(path: Path, style: str) -> dict[str, str | None]:
    """`IconSet.terms` under the new style's name."""
    return {"style": style, **read_terms(path)}


def _name_of(drawings: Path) -> str:
    """What a set of drawings is called: its folder, or its file without the ending."""
    if drawings.name == "icons.json":
        return drawings.parent.name
    return drawings.name if drawings.is_dir() else drawings.stem


def _checked_style(given: str) -> str:
    """A style's name as captions write it."""
    style = re.sub(r"[_ ]+", "-", given.strip().lower())
    if re.fullmatch(r"[a-z0-9][a-z0-9-]{0,39}", style) is None:
        raise ValueError(
            f"the style is called {given!r}; give a name of letters, digits and hyphens, by the "
            "option style"
        )
    return style


def _values(bundle: Path, parent: Bundle, style: str) -> dict[str, Any]:
    """The settings of the experiment, with a learning rate, steps and a rank for few drawings."""
    return {
        "name": style,
        "data": {"source": "style", "upscale": True},
        "tokenizer": {"init_from": str(bundle), "frozen": True},
        "text": {"num_new_tokens": _new_tokens(parent.text, style)},
        "prior": {
            "init_from": str(bundle),
            "lora_rank": 16,
            "lora_alpha": 32.0,
            "objective": {"code_corruption": 0.1, "text_weight": 0.0},
            "train": {
                "steps": 120,
                "batch_size": 32,
                "optimizer": "adamw",
                "learning_rate": 3e-4,
                "warmup_steps": 20,
                "eval_every": 20,
                "save_best": True,  # few drawings are soon learned by heart
                "save_every": 60,
            },
        },
        "sampling": asdict(parent.defaults),
    }


def _new_tokens(text: TextTokenizer, style: str) -> int:
    """Merges that make each word of the style's name one token, behind a space and at the start."""
    count = 0
    for before, caption in (("a", f"a {style}"), ("", style)):
        try:
            words = len(text.words(caption)) - len(text.words(before))
        except ValueError:  # no BPE that can be extended; pieces of the old vocabulary spell it
            return 0
        shorter, longer = text.lengths([before, caption])
        count += max(longer - shorter - words, 0)
    return count


def _write(
    folder: Path, drawings: Sequence[Drawing], style: str, terms: dict[str, str | None]
) -> None:
    """The drawings, each with a file of captions, one in ten of them in the folder of held-out
    ones. What an earlier call wrote stays, where it is the same."""
    files = {_TERMS: json.dumps(terms).encode()}
    for number, drawing in enumerate(drawings):
        split = "valid" if number % _HELD_OUT == MIN_DRAWINGS - 1 else "train"
        stem = f"{split}/{number:05d}"
        files[f"{stem}{drawing.suffix}"] = drawing.content
        files[f"{stem}.txt"] = "\n".join(styled_captions(drawing.name, style)).encode()
    if folder.is_dir():
        there = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        if there == files:
            return
        raise ValueError(
            f"{folder} has other drawings, of an earlier run of this name; choose another name"
        )

    def write(beside: Path) -> None:
        for name, content in files.items():
            (beside / name).parent.mkdir(exist_ok=True, parents=True)
            (beside / name).write_bytes(content)

    atomic_write_dir(folder, write)
