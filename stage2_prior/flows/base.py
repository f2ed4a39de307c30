"""The interface of priors over Gaussian latents. Knows vectors; nothing of images or of what made
the vectors.

Legend: B batch, n dimensions of a latent vector, C features of a context (caption or class), M
random numbers per sample.
"""

from __future__ import annotations

import math
from itertools import chain

import torch
from torch import Tensor, nn


def standard_normal_log_prob(values: Tensor) -> Tensor:
    """log N(values; 0, I) in nats: (...,n) -> (...)."""
    return -0.5 * (values.square() + math.log(2 * math.pi)).sum(-1)


class LatentPrior(nn.Module):
    """p(z | context) of latent vectors z, or p(z) where `context_features` is 0.

    Args:
        latent_features: n.
        context_features: C; 0 for an unconditional prior.
    """

    def __init__(self, latent_features: int, context_features: int = 0) -> None:
        super().__init__()
        self.latent_features = latent_features
        self.context_features = context_features
        self.noise_features = latent_features
        """M: random numbers that one sample takes."""

    def forward(self, latents: Tensor, context: Tensor | None = None) -> Tensor:
        """As `log_prob`, so that wrappers of modules can train a prior."""
        return self.log_prob(latents, context)

    def log_prob(self, latents: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(z | context): latents (B,n), context (B,C) -> (B,) in nats, in the weights' dtype
        also under autocast.

        Raises:
            ValueError: a shape does not fit, or a context is missing or not wanted.
        """
        if latents.ndim != 2 or latents.shape[1] != self.latent_features:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)} and must be (batch, "
                f"{self.latent_features}); flatten a grid of latents first"
            )
        self._check_context(context, len(latents))
        with torch.autocast(latents.device.type, enabled=False):
            return self._log_prob(
                latents.to(self.dtype), None if context is None else context.to(self.dtype)
            )

    @torch.no_grad()
    def sample(
        self, count: int, generator: torch.Generator | None = None, context: Tensor | None = None
    ) -> Tensor:
        """Samples (count,n) of p(z | context), one for each row of context (count,C).

        Raises:
            ValueError: as `log_prob`.
        """
        device = self.device if generator is None else generator.device
        noise = torch.randn(count, self.noise_features, generator=generator, device=device)
        return self.from_noise(noise, context)

    @torch.no_grad()
    def from_noise(self, noise: Tensor, context: Tensor | None = None) -> Tensor:
        """Standard normal numbers (B,M) -> samples (B,n). Row i depends on row i alone, so a sample
        can have a seed of its own.

        Raises:
            ValueError: as `log_prob`.
        """
        if noise.ndim != 2 or noise.shape[1] != self.noise_features:
            raise ValueError(
                f"noise has shape {tuple(noise.shape)} and must be (batch, {self.noise_features})"
            )
        self._check_context(context, len(noise))
        noise = noise.to(self.device, self.dtype)
        context = None if context is None else context.to(self.device, self.dtype)
        with torch.autocast(noise.device.type, enabled=False):
            return self._from_noise(noise, context)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(chain(self.parameters(), self.buffers())).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        tensors = chain(self.parameters(), self.buffers())
        return next(tensor.dtype for tensor in tensors if tensor.is_floating_point())

    def _log_prob(self, latents: Tensor, context: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _from_noise(self, noise: Tensor, context: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _check_context(self, context: Tensor | None, batch: int) -> None:
        needed = f"({batch}, {self.context_features})"
        if context is None:
            if self.context_features:
                raise ValueError(f"this prior is conditional; give a context of shape {needed}")
        elif not self.context_features:
            raise ValueError(
                "this prior is unconditional and takes no context; leave it out, or build one with "
                f"prior.latent.context_features={context.shape[-1]}"
            )
        elif tuple(context.shape) != (batch, self.context_features):
            raise ValueError(f"the context has shape {tuple(context.shape)} and must be {needed}")
