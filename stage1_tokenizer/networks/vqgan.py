"""The networks of VQ-GAN, so that published weights of taming-transformers and LlamaGen fit (Esser
et al. 2020, https://arxiv.org/abs/2012.09841, appendix A; Sun et al. 2024,
https://arxiv.org/abs/2406.06525).

Legend: B batch, C channels, D features of a code. `widths` are channels at each resolution, finest
first. Residual blocks of GroupNorm, SiLU and two 3x3 convolutions; attention in the middle and, if
asked for, in the blocks of the lowest resolution.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer.networks.attention import SpatialAttention


def norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, width, eps=1e-6)


class ResidualBlock(nn.Module):
    """x + conv3x3(silu(norm(conv3x3(silu(norm(x)))))); a 1x1 convolution carries x where the width
    changes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B,inputs,H,W) -> (B,outputs,H,W)."""
        inner = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(inner)))


class Downsample(nn.Module):
    """Half the resolution; the padding is on the right and at the bottom alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the resolution: each position fourfold, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    """Two residual blocks with attention between them, at the codes' resolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(width, width)
        self.attn_1 = SpatialAttention(width, norm(width))
        self.block_2 = ResidualBlock(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Stage(nn.Module):
    """The blocks of one resolution, each followed by attention if asked for, then the change of
    resolution if there is one."""

    def __init__(
        self, inputs: int, outputs: int, blocks: int, attention: bool, **resize: nn.Module
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResidualBlock(inputs if i == 0 else outputs, outputs) for i in range(blocks)
        )
        self.attn = nn.ModuleList(
            SpatialAttention(outputs, norm(outputs)) for _ in range(blocks if attention else 0)
        )
        self.resize = list(resize)
        for name, module in resize.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        for name in self.resize:
            x = getattr(self, name)(x)
        return x


class Encoder(nn.Module):
    """Pixels (B,C,H,W) -> features (B,out,h,w)."""

    def __init__(
        self,
        channels: int,
        widths: tuple[int, ...],
        blocks: int,
        latent_channels: int,
        code_dim: int,
        out: int,
        attention: bool,
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        last = len(widths) - 1
        inputs = widths[0]
        stages = []
        for i, width in enumerate(widths):
            resize = {"downsample": Downsample(width)} if i < last else {}
            stages.append(Stage(inputs, width, blocks, attention and i == last, **resize))
            inputs = width
        self.down = nn.ModuleList(stages)
        self.mid = Middle(inputs)
        self.norm_out = norm(inputs)
        self.conv_out = nn.Conv2d(inputs, latent_channels, 3, padding=1)
        self.quant_conv = nn.Conv2d(latent_channels, code_dim, 1)
        # To the logits of categorical codes, or what else a quantizer takes in place of vectors.
        self.project = nn.Conv2d(code_dim, out, 1) if out != code_dim else nn.Identity()

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv_in(pixels)
        for stage in self.down:
            x = stage(x)
        x = self.conv_out(F.silu(self.norm_out(self.mid(x))))
        return self.project(self.quant_conv(x))


class Decoder(nn.Module):
    """Code vectors (B,D,h,w) -> the likelihood's parameters (B,out,H,W)."""

    def __init__(
        self,
        code_dim: int,
        widths: tuple[int, ...],
        blocks: int,
        latent_channels: int,
        out: int,
        attention: bool,
    ) -> None:
        super().__init__()
        last = len(widths) - 1
        inputs = widths[-1]
        self.post_quant_conv = nn.Conv2d(code_dim, latent_channels, 1)
        self.conv_in = nn.Conv2d(latent_channels, inputs, 3, padding=1)
        self.mid = Middle(inputs)
        stages: list[nn.Module] = []
        for i in range(last, -1, -1):
            resize = {"upsample": Upsample(widths[i])} if i else {}
            # Numbered as the encoder's: 0 is the finest resolution. One block more than the encoder
            # has.
            stages.insert(
                0, Stage(inputs, widths[i], blocks + 1, attention and i == last, **resize)
            )
            inputs = widths[i]
        self.up = nn.ModuleList(stages)
        self.norm_out = norm(inputs)
        self.conv_out = nn.Conv2d(inputs, out, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.mid(self.conv_in(self.post_quant_conv(latents)))
        for stage in reversed(self.up):
            x = stage(x)
        return self.conv_out(F.silu(self.norm_out(x)))
