"""A diagonal Gaussian posterior: samples, log-probabilities, the KL. Knows vectors; knows no image
and no network.

Legend: B batch, n latent dimensions of an image. All in nats.

Auto-encoding variational Bayes, Kingma & Welling 2013 (https://arxiv.org/abs/1312.6114).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GaussianPosterior:
    """q(z given image) = N(mean, exp(log_std)^2), independent over the dimensions."""

    mean: Tensor
    """(B,n)."""
    log_std: Tensor
    """(B,n) log of the standard deviation."""

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One sample per image (B,n), differentiable in the mean and the standard deviation: mean +
        std * noise (reparameterisation, section 2.4).

        Args:
            generator: of the noise, on the CPU. The noise of an image then depends on the images
                before it alone, not on how they are split into batches.
        """
        if generator is None:
            noise = torch.randn_like(self.mean)
        else:
            images, dimensions = self.mean.shape
            rows = [torch.randn(dimensions, generator=generator) for _ in range(images)]
            noise = torch.stack(rows).to(self.mean)
        return self.from_noise(noise)

    def from_noise(self, noise: Tensor) -> Tensor:
        """Standard normal numbers (B,n) -> latents (B,n)."""
        return self.mean + self.log_std.exp() * noise

    def log_prob(self, z: Tensor) -> Tensor:
        """log q(z given image) (B,) of latents (B,n)."""
        standardised = (z - self.mean) * (-self.log_std).exp()
        density = -0.5 * standardised.square() - self.log_std - 0.5 * math.log(2 * math.pi)
        return density.sum(dim=1)

    def kl_by_dimension(self) -> Tensor:
        """KL(q(z given image) || N(0, I)) (B,n) of each dimension (appendix B)."""
        variance = (2 * self.log_std).exp()
        return 0.5 * (self.mean.square() + variance - 1) - self.log_std

    def kl_to_standard(self) -> Tensor:
        """KL(q(z given image) || N(0, I)) (B,), the sum over the dimensions."""
        return self.kl_by_dimension().sum(dim=1)


@dataclass(frozen=True)
class GaussianLatents:
    """Latents of a batch, and where they come from."""

    posterior: GaussianPosterior
    z: Tensor
    """(B,n) a sample of the posterior, or its mean."""
