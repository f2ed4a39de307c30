"""Stage 1: pictures <-> grids of codes. Knows nothing of text, data sets or training loops."""

from stage1_tokenizer.config import GumbelOptions, Level, ObjectiveConfig, TokenizerConfig, VectorOptions
from stage1_tokenizer.model import ImageTokenizer, ImageTokenizerConfig, TokenizerOutput
from stage1_tokenizer.objective import TokenizerLoss, TokenizerObjective
from stage1_tokenizer.pixels import resize_and_crop, to_model_range, to_pictures, to_rgb
from stage1_tokenizer.quantizers import CodebookStatistics, Quantized, build_quantizer, codebook_statistics

__all__ = [
    "CodebookStatistics",
    "GumbelOptions",
    "ImageTokenizer",
    "ImageTokenizerConfig",
    "Level",
    "ObjectiveConfig",
    "Quantized",
    "TokenizerConfig",
    "TokenizerLoss",
    "TokenizerObjective",
    "TokenizerOutput",
    "VectorOptions",
    "build_quantizer",
    "codebook_statistics",
    "resize_and_crop",
    "to_model_range",
    "to_pictures",
    "to_rgb",
]
