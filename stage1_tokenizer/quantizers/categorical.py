"""What quantizers whose posterior is a categorical distribution share: logits, a learned codebook,
the KL. Knows logits alone.

Legend: B batch, D features of a code, h w code grid, K codes. Inside, codes lie in the last
dimension, where channels-last images have them anyway: softmaxes over another one copy first.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer.quantizers.base import SingleLevel, mean_over_processes


def gumbel_noise_like(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard Gumbel noise: -log(-log u) (Gumbel-max: argmax(logits + noise) is a sample of their
    softmax)."""
    # Uniform numbers are drawn eight times as fast as exponential ones on CPUs. None is 1; a 0
    # would make the noise infinite.
    uniform = torch.rand(
        logits.shape, dtype=logits.dtype, device=logits.device, generator=generator
    ).clamp_(min=torch.finfo(logits.dtype).tiny)
    return uniform.log_().neg_().log_().neg_()


def kl_to_uniform(log_q: Tensor) -> Tensor:
    """KL(q(codes given image) || uniform) in nats per image: log-probabilities (B,h,w,K) -> (B,),
    summed over positions."""
    return (log_q.exp() * (log_q + math.log(log_q.shape[-1]))).sum(dim=(1, 2, 3))


def diversity_loss(log_q: Tensor) -> Tensor:
    """Scalar: KL(mean of q over the batch and all positions || uniform) in nats per code, of
    log-probabilities (B,h,w,K): 0 where all codes are used alike.

    ELBO surgery (Hoffman & Johnson 2016) splits the mean KL of the bound: the mutual information of
    images and codes, and the KL of q(z), the distribution of an image's codes together. Over all
    images, h w times this loss is a lower bound of the second part: it leaves out how positions
    differ and how codes depend on each other.
    """
    mean = mean_over_processes(log_q.exp().mean(dim=(0, 1, 2)))
    return math.log(len(mean)) + (mean * mean.clamp(min=1e-12).log()).sum()


class Categorical(SingleLevel):
    """q(code given image) = softmax of the encoder's K logits; a code's vector is a row of a
    learned table."""

    def __init__(self, num_codes: int, code_dim: int) -> None:
        super().__init__(num_codes, input_dim=num_codes, output_dim=code_dim)
        self.codebook = nn.Parameter(
            torch.randn(num_codes, code_dim, generator=torch.Generator().manual_seed(0))
        )

    def encode(self, features: Tensor) -> Tensor:
        """The likeliest codes (B,h,w); no probabilities are computed, which cost as much as the
        networks."""
        return features.permute(0, 2, 3, 1).argmax(dim=-1)

    def log_assignment(self, features: Tensor) -> Tensor:
        """Logits (B,K,h,w) -> log-probabilities (B,h,w,K) of the codes."""
        return features.float().permute(0, 2, 3, 1).log_softmax(dim=-1)

    def look_up(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self.codebook)

    def against_disuse(
        self, log_q: Tensor, weight: float, inverse_temperature: float = 1.0
    ) -> Tensor:
        """`weight` times `diversity_loss` while training, of posteriors raised to the power
        `inverse_temperature`; nothing otherwise, when not all processes may be here."""
        if not (self.training and weight):
            return log_q.new_zeros(())
        return weight * diversity_loss(
            log_q if inverse_temperature == 1 else (inverse_temperature * log_q).log_softmax(dim=-1)
        )

    def use_of(self, likeliest: Tensor, kl: Tensor) -> dict[str, Tensor]:
        """The KL and, while training, the use of the codebook by the most likely codes (B,h,w),
        which are counted."""
        metrics = {"kl": kl.detach()}
        if self.training:
            self.count(likeliest)
            metrics |= self.usage_metrics()
        return metrics
