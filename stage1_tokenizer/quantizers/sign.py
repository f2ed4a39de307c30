"""Codes that are the signs of the features: lookup-free and binary spherical quantization. Knows
features; nothing of images.

Legend: B batch, n features and bits of a code, h w code grid, K = 2^n codes, N = B h w vectors.

Lookup-free: Yu et al. 2023 (MAGVIT-v2, https://arxiv.org/abs/2310.05737), section 3.1. Spherical:
Zhao et al. 2024 (https://arxiv.org/abs/2406.07548), section 3: features of length 1 and the batch's
entropy a bit at a time, which scales to any K.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stage1_tokenizer.options import SignOptions
from stage1_tokenizer.quantizers.base import Quantized, SingleLevel, mean_over_processes
from stage1_tokenizer.quantizers.bits import pack, unpack
from stage1_tokenizer.quantizers.gradients import straight_through

_LEAST = 1e-12
"""Probabilities are not taken below this in logarithms."""


def entropy(p: Tensor) -> Tensor:
    """Of distributions (...,K), in nats."""
    return -(p * p.clamp(min=_LEAST).log()).sum(-1)


class SignQuantizer(SingleLevel):
    """A code is the signs of n features; `spherical` puts the features on the unit sphere first."""

    def __init__(self, num_codes: int, options: SignOptions, *, spherical: bool) -> None:
        self.bits = num_codes.bit_length() - 1
        super().__init__(num_codes, input_dim=self.bits, output_dim=self.bits)
        self.options = options
        self.spherical = spherical
        self.scale = self.bits**-0.5 if spherical else 1.0

    def forward(self, features: Tensor, temperature: float | None = None) -> Quantized:
        """Features (B,n,h,w) -> their signs; there is nothing to relax, so `temperature` is not
        used."""
        with torch.autocast(features.device.type, enabled=False):
            features = F.normalize(features.float(), dim=1) if self.spherical else features.float()
            codes = pack(features > 0)
            chosen = torch.where(features > 0, self.scale, -self.scale)
            metrics: dict[str, Tensor] = {}
            loss = features.new_zeros(())
            if self.training:
                self.count(codes)
                commitment = F.mse_loss(features, chosen)
                loss = self.options.commitment * commitment
                metrics = {"commitment": commitment.detach()} | self.usage_metrics()
                if self.options.entropy_weight:
                    penalty = self.entropy_penalty(features)
                    loss = loss + self.options.entropy_weight * penalty
                    metrics["entropy_penalty"] = penalty.detach()
        return Quantized(straight_through(features, chosen), codes, loss, metrics=metrics)

    def look_up(self, codes: Tensor) -> Tensor:
        return self.scale * unpack(codes, self.bits)

    def entropy_penalty(self, features: Tensor) -> Tensor:
        """Scalar, in nats: mean entropy of each vector's assignment softmax(-sharpness |v - c|^2),
        less `diversity` times the batch's.

        The softmax over all 2^n sign vectors is a product over the bits, so the first entropy is a
        sum over them; so is the second for `bsq`, by its paper's approximation, while `lfq` takes
        it over whole codes.
        """
        v = features.permute(0, 2, 3, 1).flatten(0, 2)
        logits = 4 * self.options.inverse_temperature * self.scale * v
        bits = torch.stack([logits.sigmoid(), (-logits).sigmoid()], dim=-1)
        if self.spherical:
            batch = entropy(mean_over_processes(bits.mean(0))).sum()
        else:
            codes = (2 * self.options.inverse_temperature * v @ self.vectors().T).softmax(-1)
            batch = entropy(mean_over_processes(codes.mean(0)))
        return entropy(bits).sum(1).mean() - self.options.diversity * batch
