"""Which configuration suits a source, from its sizes, its number of images and its captions.
Knows settings; reads no files.

The networks, the optimizer and the passes over the data are those of configs/emoji.yaml, the
shipped experiment on real images.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import PurePath
from typing import TYPE_CHECKING

import numpy as np
import yaml

from pipeline.config.data import SYNTHETIC_SOURCES, DataConfig, as_setting
from pipeline.data.readers.base import Rows, held_out_of
from pipeline.doctor.caption_stats import count_tokens
from pipeline.doctor.inspect_source import Part
from pipeline.doctor.report import Suggestion
from stage2_prior.text import TextConfig

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SIZES = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Powers of two, and three times one: what the factors divide."""
LARGEST = 256
"""Largest image size that is suggested by default: the number of codes, and so the prior's time,
grows with its square."""
_LEFT_OUT = 0.1
_TRANSPARENT = 0.25
"""Fraction of images with transparency from which on it is kept."""
_CODES = ((1_000, 256), (3_000, 512), (30_000, 1024), (100_000, 2048), (1_000_000, 4096))
"""(images below which, codes). 3,400 images used 95% of 1,024 codes, and a simple world nearly all
of 512 (docs/tokenizers.md). A larger codebook needs more images."""
_MOST_CODES = 8192
_BATCH = 32
_STEPS = {"tokenizer": (24, 1000, 20_000), "prior": (40, 2000, 40_000)}
"""Passes over the images, as in configs/emoji.yaml; fewest steps; and steps beyond which one pass
is enough."""
_SHAPES = 60_000
"""Images of the shapes to encode, as in configs/shapes.yaml."""
_MODEL = {
    "quantizer": "vq",
    "width": 128,
    "encoder_depth": 2,
    "encoder_kernel": 3,
    "decoder_depth": 3,
}
_PRIOR = {"width": 192, "depth": 6, "heads": 3}
_TRAIN = {"batch_size": _BATCH, "optimizer": "muon", "learning_rate": 8e-3, "ema_decay": 0.995}


def suggest(
    data: DataConfig, text: TextConfig, parts: Sequence[Part], largest: int = LARGEST
) -> Suggestion | None:
    """A configuration that trains on what `parts` found; None where there are not two usable
    images, or no captions.

    Args:
        data, text: the given settings; those on how to read the source are kept.
        largest: largest image size to suggest.

    Raises:
        ValueError: `text.pretrained` cannot be loaded.
    """
    if any(part.captions is None for part in parts):
        return None
    size, upscale, why_size = _size(data, parts, largest)
    masks = [part.fit_for(replace(part.config, image_size=size, upscale=upscale)) for part in parts]
    val_fraction = _val_fraction(data.val_fraction, parts, masks)
    if val_fraction is None:
        return None
    images = sum(int(mask.sum()) for mask in masks)
    first_only = any(part.opened is not None and part.opened.first_only for part in parts)
    world = data.source == "shapes"
    per_pass = _SHAPES if world else images
    factor = _factor(size)
    codes = 512 if world else next((n for below, n in _CODES if images < below), _MOST_CODES)
    train = [
        mask & ~held_out_of(_rows(part), mask, val_fraction)
        for part, mask in zip(parts, masks, strict=True)
    ]
    length, truncate, why_length = _length(count_tokens(parts, masks, train, text).lengths)
    steps = {stage: _steps(stage, per_pass) for stage in _STEPS}

    own = _changed(data) | {"image_size": as_setting(size)}
    reasons = [f"data.image_size {as_setting(size)}: {why_size}"]
    if upscale:
        own["upscale"] = True
    if val_fraction != data.val_fraction:
        own["val_fraction"] = val_fraction
        reasons.append(
            f"data.val_fraction {val_fraction:g}: with {data.val_fraction:g} one split of these "
            "few images is empty"
        )
    transparent = _transparent(parts, masks)
    if data.alpha == "white" and transparent >= _TRANSPARENT:
        own["alpha"] = "keep"
        reasons.append(
            f"data.alpha keep, tokenizer.model.channels 4: {transparent:.1%} of the images have "
            "transparency"
        )
    grid = f"{size[0] // factor}x{size[1] // factor}"
    reasons += [
        f"tokenizer.model.downsample_factor {factor}: {grid} codes per image",
        f"tokenizer.model.num_codes {codes}: for {images:,} images"
        + " that were looked at" * first_only,
        f"text.max_length {length}: {why_length}",
    ]
    for stage, count in steps.items():
        reasons.append(
            f"{stage}.train.steps {count}: {count * _BATCH / per_pass:,.1f} passes over the images "
            f"in batches of {_BATCH}"
        )
    model = {"num_codes": codes, "downsample_factor": factor}
    if own.get("alpha") == "keep":
        model["channels"] = 4
    slots = {"vocab_size": text.vocab_size, "max_length": length, "truncate": truncate}
    values = {"name": name_of(data), "data": own} | _settings(model, _changed(text) | slots, steps)
    if "shapes" in data.sources:  # they are unlimited
        values["encode"] = {"max_images": _SHAPES}
    return Suggestion(values, reasons)


def _transparent(parts: Sequence[Part], masks: Sequence[np.ndarray]) -> float:
    """The fraction of usable images that have transparency."""
    found = [
        part.found.transparent[mask]
        for part, mask in zip(parts, masks, strict=True)
        if part.found is not None
    ]
    return float(np.concatenate(found).mean()) if found else 0.0


