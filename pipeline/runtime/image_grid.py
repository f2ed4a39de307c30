"""Many images in one, and numbers as bars. Knows arrays; draws no text and reads no files."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from pipeline.runtime.checkerboard import on_checkerboard


def make_grid(images: Sequence[np.ndarray], *, columns: int, gap: int = 2) -> np.ndarray:
    """Images (H,W,C) of one size, row by row on light grey -> uint8 (rows*(H+gap)+gap,
    columns*(W+gap)+gap, 3). Of four channels, they are premultiplied and are laid on a
    checkerboard."""
    height, width = images[0].shape[:2]
    rows = math.ceil(len(images) / columns)
    grid = np.full(
        (rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 224, dtype=np.uint8
    )
    for i, image in enumerate(images):
        top = gap + (i // columns) * (height + gap)
        left = gap + (i % columns) * (width + gap)
        grid[top : top + height, left : left + width] = on_checkerboard(image)
    return grid


def bars(values: np.ndarray, *, height: int = 120, width: int = 1024) -> np.ndarray:
    """Values (K,) of 0 or more as a bar chart from left to right, the largest as high as the
    image: uint8 (height,width,3)."""
    heights = np.asarray(values, dtype=np.float64)[np.arange(width) * len(values) // width]
    tall = np.ceil(heights / max(heights.max(), 1e-12) * height)
    filled = np.arange(height, 0, -1)[:, None] <= tall[None, :]
    return np.where(filled[:, :, None], (40, 90, 160), (255, 255, 255)).astype(np.uint8)


def grid_image(grid: np.ndarray) -> Image.Image:
    """A grid as a PIL image, enlarged to be seen where it is small."""
    image = Image.fromarray(grid)
    scale = max(1, 800 // max(image.size))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
