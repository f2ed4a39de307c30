"""Large images piece by piece, so that memory does not grow with their size. Knows windows of
pixels; nothing of networks.

Each piece has a margin on every side that is discarded. Where the margin covers all that a pixel
depends on, the pieces fit together to the last bit. Networks with attention or GroupNorm depend on
the whole piece, so theirs fit less well.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def by_tiles(
    pixels: Tensor, work: Callable[[Tensor], Tensor], *, tile: int, margin: int, stride: int
) -> Tensor:
    """`work` on windows of pixels (B,C,H,W), whose sides are multiples of `stride`, put together to
    the same shape.

    Args:
        tile: side of what is kept of a window, in pixels; rounded down to a multiple of `stride`.
        margin: pixels around it that are worked on too and not kept; rounded up.
    """
    height, width = pixels.shape[2:]
    tile = max(tile // stride, 1) * stride
    margin = -(-margin // stride) * stride
    whole = torch.empty_like(pixels)
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            bottom = min(top + tile, height)
            right = min(left + tile, width)
            y = max(top - margin, 0)
            x = max(left - margin, 0)
            done = work(pixels[:, :, y : bottom + margin, x : right + margin])
            kept = done[:, :, top - y : bottom - y, left - x : right - x]
            whole[:, :, top:bottom, left:right] = kept
    return whole
