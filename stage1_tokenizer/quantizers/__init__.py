"""Quantizers, one file a paper, all with the same contract and the same result."""

from __future__ import annotations

from stage1_tokenizer.config import TokenizerConfig
from stage1_tokenizer.quantizers.base import (
    CodebookStatistics,
    Quantized,
    Quantizer,
    codebook_statistics,
    count_codes,
    statistics_by_level,
)
from stage1_tokenizer.quantizers.binary import BinaryQuantizer
from stage1_tokenizer.quantizers.fsq import FiniteScalarQuantizer
from stage1_tokenizer.quantizers.gaussian import GaussianQuantizer
from stage1_tokenizer.quantizers.gumbel import GumbelQuantizer
from stage1_tokenizer.quantizers.hierarchical import HierarchicalQuantizer
from stage1_tokenizer.quantizers.residual import ResidualQuantizer
from stage1_tokenizer.quantizers.score_function import ScoreFunctionQuantizer
from stage1_tokenizer.quantizers.sign import SignQuantizer
from stage1_tokenizer.quantizers.vector import VectorQuantizer


def build_quantizer(config: TokenizerConfig) -> Quantizer:
    """The quantizer that a configuration names."""
    match config.quantizer:
        case "vq":
            return VectorQuantizer(config.num_codes, config.code_dim, config.vq)
        case "gumbel":
            return GumbelQuantizer(config.num_codes, config.code_dim, config.gumbel)
        case "binary":
            return BinaryQuantizer(config.num_codes, config.binary)
        case "score_function":
            return ScoreFunctionQuantizer(config.num_codes, config.code_dim, config.score_function)
        case "fsq":
            return FiniteScalarQuantizer(config.fsq)
        case "lfq" | "bsq":
            return SignQuantizer(config.num_codes, config.sign, spherical=config.quantizer == "bsq")
        case "residual":
            return ResidualQuantizer(config.num_codes, config.code_dim, config.residual, config.vq)
        case "hierarchical":
            return HierarchicalQuantizer(
                config.num_codes, config.code_dim, config.hierarchical, config.vq
            )
        case "gaussian":
            return GaussianQuantizer(config.code_dim, config.grid, config.gaussian)


__all__ = [
    "BinaryQuantizer",
    "CodebookStatistics",
    "FiniteScalarQuantizer",
    "GaussianQuantizer",
    "GumbelQuantizer",
    "HierarchicalQuantizer",
    "Quantized",
    "Quantizer",
    "ResidualQuantizer",
    "ScoreFunctionQuantizer",
    "SignQuantizer",
    "VectorQuantizer",
    "build_quantizer",
    "codebook_statistics",
    "count_codes",
    "statistics_by_level",
]
