"""Numbers as heat maps beside an image, with a scale. Knows arrays; reads no files.

Legend: h w grid of numbers, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.runtime.checkerboard import on_checkerboard

_ANCHORS = np.array(
    [(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], dtype=np.float64
)
"""Colours of 0, 1/4, ... 1: matplotlib's inferno, dark to bright."""
_SIDE = 256
"""Least side of a panel in pixels."""
_GAP = 12
_LINE = 22
"""Height of a line of text."""
_BAR = 12
"""Height of a scale."""


def colours(values: np.ndarray) -> np.ndarray:
    """Numbers in 0..1 (h,w) -> uint8 (h,w,3), dark to bright."""
    places = np.linspace(0, 1, len(_ANCHORS))
    channels = [np.interp(values, places, _ANCHORS[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def beside_heat_maps(
    image: np.ndarray, title: str, maps: Sequence[tuple[str, np.ndarray]]
) -> Image.Image:
    """An image (H,W,C), premultiplied if it has four channels, and, to its right, heat maps of the
    same size, each with its title and a scale from 0 to its largest number.

    Args:
        maps: titles and numbers (h,w) of 0 or more, where h and w divide H and W.
    """
    height, width = image.shape[:2]
    factor = max(1, math.ceil(_SIDE / max(height, width)))
    size = (width * factor, height * factor)
    panels = 1 + len(maps)
    total = (panels * (size[0] + _GAP) + _GAP, size[1] + 2 * _LINE + _BAR + 3 * _GAP)
    sheet = Image.new("RGB", total, "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    top = _GAP + _LINE
    below = top + size[1] + _GAP
    for number, (name, values) in enumerate([(title, None), *maps]):
        left = _GAP + number * (size[0] + _GAP)
        draw.text((left, _GAP), name, fill="black", font=font)
        if values is None:
            sheet.paste(_enlarged(on_checkerboard(image), size), (left, top))
            continue
        most = max(float(values.max()), 1e-12)
        sheet.paste(_enlarged(colours(values / most), size), (left, top))
        scale = colours(np.linspace(0, 1, size[0])[None])
        sheet.paste(_enlarged(scale, (size[0], _BAR)), (left, below))
        under = below + _BAR + 2
        draw.text((left, under), "0", fill="black", font=font)
        draw.text((left + size[0], under), f"{most:.3g}", fill="black", font=font, anchor="ra")
    return sheet


def _enlarged(pixels: np.ndarray, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)
