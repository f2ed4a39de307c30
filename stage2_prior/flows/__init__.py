"""Priors over Gaussian latents: densities that can be sampled, one file per paper."""

from stage2_prior.flows.aggregated import AggregatedPosterior
from stage2_prior.flows.autoregressive import MaskedAutoregressive
from stage2_prior.flows.base import LatentPrior
from stage2_prior.flows.build import build_latent_prior
from stage2_prior.flows.config import LatentPriorConfig, LatentPriorKind
from stage2_prior.flows.coupling import AffineCoupling
from stage2_prior.flows.flow import Flow
from stage2_prior.flows.mixture import GaussianMixture
from stage2_prior.flows.model import LatentPriorModule
from stage2_prior.flows.objective import LatentPriorObjective
from stage2_prior.flows.standard_normal import StandardNormal
from stage2_prior.flows.vamp import VampPrior

__all__ = [
    "AffineCoupling",
    "AggregatedPosterior",
    "Flow",
    "GaussianMixture",
    "LatentPrior",
    "LatentPriorConfig",
    "LatentPriorKind",
    "LatentPriorModule",
    "LatentPriorObjective",
    "MaskedAutoregressive",
    "StandardNormal",
    "VampPrior",
    "build_latent_prior",
]
