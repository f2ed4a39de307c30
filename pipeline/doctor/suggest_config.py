"""Which configuration suits a source, from its sizes, its number of images and its captions.
Knows settings; reads no files.

The networks, the optimizer and the passes over the data are those of configs/emoji.yaml, the
shipped experiment on real images.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import PurePath
from typing import Any

import numpy as np

from pipeline.config.data import SYNTHETIC_SOURCES, DataConfig
from pipeline.doctor.caption_stats import fitted
from pipeline.doctor.inspect_source import Part
from pipeline.doctor.report import Suggestion
from stage2_prior.text import TextConfig

SIZES = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Powers of two, and three times one: what the factors divide."""
LARGEST = 256
"""Image size above which none is suggested unasked: codes, and so the prior's time, grow with its
square."""
_LEFT_OUT = 0.1
_CODES = ((1_000, 256), (3_000, 512), (30_000, 1024), (100_000, 2048), (1_000_000, 4096))
"""(images below which, codes): of 1,024 codes 95% were in use on 3,400 images and of 512 on a
simple world nearly all (docs/tokenizers.md); codebooks of more entries need more images to fill
them."""
_MOST_CODES = 8192
_BATCH = 32
_PASSES, _LEAST, _MOST = (
    {"tokenizer": 24, "prior": 40},
    {"tokenizer": 1000, "prior": 2000},
    {"tokenizer": 20_000, "prior": 40_000},
)
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
        data, text: the settings that were given; those that say how to read the source are kept.
        largest: image size that is suggested at most.

    Raises:
        ValueError: `text.pretrained` cannot be loaded.
    """
    if any(part.captions is None for part in parts):
        return None
    reasons = []
    size, upscale, why = _size(data, parts, largest)
    reasons.append(f"data.image_size {size}: {why}")
    own = _given(data)
    own |= {"image_size": size} | ({"upscale": True} if upscale else {})
    wanted = replace(data, image_size=size, upscale=upscale)
    masks = [part.fit_for(replace(part.config, image_size=size, upscale=upscale)) for part in parts]
    pictures = sum(int(mask.sum()) for mask in masks)
    share = _held_out(wanted, parts, masks)
    if share is None:
        return None
    if share != data.val_fraction:
        reasons.append(
            f"data.val_fraction {share:g}: with {data.val_fraction:g} one split of these few "
            "images is empty"
        )
        own["val_fraction"] = share
    factor = 4 if size < 48 else 8 if size < 256 else 16
    side = size // factor
    reasons.append(f"tokenizer.model.downsample_factor {factor}: {side}x{side} codes per image")
    world = data.source == "shapes"
    first_only = any(part.opened is not None and part.opened.first_only for part in parts)
    codes = (
        512 if world else next((codes for below, codes in _CODES if pictures < below), _MOST_CODES)
    )
    reasons.append(
        f"tokenizer.model.num_codes {codes}: for {pictures:,} images"
        + (" that were looked at" if first_only else "")
    )
    train = [
        mask & ~_held_out_of(part, mask, share) for part, mask in zip(parts, masks, strict=True)
    ]
    check = fitted(parts, masks, train, text)
    length, truncate, why = _length(check.lengths)
    reasons.append(f"text.max_length {length}: {why}")
    steps = {stage: _steps(stage, _SHAPES if world else pictures) for stage in _PASSES}
    for stage, count in steps.items():
        passes = count * _BATCH / (_SHAPES if world else pictures)
        reasons.append(
            f"{stage}.train.steps {count}: {passes:,.1f} passes over the images in batches of "
            f"{_BATCH}"
        )
    texts = {
        f.name: getattr(text, f.name) for f in fields(text) if getattr(text, f.name) != f.default
    }
    values: dict[str, Any] = {
        "name": name_of(data),
        "data": own,
        "tokenizer": {
            "model": _MODEL | {"num_codes": codes, "downsample_factor": factor},
            "train": {"steps": steps["tokenizer"]} | _TRAIN,
        },
        "text": texts | {"vocab_size": text.vocab_size, "max_length": length, "truncate": truncate},
        "prior": {
            "model": dict(_PRIOR),
            "objective": {"text_weight": 0.0, "caption_dropout": 0.1},
            "train": {"steps": steps["prior"]} | _TRAIN,
        },
        "sampling": {"guidance_scale": 1.25},
    }
    if "shapes" in data.sources:  # they are unlimited
        values["encode"] = {"max_images": _SHAPES}
    return Suggestion(values, reasons)


def name_of(data: DataConfig) -> str:
    """A name for a run on a source: that of its folder or file."""
    words = [
        word
        for part in reversed(PurePath(data.sources[0]).parts)
        if (word := re.sub(r"[^\w-]+", "-", part.split(".")[0]).strip("-"))
    ]
    return words[0] if words else "mine"


def as_yaml(suggestion: Suggestion, command: str) -> str:
    """The settings with the reasons and the command above them."""
    import yaml

    head = "\n".join(
        [
            "# Suggested by `minidalle doctor`.",
            "#",
            f"#   {command}",
            "#",
            *(f"# {reason}" for reason in suggestion.reasons),
        ]
    )
    body = yaml.safe_dump(suggestion.values, sort_keys=False, allow_unicode=True, width=120)
    return f"{head}\n{body}"


def _size(data: DataConfig, parts: Sequence[Part], largest: int) -> tuple[int, bool, str]:
    if all(source in SYNTHETIC_SOURCES for source in data.sources):
        return data.image_size, data.upscale, "drawn at any size"
    # Other filters stay as they are; of what they leave, the shorter sides decide.
    sides = []
    for part in (part for part in parts if part.config.source not in SYNTHETIC_SOURCES):
        assert part.found is not None
        any_size = replace(part.config.filter, min_size=None)
        fit = part.fit_for(replace(part.config, image_size=16, upscale=True, filter=any_size))
        sides.append(np.minimum(part.found.width, part.found.height)[fit])
    shorter = np.concatenate(sides)
    bounds = [
        largest,
        *([data.filter.max_size] if data.filter.max_size else []),
        *([data.filter.min_size] if data.filter.min_size and not data.upscale else []),
    ]
    least = 32 if "shapes" in data.sources else 16
    cells = data.shapes.grid_cells
    sizes = [
        size for size in SIZES if least <= size <= min(bounds) and not (cells and size % cells)
    ]
    sizes = sizes or [data.image_size]
    for size in reversed(sizes):
        small = float((shorter < size).mean()) if len(shorter) else 1.0
        if small <= _LEFT_OUT:
            left = f"{small:.1%} of the images are smaller"
            return (
                size,
                data.upscale,
                left
                + (
                    f"; larger ones than {largest} by --max-image-size"
                    if size == sizes[-1] == largest
                    else ""
                ),
            )
    return sizes[0], True, "most images are smaller, and are enlarged"


def _given(data: DataConfig) -> dict[str, Any]:
    """The settings of data that were given, as plain values."""
    default = DataConfig(source=data.sources[0])
    given = {"source": data.source} | _changed(asdict(data), asdict(default))
    if data.mix:
        given["mix"] = [
            {name: value for name, value in part.items() if value is not None}
            for part in given["mix"]
        ]
        del given["source"]
    return given


def _changed(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """What differs from the defaults, of sections too."""
    return {
        name: _changed(value, defaults[name]) if isinstance(value, dict) else value
        for name, value in values.items()
        if value != defaults[name]
    }


def _held_out(data: DataConfig, parts: Sequence[Part], masks: Sequence[np.ndarray]) -> float | None:
    """The share that was given, or the next larger one with which no split is empty."""
    for share in (
        data.val_fraction,
        *(s for s in (0.05, 0.1, 0.2, 0.3, 0.5) if s != data.val_fraction),
    ):
        held_out = [
            int(_held_out_of(part, mask, share).sum())
            for part, mask in zip(parts, masks, strict=True)
        ]
        if any(held_out) and all(
            int(mask.sum()) > back for mask, back in zip(masks, held_out, strict=True)
        ):
            return share
    return None


def _held_out_of(part: Part, mask: np.ndarray, share: float) -> np.ndarray:
    """Which rows of a part a share keeps from training (N)."""
    assert part.opened is not None
    held_out = np.zeros(len(mask), bool)
    for row in np.flatnonzero(mask):
        held_out[row] = part.opened.held_out(int(row), share)
    return held_out


def _length(lengths: np.ndarray) -> tuple[int, bool, str]:
    """The longest caption rounded up; where few are far longer than the rest, the 99th
    percentile."""
    longest, most = int(lengths.max()), int(np.percentile(lengths, 99))
    whole, usual = (-(-length // 8) * 8 for length in (longest, most))
    if whole > 2 * usual:
        return (
            usual,
            True,
            f"99% of the captions need at most {most} slots; the longest, of {longest}, are cut",
        )
    return whole, False, f"the longest caption needs {longest} slots"


def _steps(stage: str, pictures: int) -> int:
    a_pass = pictures / _BATCH
    steps = min(max(_PASSES[stage] * a_pass, _LEAST[stage]), max(_MOST[stage], a_pass))
    return -(-int(steps) // 100) * 100
