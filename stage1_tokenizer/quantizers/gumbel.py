"""Gumbel-softmax: a relaxed categorical code, hardened by falling temperature. Knows logits; nothing of pictures.

Legend: B batch, D features of a code, h w code grid, K codes.

Jang et al. 2016 (https://arxiv.org/abs/1611.01144), Maddison et al. 2016 (https://arxiv.org/abs/1611.00712): Gumbel-max and its
relaxation, eq. 1-2; the dVAE of DALL-E, Ramesh et al. 2021, section 2.1 and appendix A.2. ReinMax: Liu et al. 2023
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
    """A point of the simplex (over dim 1) that nears a one-hot sample as the temperature falls."""
    return ((logits + noise) / temperature).softmax(dim=1)


def one_hot(codes: Tensor, num_codes: int) -> Tensor:
    """Codes (B,h,w) -> (B,K,h,w)."""
    return F.one_hot(codes, num_codes).permute(0, 3, 1, 2).float()


def reinmax(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """One-hot samples whose gradient is a second-order estimate (Heun's method) of that of the expected loss.

    With p = softmax(logits), D the sample and p1 = (D + softmax(logits / temperature)) / 2, the gradient is that of 2 s - p / 2, where s
    is the softmax of logits moved so that it equals p1.
    """
    sample = one_hot((logits + noise).argmax(dim=1), logits.shape[1])
    p = logits.softmax(dim=1)
    middle = (sample + (logits / temperature).softmax(dim=1)) / 2
    # The logarithm's shift is a constant to the gradient; the clamp only keeps probabilities of 0 from making it infinite.
    moved = (logits + (middle.clamp(min=1e-30).log() - logits).detach()).softmax(dim=1)
    surrogate = 2 * moved - p / 2
    return sample + surrogate - surrogate.detach()


class GumbelQuantizer(Categorical):
    """dVAE's quantizer: relaxed or sampled while training, the most likely code otherwise."""

    relaxed = True

    def __init__(self, num_codes: int, code_dim: int, options: GumbelOptions) -> None:
        super().__init__(num_codes, code_dim)
        self.options = options

    def forward(self, features: Tensor, temperature: float | None = None) -> Quantized:
        """Logits (B,K,h,w) -> relaxed codes at `temperature`; hard ones where it is None."""
        with torch.autocast(features.device.type, enabled=False):
            logits = features.float()
            codes, kl, metrics = logits.argmax(dim=1), kl_to_uniform(logits).mean(), self.use_of(logits)
            if temperature is None:
                latents = self.look_up(codes).permute(0, 3, 1, 2)
            else:
                latents = torch.einsum("bkhw,kd->bdhw", self._weights(logits, temperature), self.codebook)
        return Quantized(latents, codes, self.against_disuse(logits, self.options.diversity), kl=kl, metrics=metrics)

    def _weights(self, logits: Tensor, temperature: float) -> Tensor:
        noise = gumbel_noise_like(logits)
        match self.options.gradient:
            case "relaxed":
                return relax(logits, noise, temperature)
            case "straight_through":
                soft = relax(logits, noise, temperature)
                return one_hot(soft.argmax(dim=1), self.num_codes) + soft - soft.detach()
            case "reinmax":
                return reinmax(logits, noise, temperature)
