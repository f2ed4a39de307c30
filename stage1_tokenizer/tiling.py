"""Large images piece by piece, so that memory does not grow with their size. Knows windows of
pixels; nothing of networks.

A piece is taken with a margin on every side that is thrown away again: where the margin is as wide
as what a pixel depends on, the pieces fit together to the last bit. Networks with attention or
GroupNorm look at whole pieces, and theirs fit together less well.
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
    tile, margin = max(tile // stride, 1) * stride, -(-margin // stride) * stride
    whole = torch.empty_like(pixels)
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            bottom, right = min(top + tile, height), min(left + tile, width)
            first, second = max(top - margin, 0), max(left - margin, 0)
            done = work(pixels[:, :, first : bottom + margin, second : right + margin])
            whole[:, :, top:bottom, left:right] = done[
                :, :, top - first : bottom - first, left - second : right - second
            ]
    return whole
