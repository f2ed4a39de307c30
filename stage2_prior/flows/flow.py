"""A normalizing flow: invertible transforms from latents to standard normal noise. Knows vectors
alone.

Legend: B batch, n dimensions of a latent vector, C features of a context.

log p(z) = log N(f(z); 0, I) + log |det df/dz| (change of variables; Dinh et al. 2016,
https://arxiv.org/abs/1605.08803, eq. 2-3). As the prior of a VAE: Chen et al. 2016
(https://arxiv.org/abs/1611.02731), section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from stage2_prior.flows.base import LatentPrior, standard_normal_log_prob
from stage2_prior.flows.transform import Transform


class Flow(LatentPrior):
    """Transforms from latents to noise, applied in turn.

    Args:
        latent_features: n.
        transforms: the first one takes latents, the last one gives noise.
        context_features: C, the same as that of the transforms.
    """

    def __init__(
        self, latent_features: int, transforms: Sequence[Transform], context_features: int = 0
    ) -> None:
        super().__init__(latent_features, context_features)
        self.transforms = nn.ModuleList(transforms)

    def to_noise(self, latents: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latents z (B,n) -> noise u (B,n) and log |det du/dz| (B,)."""
        noise = latents
        log_det = latents.new_zeros(len(latents))
        for transform in self.transforms:
            noise, part = transform(noise, context)
            log_det = log_det + part
        return noise, log_det

    def _log_prob(self, latents: Tensor, context: Tensor | None) -> Tensor:
        noise, log_det = self.to_noise(latents, context)
        return standard_normal_log_prob(noise) + log_det

    def _from_noise(self, noise: Tensor, context: Tensor | None) -> Tensor:
        latents = noise
        for transform in reversed(self.transforms):
            latents = transform.inverse(latents, context)  # type: ignore[operator]
        return latents
