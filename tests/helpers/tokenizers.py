"""Tokenizers of every kind, small enough to check exhaustively: 16x16 images, 4x4 codes of a
codebook of 12, or 4x4 positions of 4 latents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from stage1_tokenizer import (
    BinaryOptions,
    FsqOptions,
    GaussianOptions,
    GumbelOptions,
    HierarchicalOptions,
    ObjectiveConfig,
    ResidualOptions,
    TokenizerConfig,
    TokenizerModule,
    VectorOptions,
)

KINDS: dict[str, dict[str, Any]] = {
    "vq": {},
    "vq gradient": {"vq": VectorOptions(codebook="gradient")},
    "vq linear": {"vq": VectorOptions(codebook="linear")},
    "vq rotation": {"vq": VectorOptions(gradient="rotation", entropy_weight=0.1)},
    "gumbel": {"quantizer": "gumbel"},
    "gumbel reinmax": {"quantizer": "gumbel", "gumbel": GumbelOptions(gradient="reinmax")},
    "binary": {"quantizer": "binary", "num_codes": 16},
    "binary spike": {
        "quantizer": "binary",
        "num_codes": 16,
        "binary": BinaryOptions(smoothing="spike_exponential"),
    },
    "score_function": {"quantizer": "score_function"},
    "fsq": {"quantizer": "fsq", "fsq": FsqOptions(levels=(4, 3))},
    "lfq": {"quantizer": "lfq", "num_codes": 16},
    "bsq": {"quantizer": "bsq", "num_codes": 16},
    "residual": {"quantizer": "residual", "residual": ResidualOptions(depth=3)},
    "residual shared": {"quantizer": "residual", "residual": ResidualOptions(shared=True)},
    "hierarchical": {"quantizer": "hierarchical", "hierarchical": HierarchicalOptions(width=8)},
    "hierarchical of three": {
        "quantizer": "hierarchical",
        "num_codes": 4,
        "hierarchical": HierarchicalOptions(levels=3, width=8),
    },
}
"""Changes to the tiny configuration for every quantizer and its main options."""
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
LATENT_KINDS: dict[str, dict[str, Any]] = {
    "gaussian": {"quantizer": "gaussian"},
    "gaussian vector": {
        "quantizer": "gaussian",
        "gaussian": GaussianOptions(latents="vector", vector_features=10, free_bits=0.01),
    },
}
"""The same for tokenizers of Gaussian latents, which have no codes."""
EVERY_LATENT_KIND = pytest.mark.parametrize("kind", LATENT_KINDS)
ALL_KINDS = KINDS | LATENT_KINDS
EVERY_TOKENIZER = pytest.mark.parametrize("kind", ALL_KINDS)


def objective_of(kind: str) -> ObjectiveConfig:
    """One that the kind of quantizer takes."""
    return ObjectiveConfig(
        **({"temperature_end": 1.0} if kind == "gumbel reinmax" else {"temperature_start": 0.5})
    )


def tiny_config(**changes: Any) -> TokenizerConfig:
    values = {
        "image_size": 16,
        "downsample_factor": 4,
        "width": 32,
        "encoder_depth": 1,
        "decoder_depth": 1,
        "num_codes": 12,
        "code_dim": 4,
    } | changes
    return TokenizerConfig(**values)


def tiny_tokenizer(**changes: Any) -> TokenizerModule:
    """With weights that are not at their partly zero start."""
    torch.manual_seed(0)
    tokenizer = TokenizerModule(tiny_config(**changes))
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            if parameter.ndim == 4:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return tokenizer.eval()


class AffinePrior(nn.Module):
    """A learned prior of latents: a Gaussian with a mean and a deviation of each dimension."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.full((dimensions,), 0.3))
        self.log_std = nn.Parameter(torch.full((dimensions,), -0.2))

    def log_prob(self, z: Tensor) -> Tensor:
        return Normal(self.mean, self.log_std.exp()).log_prob(z).sum(1)
