"""Gumbel-softmax: a relaxed categorical code, hardened by falling temperature. Knows logits; nothing of pictures.

Legend: B batch, D features of a code, h w code grid, K codes.

Jang et al. 2016 (https://arxiv.org/abs/1611.01144), Maddison et al. 2016 (https://arxiv.org/abs/1611.00712): Gumbel-max and its
relaxation, eq. 1-2; the dVAE of DALL-E, Ramesh et al. 2021, section 2.1 and appendix A.2.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer.config import GumbelOptions
from stage1_tokenizer.quantizers.base import Quantized, Quantizer


def gumbel_noise_like(logits: Tensor) -> Tensor:
    """Standard Gumbel noise: -log of an exponential variable (Gumbel-max: argmax(logits + noise) is a sample)."""
    return -torch.empty_like(logits).exponential_().log()


def relax(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """A point of the simplex (over dim 1) that nears a one-hot sample as the temperature falls."""
    return ((logits + noise) / temperature).softmax(dim=1)


def kl_to_uniform(logits: Tensor) -> Tensor:
    """KL(q(codes given picture) || uniform) in nats a picture: logits (B,K,h,w) -> (B,), summed over positions."""
    log_q = logits.log_softmax(dim=1)
    return (log_q.exp() * (log_q + math.log(logits.shape[1]))).sum(dim=(1, 2, 3))


class GumbelQuantizer(Quantizer):
    """dVAE's quantizer: relaxed while training, the most likely code otherwise."""

    def __init__(self, num_codes: int, code_dim: int, options: GumbelOptions) -> None:
        super().__init__(num_codes, decay=0.99)
        self.options = options
        self.input_dim = num_codes
        self.codebook = nn.Parameter(torch.randn(num_codes, code_dim, generator=torch.Generator().manual_seed(0)))

    def forward(self, features: Tensor, temperature: float | None = None) -> Quantized:
        """Logits (B,K,h,w) -> relaxed codes at `temperature`; hard ones where it is None."""
        with torch.autocast(features.device.type, enabled=False):
            logits = features.float()
            codes = logits.argmax(dim=1)
            kl = kl_to_uniform(logits).mean()
            metrics = {"kl": kl.detach()}
            if temperature is None:
                return Quantized(self.embed(codes), codes, kl, metrics)
            if self.training:
                self.count(codes)
                metrics |= self.use()
            soft = relax(logits, gumbel_noise_like(logits), temperature)
            if self.options.straight_through:
                hard = F.one_hot(soft.argmax(dim=1), self.num_codes).permute(0, 3, 1, 2).to(soft)
                soft = hard + soft - soft.detach()
            latents = torch.einsum("bkhw,kd->bdhw", soft, self.codebook)
            return Quantized(latents, codes, kl, metrics)

    def embed(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self.codebook).permute(0, 3, 1, 2)
