"""Values of images with more than 8 bits per value -> 8 bits. Knows arrays and ranges; opens no
files.

A file says how many bits its values have room for, and not which range they use: 12-bit scans lie
in 16-bit files, and floats in 0..1 or 0..255. A range is the value shown black and the value shown
white.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

ValueRange = tuple[float, float]
NAMED_RANGES: dict[str, ValueRange] = {
    f"{bits}bit": (0.0, 2.0**bits - 1) for bits in (8, 10, 12, 14, 16)
}
_ROWS = 256
"""Rows that are scaled at a time, so that a large image needs little more memory."""


def is_deep(mode: str) -> bool:
    """Whether images of a mode of PIL have more than 8 bits per value."""
    return mode.startswith("I") or mode == "F"


def possible_ranges(low: float, high: float, *, floats: bool) -> list[str]:
    """The ranges that values from `low` to `high` may have been made for, as `data.value_range`
    names them. Of one, there is no doubt; of none, nothing usual fits.

    A range of integers is possible where some value exceeds the next smaller one that is usual, and
    the range is not four times as large as needed.
    """
    if low < 0:
        return []
    if floats:
        unit = ["[0, 1]"] if 0.1 < high <= 1 else []
        return unit or (["8bit"] if 16 < high <= 255 else [])
    for least, most, names in (
        (0, 255, ["8bit", "12bit", "16bit"]),
        (255, 1023, ["10bit", "12bit"]),
        (1023, 4095, ["12bit"]),
        (4095, 16383, ["14bit", "16bit"]),
        (16383, 65535, ["16bit"]),
    ):
        if least < high <= most:
            return names
    return []


def to_8_bits(values: np.ndarray, value_range: ValueRange) -> np.ndarray:
    """Values (H,...) of any type -> uint8 of the same shape: the range's ends become 0 and 255, and
    what lies beyond is clipped."""
    low, high = value_range
    result = np.empty(values.shape, np.uint8)
    for first in range(0, len(values), _ROWS):
        part = values[first : first + _ROWS].astype(np.float64)
        result[first : first + _ROWS] = (
            ((part - low) / (high - low) * 255).clip(0, 255).round().astype(np.uint8)
        )
    return result


def check_range(value_range: ValueRange) -> None:
    """Raises ValueError unless the first value is below the second, and both are finite."""
    low, high = value_range
    if not (np.isfinite([low, high]).all() and low < high):
        raise ValueError(
            f"the value range is [{low:g}, {high:g}]; it must be two finite numbers, the one shown "
            "black and then the larger one shown white"
        )


def reduced(image: Image.Image, value_range: ValueRange | None = None) -> Image.Image:
    """A PIL image with at most 8 bits per value; others are scaled by `value_range`.

    Without a range, integers beyond 14 bits are taken as 16-bit, and floats in 0..255 as they are.

    Raises:
        ValueError: the range is in doubt, or the image has values that are not finite.
    """
    if not is_deep(image.mode):
        return image
    values = np.asarray(image)
    floats = image.mode == "F"
    if floats and not np.isfinite(values).all():
        raise ValueError(
            "the image has values that are not finite (NaN or infinity); replace them first"
        )
    if value_range is None:
        low = float(values.min())
        high = float(values.max())
        ranges = possible_ranges(low, high, floats=floats)
        if ranges not in (["16bit"], ["8bit"]):
            raise ValueError(
                f"the image has mode {image.mode} and values from {low:g} to {high:g}, and which "
                "of them is white is not known; scale it to 8 bits first, such as by "
                "stage1_tokenizer.to_rgb(image, value_range=(0, 4095)) for 12 bits"
            )
        value_range = NAMED_RANGES[ranges[0]]
    check_range(value_range)
    return Image.fromarray(to_8_bits(values, value_range))
