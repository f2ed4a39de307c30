"""What becomes of transparent pixels: `data.alpha`. Knows arrays; reads no files."""

from __future__ import annotations

import numpy as np

from pipeline.config.data import background


def composed(image: np.ndarray, alpha: str) -> np.ndarray:
    """An image (H,W,4) uint8, not premultiplied, as `data.alpha` asks: itself with `keep`, or laid
    on a background, (H,W,3)."""
    colour = background(alpha)
    if colour is None:
        return image
    share = image[..., 3:].astype(np.float32) / 255
    mixed = image[..., :3] * share + np.array(colour, np.float32) * (1 - share)
    return (mixed + 0.5).astype(np.uint8)