def _settings(
    model: dict[str, int], text: dict[str, object], steps: dict[str, int]
) -> dict[str, object]:
    """The sections of both stages and of sampling."""
    return {
        "tokenizer": {"model": _MODEL | model, "train": {"steps": steps["tokenizer"]} | _TRAIN},
        "text": text,
        "prior": {
            "model": dict(_PRIOR),
            "objective": {"text_weight": 0.0, "caption_dropout": 0.1},
            "train": {"steps": steps["prior"]} | _TRAIN,
        },
        "sampling": {"guidance_scale": 1.25},
    }


def name_of(data: DataConfig) -> str:
    """A name for a run on a source: that of its folder or file."""
    for part in reversed(PurePath(data.sources[0]).parts):
        if word := re.sub(r"[^\w-]+", "-", part.split(".")[0]).strip("-"):
            return word
    return "mine"


def as_yaml(suggestion: Suggestion, command: str) -> str:
    """The settings with the reasons and the command above them."""
    lines = ["Suggested by `minidalle doctor`.", "", f"  {command}", "", *suggestion.reasons]
    head = "".join(f"# {line}".rstrip() + "\n" for line in lines)
    return head + yaml.safe_dump(suggestion.values, sort_keys=False, allow_unicode=True, width=120)


def _factor(size: tuple[int, int]) -> int:
    """Pixels a code covers along each axis, for images of a height and a width: fewer where these
    are few, and a divisor of both."""
    shorter = min(size)
    factor = 4 if shorter < 48 else 8 if shorter < 256 else 16
    while factor > 1 and any(side % factor for side in size):
        factor //= 2
    return factor


def _size(
    data: DataConfig, parts: Sequence[Part], largest: int
) -> tuple[tuple[int, int], bool, str]:
    """Height and width of an image, whether smaller images are enlarged, and why."""
    if all(source in SYNTHETIC_SOURCES for source in data.sources):
        return data.size, data.upscale, "rendered at any size"
    # Other filters stay as they are; of what they leave, the shorter sides decide.
    sides = []
    uncovered = []
    for part in parts:
        if part.config.source not in SYNTHETIC_SOURCES:
            assert part.found is not None
            any_size = replace(part.config.filter, min_size=None)
            fit = part.fit_for(replace(part.config, image_size=16, upscale=True, filter=any_size))
            height = part.found.height[fit]
            width = part.found.width[fit]
            sides.append(np.minimum(width, height))
            uncovered.append((height < data.size[0]) | (width < data.size[1]))
    if data.size[0] != data.size[1]:
        small = float(np.concatenate(uncovered).mean())
        why = f"the shape that was given; {small:.1%} of the images are smaller"
        return data.size, data.upscale or small > _LEFT_OUT, why
    shorter = np.concatenate(sides)
    bounds = [largest]
    if data.filter.max_size:
        bounds.append(data.filter.max_size)
    if data.filter.min_size and not data.upscale:
        bounds.append(data.filter.min_size)
    least = 32 if "shapes" in data.sources else 16
    cells = data.shapes.grid_cells
    sizes = [
        size for size in SIZES if least <= size <= min(bounds) and not (cells and size % cells)
    ] or [data.size[0]]
    for size in reversed(sizes):
        small = float((shorter < size).mean()) if len(shorter) else 1.0
        if small <= _LEFT_OUT:
            why = f"{small:.1%} of the images are smaller"
            if size == sizes[-1] == largest:
                why += f"; larger ones than {largest} by max_image_size"
            return (size, size), data.upscale, why
    return (sizes[0], sizes[0]), True, "most images are smaller, and are enlarged"


def _changed(config: DataclassInstance) -> dict[str, object]:
    """The settings that differ from their defaults, as plain values; those of sections too."""
    changed: dict[str, object] = {}
    for option in fields(config):
        value = getattr(config, option.name)
        if is_dataclass(value) and not isinstance(value, type):
            if section := _changed(value):
                changed[option.name] = section
        elif value not in (option.default, []):
            is_mix = option.name == "mix"
            changed[option.name] = [_changed(part) for part in value] if is_mix else value
    return changed


def _val_fraction(given: float, parts: Sequence[Part], masks: Sequence[np.ndarray]) -> float | None:
    """The fraction that was given, or the first of others with which no split is empty."""
    for fraction in (given, 0.05, 0.1, 0.2, 0.3, 0.5):
        held_out = [
            int((mask & held_out_of(_rows(part), mask, fraction)).sum())
            for part, mask in zip(parts, masks, strict=True)
        ]
        if any(held_out) and all(
            int(mask.sum()) > count for mask, count in zip(masks, held_out, strict=True)
        ):
            return fraction
    return None


def _rows(part: Part) -> Rows:
    assert part.opened is not None
    return part.opened.rows


def _length(lengths: np.ndarray) -> tuple[int, bool, str]:
    """Text slots, whether longer captions are cut, and why: the longest caption rounded up; where
    few are far longer than the rest, the 99th percentile."""
    longest = int(lengths.max())
    most = int(np.percentile(lengths, 99))
    whole, usual = (-(-length // 8) * 8 for length in (longest, most))
    if whole > 2 * usual:
        why = f"99% of the captions need at most {most} slots; the longest, of {longest}, are cut"
        return usual, True, why
    return whole, False, f"the longest caption needs {longest} slots"


def _steps(stage: str, images: int) -> int:
    passes, fewest, enough = _STEPS[stage]
    per_pass = images / _BATCH
    steps = min(max(passes * per_pass, fewest), max(enough, per_pass))
    return -(-int(steps) // 100) * 100
