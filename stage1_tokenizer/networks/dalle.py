"""The networks of DALL-E's dVAE, so that its published weights fit (Ramesh et al. 2021,
https://arxiv.org/abs/2102.12092, appendix A.1).

Legend: B batch, C channels, n base width. Groups of bottleneck blocks at each resolution, widths n,
2n, 4n, ... towards the codes; ReLU, no norm; the branch of a block is scaled by one over the square
of the number of blocks. The convolutions at both ends of the codes are 1x1: the encoder's last
gives logits, and the decoder's first is the codebook itself, so it belongs to the quantizer here.
"""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer.pixels import to_squeezed_unit


def _conv(inputs: int, outputs: int, kernel: int) -> nn.Conv2d:
    """With the deviation of its inputs' inverse square root, and no bias at the start."""
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    nn.init.normal_(layer.weight, std=(inputs * kernel**2) ** -0.5)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


class Block(nn.Module):
    """A bottleneck of four convolutions with the given kernels, a quarter as wide inside."""

    def __init__(
        self, inputs: int, outputs: int, kernels: tuple[int, int, int, int], gain: float
    ) -> None:
        super().__init__()
        inside = outputs // 4
        self.gain = gain
        self.id_path = _conv(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        widths = (inputs, inside, inside, inside, outputs)
        self.res_path = nn.ModuleDict(
            {
                f"conv_{i + 1}": _conv(a, b, kernel)
                for i, (a, b, kernel) in enumerate(zip(widths, widths[1:], kernels, strict=False))
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B,inputs,H,W) -> (B,outputs,H,W)."""
        branch = x
        for layer in self.res_path.values():
            branch = layer(F.relu(branch))
        return self.id_path(x) + self.gain * branch


def _groups(
    first: int, widths: list[int], depth: int, kernels: tuple[int, int, int, int], resize: nn.Module
) -> list[tuple[str, nn.Module]]:
    """A group of `depth` blocks a width, with a change of resolution between groups."""
    gain = 1 / (len(widths) * depth) ** 2
    groups: list[tuple[str, nn.Module]] = []
    for number, width in enumerate(widths, start=1):
        blocks: OrderedDict[str, nn.Module] = OrderedDict(
            (f"block_{i + 1}", Block(first if i == 0 else width, width, kernels, gain))
            for i in range(depth)
        )
        if number < len(widths):
            blocks["resize"] = resize
        groups.append((f"group_{number}", nn.Sequential(blocks)))
        first = width
    return groups


class Encoder(nn.Module):
    """Pixels (B,C,H,W) -> logits (B,out,h,w)."""

    def __init__(self, channels: int, base: int, halvings: int, depth: int, out: int) -> None:
        super().__init__()
        widths = [base << i for i in range(halvings + 1)]
        groups = _groups(base, widths, depth, (3, 3, 3, 1), nn.MaxPool2d(2))
        self.blocks = nn.Sequential(
            OrderedDict(
                [
                    ("input", _conv(channels, base, 7)),
                    *groups,
                    ("relu", nn.ReLU()),
                    ("output", _conv(widths[-1], out, 1)),
                ]
            )
        )

    def forward(self, pixels: Tensor) -> Tensor:
        return self.blocks(to_squeezed_unit(pixels))


class Decoder(nn.Module):
    """Code vectors (B,D,h,w) -> location and log-scale (B,out,H,W)."""

    def __init__(self, code_dim: int, base: int, halvings: int, depth: int, out: int) -> None:
        super().__init__()
        widths = [base << i for i in range(halvings, -1, -1)]
        groups = _groups(
            code_dim, widths, depth, (1, 3, 3, 3), nn.Upsample(scale_factor=2, mode="nearest")
        )
        self.blocks = nn.Sequential(
            OrderedDict([*groups, ("relu", nn.ReLU()), ("output", _conv(base, out, 1))])
        )

    def forward(self, latents: Tensor) -> Tensor:
        return self.blocks(latents)
