"""Images with more than 8 bits per value, as their files have them. Knows Pillow's raw modes; knows
no sources and no ranges.

Pillow has no mode for 16-bit colour and drops the lower byte of each value. Reading such a file
once as it is and once with the bytes of each value swapped gives both bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from stage1_tokenizer.value_range import ValueRange

Depth = Literal["8bit", "integers", "floats"]
"""8 bits per value, more, or floats."""
_COLOURS = ("RGB", "RGBA", "RGBX", "LA")
_ROWS = 256
"""Rows that are copied at a time."""
_SWAPPED = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
"""Orders of two bytes, and the other one of each; N is the machine's own."""


def depth_of(image: Image.Image) -> Depth:
    """The kind of values of an image that is not yet decoded."""
    if image.mode == "F":
        return "floats"
    return "integers" if image.mode.startswith("I") or _colour(image) else "8bit"


def mode_of(image: Image.Image) -> str:
    """Pillow's mode of an image that is not yet decoded, with `;16` for 16-bit colour."""
    return f"{image.mode};16" if _colour(image) else image.mode


def deep_values(image: Image.Image, again: Callable[[], Image.Image]) -> np.ndarray:
    """The values of a deep image: (H,W), or (H,W,C) of colour or with alpha, which comes last.

    Args:
        image: not yet decoded.
        again: opens the same file once more.

    Raises:
        ValueError: some are not finite. And whatever Pillow raises.
    """
    raw = _colour(image)
    if not raw:
        values = _copied(image)
        if image.mode == "F" and not np.isfinite(values).all():
            raise ValueError("it has values that are not finite (NaN or infinity)")
        return _with_clear_colour(values, image)
    if raw.startswith("LA"):
        _set_raw_mode(image, "RGBA")  # the four bytes of grey and alpha
        both = np.asarray(image).astype(np.uint16)
        return both[..., ::2] * 256 + both[..., 1::2]
    lower = again()
    _set_raw_mode(lower, raw[:-1] + _SWAPPED[raw[-1]])
    values = _copied(image, np.uint16)
    values *= 256
    values += _copied(lower)
    return _with_clear_colour(values, image)


def _with_clear_colour(values: np.ndarray, image: Image.Image) -> np.ndarray:
    """The values with an alpha of 16 bits, where a PNG names one colour that is transparent."""
    clear = image.info.get("transparency")
    if clear is None:
        return values
    coloured = values if values.ndim == 3 else values[..., None]
    opaque = (coloured != np.array(clear)).any(axis=2, keepdims=True)
    return np.concatenate([coloured, np.where(opaque, 65535, 0).astype(values.dtype)], axis=2)


def shown(values: np.ndarray, value_range: ValueRange) -> Image.Image:
    """The values of a deep image as an image of 8 bits per value: L, LA, RGB or RGBA."""
    from stage1_tokenizer.value_range import to_8_bits  # imports torch

    has_alpha = values.ndim == 3 and values.shape[2] in (2, 4)
    if not has_alpha:
        return Image.fromarray(to_8_bits(values, value_range))
    scaled = np.concatenate(
        [to_8_bits(values[..., :-1], value_range), to_8_bits(values[..., -1:], (0, 65535))], axis=2
    )
    return Image.fromarray(scaled)


def extremes(values: np.ndarray) -> tuple[float, float]:
    """The smallest and the largest value, alpha aside."""
    if values.ndim == 3 and values.shape[2] in (2, 4):
        values = values[..., :-1]
    return float(values.min()), float(values.max())


def _copied(image: Image.Image, dtype: type[np.uint16] | None = None) -> np.ndarray:
    """The values of an image, a strip at a time: at once, Pillow copies the image three times."""
    image.load()
    width, height = image.size
    first = np.asarray(image.crop((0, 0, width, 1)))
    values = np.empty((height, *first.shape[1:]), dtype or first.dtype)
    for top in range(0, height, _ROWS):
        bottom = min(top + _ROWS, height)
        values[top:bottom] = np.asarray(image.crop((0, top, width, bottom)))
    return values


def _raw_modes(image: Image.Image) -> set[str]:
    tiles = getattr(image, "tile", ())
    return {tile[3] if isinstance(tile[3], str) else str(tile[3][0]) for tile in tiles}


def _colour(image: Image.Image) -> str:
    """The raw mode of 16-bit colour that is read whole, such as RGB;16B; '' of other images."""
    for raw in _raw_modes(image):
        colours, _, depth = raw.partition(";")
        if colours in _COLOURS and depth in ("16B", "16L", "16N"):
            return raw
    return ""


def _set_raw_mode(image: Image.Image, raw: str) -> None:
    image.tile = [  # type: ignore[attr-defined]
        tile._replace(args=raw if isinstance(tile[3], str) else (raw, *tile[3][1:]))
        for tile in image.tile  # type: ignore[attr-defined]
    ]
