"""Mixtures of Gaussians with diagonal covariances. Knows vectors alone.

Legend: B batch, n dimensions of a latent vector, C features of a context, K components.

p(z | c) = sum_k w_k(c) N(z; m_k, diag(s_k^2)). A context moves the weights alone: the components
are shared, as words are by topics.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stage2_prior.flows.base import LatentPrior, standard_normal_log_prob
from stage2_prior.sampling import sample_from_uniform

_CHUNK_ELEMENTS = 2**22
"""Elements of the largest intermediate tensor, 16 MiB in fp32."""


@dataclass(frozen=True)
class Components:
    """A mixture's parameters."""

    log_weights: Tensor
    """(1,K), or (B,K) where they depend on a context."""
    means: Tensor
    """(K,n)."""
    log_stds: Tensor
    """(K,n) logarithms of the standard deviations."""


def mixture_log_prob(latents: Tensor, components: Components) -> Tensor:
    """log p(z) in nats: (B,n) -> (B,). Components are taken in chunks of limited memory."""
    size = max(1, _CHUNK_ELEMENTS // max(1, latents.numel()))
    chunks = zip(
        components.log_weights.split(size, dim=1),
        components.means.split(size),
        components.log_stds.split(size),
        strict=True,
    )
    parts = []
    for log_weights, means, log_stds in chunks:
        standardized = (latents[:, None] - means) * (-log_stds).exp()
        log_p = standard_normal_log_prob(standardized) - log_stds.sum(-1)
        parts.append((log_weights + log_p).logsumexp(dim=1))
    return torch.stack(parts, dim=1).logsumexp(dim=1)


class MixtureWeights(nn.Module):
    """Learned log weights of K components; linear in a context before they are normalised."""

    def __init__(self, components: int, context_features: int = 0) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(components))
        self.from_context = (
            nn.Linear(context_features, components, bias=False) if context_features else None
        )

    def forward(self, context: Tensor | None) -> Tensor:
        """Context (B,C) -> (B,K); (1,K) without one."""
        logits = self.logits[None]
        if self.from_context is not None:
            logits = logits + self.from_context(context)
        return logits.log_softmax(-1)


class Mixture(LatentPrior):
    """What mixtures share: density and sampling, by their components."""

    def __init__(self, latent_features: int, context_features: int = 0) -> None:
        super().__init__(latent_features, context_features)
        # One more number chooses the component.
        self.noise_features = latent_features + 1

    def components(self, context: Tensor | None = None) -> Components:
        """The components, given a context (B,C) where the prior takes one."""
        raise NotImplementedError

    def _log_prob(self, latents: Tensor, context: Tensor | None) -> Tensor:
        return mixture_log_prob(latents, self.components(context))

    def _from_noise(self, noise: Tensor, context: Tensor | None) -> Tensor:
        components = self.components(context)
        log_weights = components.log_weights.expand(len(noise), -1)
        chosen = sample_from_uniform(log_weights, torch.special.ndtr(noise[:, -1]))
        return components.means[chosen] + components.log_stds[chosen].exp() * noise[:, :-1]


class GaussianMixture(Mixture):
    """K learned components with learned weights."""

    def __init__(self, latent_features: int, components: int, context_features: int = 0) -> None:
        super().__init__(latent_features, context_features)
        self.weights = MixtureWeights(components, context_features)
        # Components that start alike would stay alike.
        self.means = nn.Parameter(torch.randn(components, latent_features))
        self.log_stds = nn.Parameter(torch.zeros(components, latent_features))

    def components(self, context: Tensor | None = None) -> Components:
        return Components(self.weights(context), self.means, self.log_stds)
