"""The aggregated posterior: the mean of the posteriors of given inputs. Knows vectors alone.

Legend: n dimensions of a latent vector, N posteriors.

q(z) = 1/N sum_i q(z | x_i) is the prior of the highest ELBO on the inputs x_i (Hoffman & Johnson
2016, "ELBO surgery"; Tomczak & Welling 2018, https://arxiv.org/abs/1705.07120, section 2). It takes
N n operations per density, and on the inputs themselves it overfits: it is a reference for small n.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stage2_prior.flows.mixture import Components, Mixture


class AggregatedPosterior(Mixture):
    """A mixture of N fixed Gaussians, all of one weight. `set_posteriors` fills them in."""

    means: Tensor
    log_stds: Tensor

    def __init__(self, latent_features: int, count: int) -> None:
        super().__init__(latent_features)
        self.register_buffer("means", torch.full((count, latent_features), math.nan))
        self.register_buffer("log_stds", torch.full((count, latent_features), math.nan))

    @classmethod
    def of(cls, means: Tensor, log_stds: Tensor) -> AggregatedPosterior:
        """The mixture of given posteriors: means and logarithms of standard deviations (N,n)."""
        prior = cls(means.shape[-1], len(means)).to(means)
        prior.set_posteriors(means, log_stds)
        return prior

    @torch.no_grad()
    def set_posteriors(self, means: Tensor, log_stds: Tensor) -> None:
        """Sets means (N,n) and logarithms of standard deviations (N,n).

        Raises:
            ValueError: a shape is not (N,n) of this prior.
        """
        if means.shape != self.means.shape or log_stds.shape != self.means.shape:
            raise ValueError(
                f"posteriors have means {tuple(means.shape)} and log_stds {tuple(log_stds.shape)}; "
                f"both must be {tuple(self.means.shape)}"
            )
        self.means.copy_(means)
        self.log_stds.copy_(log_stds)

    def components(self, context: Tensor | None = None) -> Components:
        """The posteriors.

        Raises:
            ValueError: they were not set.
        """
        if self.means[0, 0].isnan():
            raise ValueError(
                "an AggregatedPosterior needs the posteriors of given inputs; call "
                "set_posteriors(means, log_stds)"
            )
        count = len(self.means)
        return Components(
            self.means.new_full((1, count), -math.log(count)), self.means, self.log_stds
        )
