"""What becomes of transparent pixels: `data.alpha`. Knows arrays; reads no files."""

from __future__ import annotations

import numpy as np

from pipeline.config.data import background


def composed(image: np.ndarray, alpha: str) -> np.ndarray:
    """A straight image (H,W,4) uint8 as `data.alpha` asks: premultiplied with `keep`, or laid on a
    background, (H,W,3)."""
    from stage1_tokenizer.transparency import on_background, premultiplied  # imports torch

    colour = background(alpha)
    own = premultiplied(image)
    return own if colour is None else on_background(own, colour)


def as_channels(images: np.ndarray, alpha: str) -> np.ndarray:
    """Opaque images (...,3) uint8 in the channels of `data.alpha`: (...,4) with `keep`."""
    from stage1_tokenizer.transparency import with_alpha  # imports torch

    return with_alpha(images) if background(alpha) is None else images
