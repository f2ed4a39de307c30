"""Self-attention over the positions of a feature map. Knows positions and channels only.

Legend: B batch, C channels, h w positions.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

_FEW = 256
"""Positions up to which scores are written out: plain products are quicker (on a CPU the block
trains in 0.6 of the time). Beyond it the memory of all scores counts."""


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one head: (B,N,C) each -> (B,N,C)."""
    if q.shape[1] <= _FEW:
        return (q @ k.mT * q.shape[2] ** -0.5).softmax(dim=2) @ v
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]


class SpatialAttention(nn.Module):
    """x + project(attention(norm(x))) with one head over all positions, as in VQ-GAN (Esser et al.
    2020)."""

    def __init__(self, width: int, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,h,w) -> the same."""
        height, width = x.shape[2:]
        normed = self.norm(x)
        q, k, v = (part(normed).flatten(2).transpose(1, 2) for part in (self.q, self.k, self.v))
        return x + self.proj_out(attend(q, k, v).transpose(1, 2).unflatten(2, (height, width)))
