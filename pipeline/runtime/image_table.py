"""A table of images with a label per row and per column. Knows arrays and text; reads no files."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.runtime.checkerboard import on_checkerboard

_SIDE = 96
"""Least side of an image in pixels."""
_GAP = 6
_FONT = 12
_LINE = 15
"""Height of a line of text."""
_CHARACTER = 7
"""Width of a character, at most, on average."""


def image_table(rows: Mapping[str, np.ndarray], columns: Sequence[str]) -> Image.Image:
    """Draws images on white.

    Args:
        rows: label -> uint8 (columns,H,W,C), images of one size; of four channels premultiplied.
        columns: labels, which are wrapped.
    """
    height, width = next(iter(rows.values())).shape[1:3]
    factor = max(1, -(-_SIDE // max(height, width)))
    cell_width = width * factor + _GAP
    cell_height = height * factor + _GAP
    wrapped = [textwrap.wrap(label, max(cell_width // _CHARACTER, 1)) for label in columns]
    left = _GAP + _CHARACTER * max(map(len, rows)) + _GAP
    top = _GAP + _LINE * max(map(len, wrapped)) + _GAP
    size = (left + len(columns) * cell_width, top + len(rows) * cell_height)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_FONT)
    for column, lines in enumerate(wrapped):
        place = (left + column * cell_width, _GAP)
        draw.multiline_text(place, "\n".join(lines), fill="black", font=font)
    for row, (label, images) in enumerate(rows.items()):
        middle = top + row * cell_height + (height * factor - _LINE) // 2
        draw.text((_GAP, middle), label, fill="black", font=font)
        for column, image in enumerate(images):
            enlarged = Image.fromarray(on_checkerboard(image)).resize(
                (width * factor, height * factor), Image.Resampling.NEAREST
            )
            sheet.paste(enlarged, (left + column * cell_width, top + row * cell_height))
    return sheet
