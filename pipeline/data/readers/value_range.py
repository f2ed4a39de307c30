"""One range of values for all images of a source: which value is shown black, and which white.
Knows what a scan found; opens no files."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np

from pipeline.config.data import DataConfig
from pipeline.data.readers.base import Rows
from pipeline.data.readers.scan import ScanResult

_BLACK = 16
"""Brightest value of 0..255 below which an image is nearly black."""
_WHITE = 239
"""Darkest value of 0..255 above which an image is nearly white."""
_log = logging.getLogger(__name__)


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


def deep_values(found: ScanResult) -> DeepValues | None:
    """What a scan found of images with more than 8 bits per value; None where there are none."""
    from stage1_tokenizer.value_range import possible_ranges  # imports torch

    rows = np.flatnonzero([depth not in ("", "8bit") for depth in found.depth])
    if not len(rows):
        return None
    low = float(found.low[rows].min())
    high = float(found.high[rows].max())
    kinds = sorted({found.depth[row] for row in rows})
    ranges = possible_ranges(low, high, floats=kinds == ["floats"]) if len(kinds) == 1 else []
    return DeepValues(rows, low, high, kinds, ranges)


def with_value_range(config: DataConfig, rows: Rows, found: ScanResult) -> DataConfig:
    """The configuration with the range of the source's values in place of `auto`. Logs it.

    Raises:
        ValueError: the values leave doubt, or nearly all images would be black or white.
    """
    deep = deep_values(found)
    if deep is not None:
        if config.value_range == "auto":
            config = replace(config, value_range=_certain(config, rows, deep))
        _log.info("%s: %s", rows.name, values_report(config, found))
    if problem := dark_or_bright(config, rows, found):
        raise ValueError(problem)
    return config


def values_report(config: DataConfig, found: ScanResult) -> str:
    """The values of images with more than 8 bits, and what becomes of them; '' without such
    images."""
    deep = deep_values(found)
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


def dark_or_bright(config: DataConfig, rows: Rows, found: ScanResult) -> str:
    """What is wrong where more than half of the images would be nearly black, or more than half of
    those with more than 8 bits nearly white; '' where neither is so."""
    readable = np.array([bool(depth) for depth in found.depth], bool)
    deep = np.array([depth not in ("", "8bit") for depth in found.depth], bool)
    low, high = config.values or (0.0, 255.0)
    scale = np.where(deep, 255 / (high - low), 1.0)
    offset = np.where(deep, low, 0.0)
    black = readable & ((found.high - offset) * scale < _BLACK)
    white = deep & ((found.low - offset) * scale > _WHITE)
    for which, of, name in ((black, readable, "black"), (white, deep, "white")):
        if of.any() and which.sum() > of.sum() / 2:
            first = int(np.flatnonzero(which)[0])
            remedy = (
                f"choose another data.value_range (now {_shown(config)})"
                if deep[first]
                else "scale their values to 0..255 first"
            )
            return (
                f"{rows.name}: {int(which.sum()):,} of {int(of.sum()):,} images are nearly {name} "
                f"(first {rows.label(first)}, whose values are {found.low[first]:g} to "
                f"{found.high[first]:g}); {remedy}"
            )
    return ""


def _shown(config: DataConfig) -> str:
    given = config.value_range
    return given if isinstance(given, str) else f"[{given[0]:g}, {given[1]:g}]"
