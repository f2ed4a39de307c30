"""Gumbel-softmax: a relaxed categorical code, hardened by falling temperature. Knows logits;
nothing of images.

Legend: B batch, D features of a code, h w code grid, K codes. Functions here have codes in the last
dimension.

Jang et al. 2016 (https://arxiv.org/abs/1611.01144), Maddison et al. 2016
(https://arxiv.org/abs/1611.00712): Gumbel-max and its relaxation, eq. 1-2; the dVAE of DALL-E,
Ramesh et al. 2021, section 2.1 and appendix A.2. ReinMax: Liu et al. 2023
(https://arxiv.org/abs/2304.08612), algorithm 2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stage1_tokenizer.options import GumbelOptions
from stage1_tokenizer.quantizers.base import Quantized
from stage1_tokenizer.quantizers.categorical import Categorical, gumbel_noise_like, kl_to_uniform


def relax(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """A point of the simplex (...,K) that nears a one-hot sample as the temperature falls."""
    return ((logits + noise) / temperature).softmax(dim=-1)


def straight_through(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """One-hot samples (...,K) with the gradient of the relaxed ones."""
    soft = relax(logits, noise, temperature)
    return F.one_hot(soft.argmax(dim=-1), logits.shape[-1]).float() + soft - soft.detach()


def reinmax(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """One-hot samples (...,K) whose gradient is a second-order estimate (Heun's method) of that of
    the expected loss.

    With p = softmax(logits), D the sample and p1 = (D + softmax(logits / temperature)) / 2, the
    gradient is that of 2 s - p / 2, where s is the softmax of logits moved so that it equals p1.
    """
    sample = F.one_hot((logits + noise).argmax(dim=-1), logits.shape[-1]).float()
    p = logits.softmax(dim=-1)
    middle = (sample + (logits / temperature).softmax(dim=-1)) / 2
    # The logarithm's shift is a constant to the gradient; the clamp only keeps probabilities of 0
    # from making it infinite.
    moved = (logits + (middle.clamp(min=1e-30).log() - logits).detach()).softmax(dim=-1)
    surrogate = 2 * moved - p / 2
    return sample + surrogate - surrogate.detach()


WEIGHTS = {"relaxed": relax, "straight_through": straight_through, "reinmax": reinmax}
"""How codes are weighted while training, by `gumbel.gradient`."""


class GumbelQuantizer(Categorical):
    """dVAE's quantizer: relaxed or sampled while training, the most likely code otherwise."""

    relaxed = True

    def __init__(self, num_codes: int, code_dim: int, options: GumbelOptions) -> None:
        super().__init__(num_codes, code_dim)
        self.options = options

    def forward(self, features: Tensor, temperature: float | None = None) -> Quantized:
        """Logits (B,K,h,w) -> relaxed codes at `temperature`; hard ones where it is None."""
        with torch.autocast(features.device.type, enabled=False):
            log_q = self.log_assignment(features)
            codes = self.encode(features)
            kl = kl_to_uniform(log_q).mean()
            if temperature is None:
                latents = self.look_up(codes)
            else:
                weigh = WEIGHTS[self.options.gradient]
                latents = weigh(log_q, gumbel_noise_like(log_q), temperature) @ self.codebook
            loss = self.against_disuse(log_q, self.options.diversity)
            metrics = self.use_of(codes, kl)
        return Quantized(latents.permute(0, 3, 1, 2), codes, loss, kl=kl, metrics=metrics)
