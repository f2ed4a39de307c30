"""Priors over latents small enough to check exhaustively, with weights that are not at their start,
in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from stage2_prior import AggregatedPosterior, LatentPrior, LatentPriorConfig, build_latent_prior
from stage2_prior.flows import VampPrior

CONTEXT = 3
"""Features of a context."""
CONDITIONAL = ["mixture", "vamp", "realnvp", "maf"]
KINDS = [(kind, 0) for kind in ("standard", "aggregated", *CONDITIONAL)]
KINDS += [(kind, CONTEXT) for kind in CONDITIONAL]
"""(kind, context features) of every prior."""
INPUT_SHAPE = (2, 2)
"""Of VampPrior's pseudo-inputs."""


def tiny_encoder(latent_features: int) -> torch.nn.Module:
    """Inputs (K,2,2) -> 2 n features."""
    return torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(4, 2 * latent_features, dtype=torch.float64)
    )


def tiny_latent_prior(
    kind: str, context_features: int = 0, latent_features: int = 2, **settings: object
) -> LatentPrior:
    """A prior whose transforms and components are far from their start."""
    torch.manual_seed(0)
    sizes = {"components": 5, "transforms": 3, "width": 16, "depth": 2}
    config = LatentPriorConfig(
        kind=kind,  # type: ignore[arg-type]
        context_features=context_features,
        **{**sizes, **settings},  # type: ignore[arg-type]
    )
    prior = build_latent_prior(config, latent_features, INPUT_SHAPE).double()
    with torch.no_grad():
        for name, parameter in prior.named_parameters():
            parameter.normal_(std=0.15 if "output" in name else 0.5)
    if isinstance(prior, AggregatedPosterior):
        prior.set_posteriors(torch.randn(5, latent_features), 0.3 * torch.randn(5, latent_features))
    if isinstance(prior, VampPrior):
        encoder = tiny_encoder(latent_features)
        prior.attach(lambda inputs: (0.7 * encoder(inputs)).chunk(2, dim=1))
    return prior


def random_context(prior: LatentPrior, count: int) -> Tensor | None:
    """(count,C) for a conditional prior: the same row again and again."""
    if not prior.context_features:
        return None
    row = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    return row.expand(count, -1)
