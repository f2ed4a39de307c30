"""A pipeline small enough to evaluate in milliseconds: 16x16 images, 4x4 codes of 12, random
weights."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.inference.pipeline import TextToImagePipeline
from stage2_prior import ImagePrior, Level, PriorConfig, StreamConfig, TextConfig, TextTokenizer
from tests.helpers.tokenizers import tiny_tokenizer

CAPTIONS = ["a red heart", "a blue star", "two green rings", "a red star"]


def tiny_pipeline(
    *,
    captions: list[str] = CAPTIONS,
    any_order: bool = False,
    trained_on: dict[str, Any] | None = None,
    **tokenizer: Any,
) -> TextToImagePipeline:
    """Its text tokenizer is trained on `captions`; `tokenizer` are changes of `tiny_config`."""
    images = tiny_tokenizer(**tokenizer)
    text = TextTokenizer.from_config(TextConfig(vocab_size=300, max_length=24), captions)
    stream = StreamConfig(
        text_vocab_size=text.vocab_size,
        text_length=text.length,
        levels=tuple(Level(grid=level.grid, num_codes=level.num_codes) for level in images.layout),
        code_dim=0,
        any_order=any_order,
    )
    torch.manual_seed(0)
    prior = ImagePrior(PriorConfig(width=32, depth=1, heads=2), stream)
    with torch.no_grad():
        for parameter in prior.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    prior.config.trained_order = "random" if any_order else "raster"
    return TextToImagePipeline(images, prior.eval(), text, trained_on=trained_on)
