"""Transformers over patches as encoder and decoder (ViT-VQGAN, Yu et al. 2021,
https://arxiv.org/abs/2110.04627). Know no image size.

Legend: B batch, C channels, W width, h w patches, N = h w.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_HEAD = 32
"""Features of an attention head."""
_LONGEST = 100.0
"""Wavelength of the slowest position feature, in patches times 2 pi."""


def positions(height: int, width: int, features: int, device: torch.device) -> Tensor:
    """(N,W) sines and cosines of row and column, so that any grid has its positions."""
    quarter = features // 4
    rates = _LONGEST ** (-torch.arange(quarter, device=device) / quarter)
    rows, columns = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    angles = [axis.flatten()[:, None] * rates for axis in (rows, columns)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)


class Block(nn.Module):
    """Attention over all patches, then a layer of four times the width, each added to what came
    in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // _HEAD
        self.norm = nn.LayerNorm(width)
        self.joint = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.wide_norm = nn.LayerNorm(width)
        self.wide = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)
        # The block starts as the identity, so depth costs no stability at the start.
        for layer in (self.output, self.narrow):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B,N,W) -> the same."""
        parts = self.joint(self.norm(x)).unflatten(2, (3, self.heads, _HEAD)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        x = x + self.output(mixed.transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.wide(self.wide_norm(x))))


class Trunk(nn.Module):
    """Feature map in, feature map out: a 1x1 layer, positions, blocks, norm, a 1x1 layer."""

    def __init__(self, inputs: int, width: int, depth: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.last = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B,inputs,h,w) -> (B,outputs,h,w)."""
        height, width = x.shape[2:]
        tokens = self.first(x.flatten(2).transpose(1, 2))
        tokens = tokens + positions(height, width, tokens.shape[2], x.device)
        out = self.last(self.norm(self.blocks(tokens)))
        return out.transpose(1, 2).unflatten(2, (height, width))


class Encoder(nn.Sequential):
    """Pixels (B,C,H,W) -> features (B,out,h,w)."""

    def __init__(self, channels: int, width: int, depth: int, patch: int, out: int) -> None:
        super().__init__(nn.PixelUnshuffle(patch), Trunk(channels * patch**2, width, depth, out))


class Decoder(nn.Sequential):
    """Code vectors (B,D,h,w) -> the likelihood's parameters (B,out,H,W)."""

    def __init__(self, code_dim: int, width: int, depth: int, patch: int, out: int) -> None:
        super().__init__(Trunk(code_dim, width, depth, out * patch**2), nn.PixelShuffle(patch))
