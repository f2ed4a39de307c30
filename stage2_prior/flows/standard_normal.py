"""The standard normal distribution: the prior of a VAE that learns none. Knows vectors alone.

Legend: B batch, n dimensions of a latent vector.

Kingma & Welling 2013 (https://arxiv.org/abs/1312.6114), section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stage2_prior.flows.base import LatentPrior, standard_normal_log_prob


class StandardNormal(LatentPrior):
    """p(z) = N(z; 0, I)."""

    mean: Tensor

    def __init__(self, latent_features: int) -> None:
        super().__init__(latent_features)
        # A module without tensors would be on no device.
        self.register_buffer("mean", torch.zeros(latent_features))

    def _log_prob(self, latents: Tensor, context: Tensor | None) -> Tensor:
        return standard_normal_log_prob(latents - self.mean)

    def _from_noise(self, noise: Tensor, context: Tensor | None) -> Tensor:
        return self.mean + noise
