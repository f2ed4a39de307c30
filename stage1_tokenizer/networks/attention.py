"""Self-attention over the positions of a feature map. Knows positions and channels only.

Legend: B batch, C channels, h w positions.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class SpatialAttention(nn.Module):
    """x + project(attention(norm(x))) with one head over all positions, as in VQ-GAN (Esser et al. 2020)."""

    def __init__(self, width: int, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,h,w) -> the same."""
        height, width = x.shape[2:]
        normed = self.norm(x)
        q, k, v = (part(normed).flatten(2).transpose(1, 2)[:, None] for part in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        return x + self.proj_out(mixed.unflatten(2, (height, width)))
