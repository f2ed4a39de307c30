"""Images with captions below them, on sheets that are near square. Knows arrays and text; reads no
files."""

from __future__ import annotations

import math
import textwrap
import unicodedata
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.runtime.checkerboard import on_checkerboard
from pipeline.runtime.printable import printable

IMAGES_PER_SHEET = 100
_SMALLEST = 128
"""Least longer side of an image on a sheet, in pixels; smaller ones are enlarged."""
_LARGEST = 256
"""Largest longer side, in pixels; larger ones are shrunk."""
_GAP = 8
_FONT = 12
_LINE = 15
"""Height of a line of text."""
_CHARACTER = 7
"""Width of a character, at most, on average."""
_LINES = 3
_GROUND = (224, 224, 224)


def sheet_names(count: int) -> list[str]:
    """Names of the files that the sheets of this many images are written to."""
    sheets = max(math.ceil(count / IMAGES_PER_SHEET), 1)
    return ["grid.png"] if sheets == 1 else [f"grid-{i + 1}.png" for i in range(sheets)]


def contact_sheets(
    images: Sequence[np.ndarray], captions: Sequence[str], *, together: int = 1
) -> list[Image.Image]:
    """Sheets of at most `IMAGES_PER_SHEET` images on light grey, one for each of `sheet_names`.

    Args:
        images: uint8 (H,W,3), or (H,W,4) premultiplied, all of one size. The latter are laid on a
            checkerboard.
        captions: one per image; wrapped, and shortened to three lines.
        together: images that follow each other and should be in one row, as those of one prompt.
    """
    starts = range(0, len(images), IMAGES_PER_SHEET)
    return [
        _sheet(
            images[start : start + IMAGES_PER_SHEET],
            captions[start : start + IMAGES_PER_SHEET],
            together,
        )
        for start in starts
    ]


def _sheet(images: Sequence[np.ndarray], captions: Sequence[str], together: int) -> Image.Image:
    height, width = _shown_size(*images[0].shape[:2])
    cell_width = max(width, _SMALLEST) + _GAP
    wrapped = [
        textwrap.wrap(
            _plain(printable(caption)),
            cell_width // _CHARACTER,
            max_lines=_LINES,
            placeholder=" ...",
        )
        for caption in captions
    ]
    cell_height = height + _LINE * max(map(len, wrapped)) + _GAP
    columns = _columns(len(images), cell_height / cell_width, together)
    rows = math.ceil(len(images) / columns)
    size = (columns * cell_width + _GAP, rows * cell_height + _GAP)
    sheet = Image.new("RGB", size, _GROUND)
    font = ImageFont.load_default(_FONT)
    for i, (image, lines) in enumerate(zip(images, wrapped, strict=True)):
        cell = Image.new("RGB", (cell_width - _GAP, cell_height - _GAP), _GROUND)
        cell.paste(_resized(image, (width, height)), ((cell.width - width) // 2, 0))
        draw = ImageDraw.Draw(cell)
        draw.multiline_text((0, height + 1), "\n".join(lines), fill="black", font=font, spacing=1)
        left = _GAP + i % columns * cell_width
        sheet.paste(cell, (left, _GAP + i // columns * cell_height))
    return sheet


def _plain(text: str) -> str:
    """Text without accents: Pillow's own font has plain Latin letters, and a box for others."""
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


def _shown_size(height: int, width: int) -> tuple[int, int]:
    longer = max(height, width)
    if longer > _LARGEST:
        return max(height * _LARGEST // longer, 1), max(width * _LARGEST // longer, 1)
    factor = math.ceil(_SMALLEST / longer)
    return height * factor, width * factor


def _resized(image: np.ndarray, size: tuple[int, int]) -> Image.Image:
    enlarged = size[0] >= image.shape[1]
    filter = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
    return Image.fromarray(on_checkerboard(image)).resize(size, filter)


def _columns(count: int, aspect: float, together: int) -> int:
    """Columns of a near square sheet of cells whose height over width is `aspect`: a multiple of
    `together`, where that stays near square."""
    square = max(round(math.sqrt(count * aspect)), 1)
    whole = together * max(round(square / together), 1)
    return min(whole if whole <= 2 * square else square, count)
