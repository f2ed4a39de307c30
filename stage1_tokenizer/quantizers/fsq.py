"""Finite scalar quantization: every feature rounded to one of a few values; the codebook is their
product and cannot collapse.

Legend: B batch, D features of a code (one for each entry of `levels`), h w code grid.

Mentzer et al. 2023 (https://arxiv.org/abs/2309.15505), section 3.1 and appendix A.1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stage1_tokenizer.options import FsqOptions
from stage1_tokenizer.quantizers.base import Quantized, SingleLevel
from stage1_tokenizer.quantizers.gradients import straight_through

_MARGIN = 1e-3
"""The bound lies this share beyond the outermost values, so that they are reached."""


class FiniteScalarQuantizer(SingleLevel):
    """Feature d is squashed by tanh and rounded to one of `levels[d]` values in [-1, 1]."""

    sizes: Tensor
    places: Tensor

    def __init__(self, options: FsqOptions) -> None:
        levels = torch.tensor(options.levels)
        super().__init__(math.prod(options.levels), input_dim=len(levels), output_dim=len(levels))
        # Persistent, so that loading (which builds the model without memory) fills them like any
        # weight.
        self.register_buffer("sizes", levels)
        self.register_buffer(
            "places", torch.cat([torch.ones_like(levels[:1]), levels[:-1].cumprod(0)])
        )

    def forward(self, features: Tensor, temperature: float | None = None) -> Quantized:
        """Features (B,D,h,w) -> rounded ones; there is nothing to relax, so `temperature` is not
        used."""
        with torch.autocast(features.device.type, enabled=False):
            bounded = self._bound(features.float().permute(0, 2, 3, 1))
            digits = bounded.detach().round() + self._half()
            codes = (digits.long() * self.places).sum(-1)
            latents = straight_through(
                bounded / self._half(), bounded.detach().round() / self._half()
            )
            metrics: dict[str, Tensor] = {}
            if self.training:
                self.count(codes)
                metrics = self.usage_metrics()
        return Quantized(latents.permute(0, 3, 1, 2), codes, latents.new_zeros(()), metrics=metrics)

    def look_up(self, codes: Tensor) -> Tensor:
        digits = codes[..., None] // self.places % self.sizes
        return (digits - self._half()) / self._half()

    def _half(self) -> Tensor:
        return self.sizes // 2

    def _bound(self, features: Tensor) -> Tensor:
        """Into (-L/2, L/2), shifted by a half where L is even, so that there are L integers to
        round to."""
        half = (self.sizes - 1) * (1 + _MARGIN) / 2
        offset = torch.where(self.sizes % 2 == 0, 0.5, 0.0)
        return (features + (offset / half).atanh()).tanh() * half - offset
