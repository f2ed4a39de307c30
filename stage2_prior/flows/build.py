"""Builds the prior that a configuration names. Knows all kinds of priors over latents; nothing of
files."""

from __future__ import annotations

from stage2_prior.flows.aggregated import AggregatedPosterior
from stage2_prior.flows.autoregressive import MaskedAutoregressive
from stage2_prior.flows.base import LatentPrior
from stage2_prior.flows.config import LatentPriorConfig
from stage2_prior.flows.coupling import AffineCoupling
from stage2_prior.flows.flow import Flow
from stage2_prior.flows.mixture import GaussianMixture
from stage2_prior.flows.standard_normal import StandardNormal
from stage2_prior.flows.transform import permutations
from stage2_prior.flows.vamp import VampPrior


def build_latent_prior(
    config: LatentPriorConfig, latent_features: int, input_shape: tuple[int, ...] | None = None
) -> LatentPrior:
    """The prior that a configuration names.

    Args:
        latent_features: dimensions of a latent vector.
        input_shape: shape of a pseudo-input, which `vamp` alone needs. `VampPrior.attach` then
            gives it the encoder.

    Raises:
        ValueError: there are no latent dimensions, fewer than 2 for `realnvp`, or no input shape
            for `vamp`.
    """
    if latent_features < 1:
        raise ValueError(f"latents have {latent_features} dimensions; a prior needs at least 1")
    context = config.context_features
    match config.kind:
        case "standard":
            return StandardNormal(latent_features)
        case "mixture":
            return GaussianMixture(latent_features, config.components, context)
        case "vamp":
            if input_shape is None:
                raise ValueError(
                    "prior.latent.kind vamp needs the shape of an encoder's input; give "
                    "input_shape, such as (3, 32, 32)"
                )
            return VampPrior(latent_features, input_shape, config.components, context)
        case "aggregated":
            return AggregatedPosterior(latent_features, config.components)
        case "realnvp" | "maf":
            transform = AffineCoupling if config.kind == "realnvp" else MaskedAutoregressive
            orders = permutations(latent_features, config.transforms, config.permutation)
            transforms = [transform(order, config.width, config.depth, context) for order in orders]
            return Flow(latent_features, transforms, context)
