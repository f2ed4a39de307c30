"""What quantizers whose posterior is a categorical distribution share: logits, a learned codebook, the KL. Knows logits alone.

Legend: B batch, D features of a code, h w code grid, K codes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer.quantizers.base import SingleLevel, mean_over_processes


def gumbel_noise_like(logits: Tensor) -> Tensor:
    """Standard Gumbel noise: -log of an exponential variable (Gumbel-max: argmax(logits + noise) is a sample of their softmax)."""
    return -torch.empty_like(logits).exponential_().log()


def kl_to_uniform(logits: Tensor) -> Tensor:
    """KL(q(codes given picture) || uniform) in nats a picture: logits (B,K,h,w) -> (B,), summed over positions."""
    log_q = logits.log_softmax(dim=1)
    return (log_q.exp() * (log_q + math.log(logits.shape[1]))).sum(dim=(1, 2, 3))


def disuse(logits: Tensor) -> Tensor:
    """Scalar: KL(mean of q over the batch and all positions || uniform) in nats a code: 0 where all codes are used alike. It is the part
    of the KL that says nothing against codes that tell pictures apart (ELBO surgery, Hoffman & Johnson 2016)."""
    mean = mean_over_processes(logits.softmax(dim=1).mean(dim=(0, 2, 3)))
    return math.log(len(mean)) + (mean * mean.clamp(min=1e-12).log()).sum()


class Categorical(SingleLevel):
    """q(code given picture) = softmax of the encoder's K logits; a code's vector is a row of a learned table."""

    def __init__(self, num_codes: int, code_dim: int) -> None:
        super().__init__(num_codes, input_dim=num_codes, output_dim=code_dim)
        self.codebook = nn.Parameter(torch.randn(num_codes, code_dim, generator=torch.Generator().manual_seed(0)))

    def look_up(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self.codebook)

    def against_disuse(self, logits: Tensor, weight: float) -> Tensor:
        """`weight` times `disuse` while training; nothing otherwise, when not all processes may be here."""
        return weight * disuse(logits) if self.training and weight else logits.new_zeros(())

    def use_of(self, logits: Tensor) -> dict[str, Tensor]:
        """The KL and, while training, the use of the codebook by the most likely codes."""
        metrics = {"kl": kl_to_uniform(logits).mean().detach()}
        if self.training:
            self.count(logits.argmax(dim=1))
            metrics |= self.use()
        return metrics
