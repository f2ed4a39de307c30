"""Which style of a bundle a few drawings look most like. Knows images and names; trains nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pipeline.data.builtin.icon_captions import styled_captions
from pipeline.inference.pipeline import TextToImagePipeline
from stage1_tokenizer.pixels import image_array
from stage1_tokenizer.transparency import on_background

MOST_DRAWINGS = 24
"""How many to compare: more would take longer, and hardly change what is nearest."""


def nearest_style(bundle: Path, drawings: Mapping[str, np.ndarray], styles: Sequence[str]) -> str:
    """The style in which the bundle draws these names most like the drawings: the lowest mean
    squared error over pixels on white, of one image per name, seed 0.

    Args:
        drawings: by name, (S,S,3) or premultiplied (S,S,4) uint8 of the bundle's size.
    """
    names = list(drawings)
    targets = on_background(np.stack(list(drawings.values()))).astype(np.float32)
    pipe = TextToImagePipeline.from_pretrained(bundle)

    def error(style: str) -> float:
        drawn = pipe([styled_captions(name, style)[0] for name in names], truncate=True).images
        images = on_background(np.stack([image_array(image) for image in drawn]))
        return float(np.square(images - targets).mean())

    return min(styles, key=error)
