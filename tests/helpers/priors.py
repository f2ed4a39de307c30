"""Priors small enough to check exhaustively, with weights that are not at their (partly zero)
start."""

from __future__ import annotations

import torch

from stage2_prior import Level, PriorConfig, PriorModule, StreamConfig


def tiny_prior(
    levels: tuple[Level, ...] = (Level(grid=(3, 3), num_codes=11),),
    code_dim: int = 5,
    any_order: bool = False,
    **model: object,
) -> PriorModule:
    torch.manual_seed(0)
    config = PriorConfig(**{"width": 32, "depth": 2, "heads": 2, **model})  # type: ignore[arg-type]
    stream = StreamConfig(
        text_vocab_size=20, text_length=6, levels=levels, code_dim=code_dim, any_order=any_order
    )
    prior = PriorModule(config, stream)
    torch.manual_seed(1)  # what follows does not depend on how weights start
    if code_dim:
        prior.set_codebook(torch.randn(prior.stream.num_codes, code_dim))
    with torch.no_grad():
        for parameter in prior.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    prior.config.trained_with_caption_dropout = True
    return prior.eval()


def any_order_prior(
    levels: tuple[Level, ...] = (Level(grid=(3, 3), num_codes=11),), **model: object
) -> PriorModule:
    """As if trained on random orders."""
    prior = tiny_prior(levels, any_order=True, **model)
    prior.config.trained_order = "random"
    return prior
