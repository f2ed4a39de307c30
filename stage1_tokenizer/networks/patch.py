"""Convolutions over folded patches, the default. Know no quantizer, no pixel units, no
configuration.

Legend: B batch, C channels, H W pixels, h w code grid. `widths` are channels at each resolution,
finest first.

The first layer folds a patch of up to 4x4 pixels into channels, so that no block works at the
image's own resolution, which takes most of the arithmetic of such networks and gains little. The
last layer unfolds it (sub-pixel convolution, Shi et al. 2016).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer.networks.attention import SpatialAttention


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each position alone: (B,C,H,W) -> the same."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """x + conv1x1(silu(conv(norm(x)))): one convolution of the given kernel, the second one is 1x1
    to halve the arithmetic."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(width)
        self.mix = nn.Conv2d(width, width, kernel, padding=kernel // 2)
        self.project = nn.Conv2d(width, width, 1)
        # The block starts as the identity, so depth costs no stability at the start.
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(F.silu(self.mix(self.norm(x))))


def attention_block(width: int) -> SpatialAttention:
    """Attention that starts as the identity."""
    block = SpatialAttention(width, ChannelNorm(width))
    nn.init.zeros_(block.proj_out.weight)
    nn.init.zeros_(block.proj_out.bias)  # type: ignore[arg-type]
    return block


class Encoder(nn.Module):
    """Pixels (B,C,H,W) -> features (B,out,h,w).

    The receptive field is small: `kernel` at the finest resolution, 1x1 after it, and no statistic
    over the image. A code then describes its own position alone, equal positions get equal codes,
    and the prior has less to model. With kernel 1 a code sees the pixels that it covers and no
    other. Images of the embedded world then take half as many distinct codes as with kernel 3, at
    about half a dB less. With a wider view and GroupNorm, plain background alone took dozens. With
    `attention` every code attends to the whole image, at the codes' resolution.
    """

    def __init__(
        self,
        channels: int,
        widths: tuple[int, ...],
        depth: int,
        kernel: int,
        patch: int,
        out: int,
        *,
        attention: bool = False,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.PixelUnshuffle(patch),
            nn.Conv2d(channels * patch**2, widths[0], 1),
        ]
        for i, width in enumerate(widths):
            if i:
                layers.append(nn.Conv2d(widths[i - 1], width, 2, stride=2))
            layers += [ResidualBlock(width, 1 if i else kernel) for _ in range(depth)]
        if attention:
            layers.append(attention_block(widths[-1]))
        layers += [ChannelNorm(widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], out, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels)


class Decoder(nn.Module):
    """Code vectors (B,D,h,w) -> the likelihood's parameters (B,out,H,W)."""

    def __init__(
        self,
        code_dim: int,
        widths: tuple[int, ...],
        depth: int,
        patch: int,
        out: int,
        *,
        attention: bool = False,
    ) -> None:
        super().__init__()
        coarse_first = widths[::-1]
        layers: list[nn.Module] = [nn.Conv2d(code_dim, coarse_first[0], 3, padding=1)]
        if attention:
            layers.append(attention_block(coarse_first[0]))
        for i, width in enumerate(coarse_first):
            if i:
                layers += [nn.Conv2d(coarse_first[i - 1], 4 * width, 1), nn.PixelShuffle(2)]
            layers += [ResidualBlock(width, 3) for _ in range(depth)]
        layers += [ChannelNorm(widths[0]), nn.SiLU()]
        layers += [nn.Conv2d(widths[0], out * patch**2, 3, padding=1), nn.PixelShuffle(patch)]
        self.layers = nn.Sequential(*layers)

    def forward(self, latents: Tensor) -> Tensor:
        return self.layers(latents)
