"""Quantizers, one file a paper, all with the same result."""

from __future__ import annotations

from stage1_tokenizer.config import TokenizerConfig
from stage1_tokenizer.quantizers.base import CodebookStatistics, Quantized, Quantizer, codebook_statistics
from stage1_tokenizer.quantizers.gumbel import GumbelQuantizer
from stage1_tokenizer.quantizers.vector import VectorQuantizer


def build_quantizer(config: TokenizerConfig) -> VectorQuantizer | GumbelQuantizer:
    """The quantizer that a configuration names."""
    match config.quantizer:
        case "vq":
            return VectorQuantizer(config.num_codes, config.code_dim, config.vq)
        case "gumbel":
            return GumbelQuantizer(config.num_codes, config.code_dim, config.gumbel)


__all__ = [
    "CodebookStatistics", "GumbelQuantizer", "Quantized", "Quantizer", "VectorQuantizer", "build_quantizer",
    "codebook_statistics",
]  # fmt: skip
