"""Bernoulli latents, smoothed while training: the discrete VAE with bits. Knows logits of bits;
nothing of images.

Legend: B batch, n bits of a code, h w code grid.

DVAE, Rolfe 2016 (https://arxiv.org/abs/1609.02200); DVAE++, Vahdat et al. 2018a
(https://arxiv.org/abs/1802.04920); DVAE#, Vahdat et al. 2018b (https://arxiv.org/abs/1805.07445).
The prior of this stage is uniform, as for all quantizers here; stage 2 learns the real one.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from stage1_tokenizer.options import BinaryOptions
from stage1_tokenizer.quantizers.base import Quantized, SingleLevel
from stage1_tokenizer.quantizers.bits import pack, unpack
from stage1_tokenizer.quantizers.categorical import diversity_loss
from stage1_tokenizer.quantizers.smoothing import smooth


def kl_to_fair_bits(logits: Tensor) -> Tensor:
    """KL(q(bits given image) || fair coins) in nats per image: logits (B,n,h,w) -> (B,).
    Smoothing by a mixture changes nothing of it: both sides have the same density of the smoothed
    bit given the bit (Rolfe 2016, section 2). With `two_sided_power` that density depends on q, so
    that the loss is no bound while training, as with Gumbel-softmax."""
    q = logits.sigmoid()
    entropy = F.softplus(-logits) + (1 - q) * logits
    return (math.log(2) - entropy).sum(dim=(1, 2, 3))


class BinaryQuantizer(SingleLevel):
    """A code is n bits, each with a probability of its own; the decoder sees -1 and 1, and what
    lies between while training."""

    relaxed = True

    def __init__(self, num_codes: int, options: BinaryOptions) -> None:
        self.bits = num_codes.bit_length() - 1
        super().__init__(num_codes, input_dim=self.bits, output_dim=self.bits)
        self.options = options

    def forward(self, features: Tensor, temperature: float | None = None) -> Quantized:
        """Logits (B,n,h,w) -> bits smoothed at inverse temperature 1 / `temperature`; the likelier
        bits where it is None."""
        with torch.autocast(features.device.type, enabled=False):
            logits = features.float()
            codes = pack(logits > 0)
            kl = kl_to_fair_bits(logits).mean()
            metrics = {"kl": kl.detach()}
            penalty = logits.new_zeros(())
            if self.training:
                self.count(codes)
                metrics |= self.usage_metrics()
                if self.options.diversity:
                    penalty = self.options.diversity * diversity_loss(
                        self.of_codes(logits).log_softmax(dim=-1)
                    )
            if temperature is None:
                latents = self.look_up(codes).permute(0, 3, 1, 2)
            else:
                q = logits.sigmoid()
                uniform = torch.rand_like(logits)
                latents = 2 * smooth(q, uniform, 1 / temperature, self.options.smoothing) - 1
        return Quantized(latents, codes, penalty, kl=kl, metrics=metrics)

    def of_codes(self, logits: Tensor) -> Tensor:
        """Logits of bits (B,n,h,w) -> logits of whole codes (B,h,w,K), whose softmax is the product
        over the bits."""
        return torch.einsum("bnhw,kn->bhwk", logits, self.vectors()) / 2

    def log_assignment(self, features: Tensor) -> Tensor:
        """Logits of bits (B,n,h,w) -> log-probabilities (B,h,w,K) of the codes."""
        return self.of_codes(features.float()).log_softmax(dim=-1)

    def look_up(self, codes: Tensor) -> Tensor:
        return unpack(codes, self.bits)
