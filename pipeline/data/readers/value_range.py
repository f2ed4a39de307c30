"""One range of values for all images of a source: which value is shown black, and which white.
Knows what a scan found; opens no files."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from pipeline.config.data import DataConfig
from pipeline.data.readers.base import Rows
from pipeline.data.readers.scan import ScanResult

_BLACK = 16
"""Brightest value of 0..255 below which an image is nearly black."""
_WHITE = 239
"""Darkest value of 0..255 above which an image is nearly white."""


@dataclass(frozen=True)
class DeepValues:
    """The images of a source with more than 8 bits per value.

    Attributes:
        rows: of them (N).
        low, high: the smallest and largest value of all of them.
        kinds: `integers`, `floats`, or both.
        ranges: what their values may have been made for (`possible_ranges`).
    """

    rows: np.ndarray
    low: float
    high: float
    kinds: list[str]
    ranges: list[str]

    @property
    def said(self) -> str:
        """Their number and values, in words."""
        return (
            f"{len(self.rows):,} images have more than 8 bits per value ({' and '.join(self.kinds)}"
            f" from {self.low:g} to {self.high:g})"
        )


def deep_images(found: ScanResult) -> DeepValues | None:
    """What a scan found of images with more than 8 bits per value; None where there are none."""
    rows = np.flatnonzero([depth not in ("", "8bit") for depth in found.depth])
    if not len(rows):
        return None
    from stage1_tokenizer.value_range import possible_ranges  # imports torch

    low = float(found.low[rows].min())
    high = float(found.high[rows].max())
    kinds = sorted({found.depth[row] for row in rows})
    ranges = possible_ranges(low, high, floats=kinds == ["floats"]) if len(kinds) == 1 else []
    return DeepValues(rows, low, high, kinds, ranges)


def with_value_range(config: DataConfig, rows: Rows, found: ScanResult) -> DataConfig:
    """The configuration with the range of the source's values in place of `auto`.

    Raises:
        ValueError: the values leave doubt, or most of these images would be nearly black or white.
    """
    deep = deep_images(found)
    if deep is None:
        return config
    asked = config.value_range != "auto"
    if not asked:
        config = replace(config, value_range=_certain(config, rows, deep))
    _refuse_dark_or_bright(config, rows, found, asked=asked)
    return config


def values_report(config: DataConfig, found: ScanResult) -> str:
    """The values of images with more than 8 bits, and what becomes of them; '' without such
    images."""
    deep = deep_images(found)
    if deep is None:
        return ""
    if config.values is None:
        return f"{deep.said}; which of them is white is not known (data.value_range)"
    return (
        f"{deep.said}; {config.values[0]:g} is shown black and {config.values[1]:g} white "
        "(data.value_range)"
    )


def _certain(config: DataConfig, rows: Rows, deep: DeepValues) -> list[float]:
    """The one range that is possible."""
    from stage1_tokenizer.value_range import NAMED_RANGES  # imports torch

    # The rest of a stream may have other values.
    if len(deep.ranges) == 1 and not config.streaming:
        name = deep.ranges[0]
        return [0.0, 1.0] if name == "[0, 1]" else list(NAMED_RANGES[name])
    given = " or ".join(deep.ranges) or f"[low, high], such as [{deep.low:g}, {deep.high:g}]"
    raise ValueError(
        f"{rows.name}: {deep.said}, first {rows.label(int(deep.rows[0]))}, and which value is "
        f"white is not known; set data.value_range: {given}"
    )


def dark_images(found: ScanResult, rows: Rows) -> str:
    """What is wrong where more than half of the images of 8 bits per value are nearly black; ''
    where it is not so."""
    plain = np.array([depth == "8bit" for depth in found.depth], bool)
    dark = np.flatnonzero(plain & (found.high < _BLACK))
    if not plain.any() or len(dark) <= plain.sum() / 2:
        return ""
    return (
        f"{rows.name}: {len(dark):,} of {int(plain.sum()):,} images of 8 bits per value are nearly "
        f"black (first {rows.label(int(dark[0]))}, whose values end at {found.high[dark[0]]:g}); "
        "scale their values to 0..255 first"
    )


def _refuse_dark_or_bright(
    config: DataConfig, rows: Rows, found: ScanResult, *, asked: bool
) -> None:
    """Raises ValueError where more than half of the images with more than 8 bits would be nearly
    black, or nearly white by a range that was asked for."""
    deep = np.flatnonzero([depth not in ("", "8bit") for depth in found.depth])
    assert config.values is not None
    low, high = config.values
    darkest = (found.low[deep] - low) / (high - low) * 255
    brightest = (found.high[deep] - low) / (high - low) * 255
    for which, name in ((brightest < _BLACK, "black"), (asked & (darkest > _WHITE), "white")):
        if which.sum() > len(deep) / 2:
            first = int(deep[np.flatnonzero(which)[0]])
            raise ValueError(
                f"{rows.name}: with {low:g} shown black and {high:g} white, {int(which.sum()):,} "
                f"of {len(deep):,} images with more than 8 bits per value are nearly {name} (first "
                f"{rows.label(first)}, whose values are {found.low[first]:g} to "
                f"{found.high[first]:g}); choose another data.value_range, such as 12bit or "
                "[low, high]"
            )
