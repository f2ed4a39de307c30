"""Premultiplied colours <-> straight ones, and images on a background. Knows arrays and PIL images;
no tensors and no files.

Arrays of four channels are premultiplied everywhere in these packages: a colour times its alpha, so
that transparent pixels have one value and linear filters are right. PIL images of mode RGBA are
straight (Porter & Duff 1984, "Compositing digital images").

Legend: H W pixels.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

Colour = tuple[int, int, int]
"""Red, green and blue in 0..255."""
WHITE: Colour = (255, 255, 255)


def premultiplied(straight: np.ndarray) -> np.ndarray:
    """Straight uint8 (...,4) -> premultiplied, each colour rounded to the nearest value."""
    alpha = straight[..., 3:]
    return np.concatenate([_times(straight[..., :3], alpha), alpha], axis=-1)


def _times(values: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """values * alpha / 255 of uint8, rounded to the nearest value; in 16 bits, since images may be
    large."""
    product = values.astype(np.uint16) * alpha + np.uint16(128)
    return ((product + (product >> 8)) >> 8).astype(np.uint8)


def straightened(images: np.ndarray) -> np.ndarray:
    """Premultiplied uint8 (...,4) -> straight, from which `premultiplied` returns the same values.
    Colours above their alpha are cut to it, and those of transparent pixels become black."""
    alpha = images[..., 3:].astype(np.uint32)
    colours = (510 * np.minimum(images[..., :3], alpha) + alpha) // np.maximum(2 * alpha, 1)
    return np.concatenate([colours.astype(np.uint8), images[..., 3:]], axis=-1)


def on_background(images: np.ndarray, background: Colour | np.ndarray = WHITE) -> np.ndarray:
    """Premultiplied uint8 (...,4) laid on a colour, or on an opaque image (...,3) -> (...,3).
    Images of other channels come back as they are."""
    if images.shape[-1] != 4:
        return images
    alpha = images[..., 3:]
    below = _times(np.asarray(background, np.uint8), 255 - alpha)
    return np.minimum(images[..., :3], alpha) + below


def from_white(images: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Premultiplied uint8 (...,4) of images on white (...,3) whose alpha (...,1) is known; the
    inverse of `on_background`."""
    colours = images.astype(np.int32) - 255 + alpha
    return np.concatenate([colours.clip(0, alpha).astype(np.uint8), alpha], axis=-1)


def with_alpha(images: np.ndarray) -> np.ndarray:
    """Opaque uint8 (...,3) -> (...,4)."""
    return np.concatenate([images, np.full_like(images[..., :1], 255)], axis=-1)


def as_filterable(images: np.ndarray) -> Image.Image:
    """One image uint8 (H,W,3), or (H,W,4) premultiplied, as a PIL image whose channels are filtered
    as they are. Of mode RGBA, Pillow would premultiply them once more."""
    if images.shape[-1] != 4:
        return Image.fromarray(np.ascontiguousarray(images))
    height, width = images.shape[:2]
    return Image.frombytes("RGBa", (width, height), images.tobytes())


def filtered(image: Image.Image) -> np.ndarray:
    """The array of an image of `as_filterable` after filtering. Filters overshoot, so colours are
    cut to their alpha."""
    values = np.array(image)
    if values.shape[-1] == 4:
        np.minimum(values[..., :3], values[..., 3:], out=values[..., :3])
    return values
