"""Stage 1: images <-> grids of codes. Knows nothing of text, data sets or training loops.

`ImageTokenizer` is imported when it is first used, and transformers with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stage1_tokenizer.codebook_redundancy import (
    agreement_by_level,
    distinct_codes,
    reencoding_metrics,
    unchanged_codes,
)
from stage1_tokenizer.config import Level, ObjectiveConfig, TokenizerConfig, joint_problems
from stage1_tokenizer.metrics import structural_similarity
from stage1_tokenizer.model import TokenizerModule, TokenizerOutput
from stage1_tokenizer.objective import TokenizerLoss, TokenizerObjective
from stage1_tokenizer.options import (
    BinaryOptions,
    DiscriminatorOptions,
    FsqOptions,
    GaussianOptions,
    GumbelOptions,
    HierarchicalOptions,
    PerceptualOptions,
    ResidualOptions,
    ScoreFunctionOptions,
    SignOptions,
    VectorOptions,
    VqganOptions,
)
from stage1_tokenizer.pixels import (
    from_pil,
    resize_and_crop,
    to_channels,
    to_model_range,
    to_pil,
    to_rgb,
    to_rgba,
    to_uint8,
)
from stage1_tokenizer.posterior import GaussianPosterior
from stage1_tokenizer.quantizers import (
    CodebookStatistics,
    Quantized,
    Quantizer,
    build_quantizer,
    codebook_statistics,
    count_codes,
    statistics_by_level,
)

if TYPE_CHECKING:
    from stage1_tokenizer.pretrained import ImageTokenizer, ImageTokenizerConfig

__all__ = [
    "BinaryOptions",
    "CodebookStatistics",
    "DiscriminatorOptions",
    "FsqOptions",
    "GaussianOptions",
    "GaussianPosterior",
    "GumbelOptions",
    "HierarchicalOptions",
    "ImageTokenizer",
    "ImageTokenizerConfig",
    "Level",
    "ObjectiveConfig",
    "PerceptualOptions",
    "Quantized",
    "Quantizer",
    "ResidualOptions",
    "ScoreFunctionOptions",
    "SignOptions",
    "TokenizerConfig",
    "TokenizerLoss",
    "TokenizerModule",
    "TokenizerObjective",
    "TokenizerOutput",
    "VectorOptions",
    "VqganOptions",
    "agreement_by_level",
    "build_quantizer",
    "codebook_statistics",
    "count_codes",
    "distinct_codes",
    "from_pil",
    "joint_problems",
    "reencoding_metrics",
    "resize_and_crop",
    "statistics_by_level",
    "structural_similarity",
    "to_channels",
    "to_model_range",
    "to_pil",
    "to_rgb",
    "to_rgba",
    "to_uint8",
    "unchanged_codes",
]


def __getattr__(name: str) -> Any:
    if name not in ("ImageTokenizer", "ImageTokenizerConfig"):
        raise AttributeError(f"module 'stage1_tokenizer' has no attribute {name!r}")
    from stage1_tokenizer import pretrained

    return getattr(pretrained, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
