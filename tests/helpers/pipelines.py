"""A pipeline small enough to evaluate in milliseconds: 16x16 images, 4x4 codes of 12, random
weights."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.inference.bundle import attach_encoder
from pipeline.inference.known_prompts import KnownPrompts
from pipeline.inference.latent_pipeline import LatentPipeline
from pipeline.inference.pipeline import TextToImagePipeline
from stage2_prior import (
    AggregatedPosterior,
    LatentPriorConfig,
    LatentPriorModule,
    Level,
    PriorConfig,
    PriorModule,
    StreamConfig,
    TextConfig,
    TextTokenizer,
)
from tests.helpers.tokenizers import tiny_tokenizer

CAPTIONS = ["a red heart", "a blue star", "two green rings", "a red star"]


def tiny_pipeline(
    *,
    captions: list[str] = CAPTIONS,
    any_order: bool = False,
    text_depth: int = 0,
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
    config = PriorConfig(width=32, depth=1, heads=2, text_depth=text_depth)
    prior = PriorModule(config, stream)
    with torch.no_grad():
        for parameter in prior.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    prior.config.trained_order = "random" if any_order else "raster"
    return TextToImagePipeline(images, prior.eval(), text, trained_on=trained_on)


def tiny_latent_pipeline(
    kind: str = "realnvp",
    context_features: int = 8,
    *,
    trained_on: dict[str, Any] | None = None,
    **tokenizer: Any,
) -> LatentPipeline:
    """As `tiny_pipeline`, with 4x4 positions of 4 Gaussian latents and a prior that is not at its
    start."""
    images = tiny_tokenizer(quantizer="gaussian", **tokenizer)
    text = TextTokenizer.from_config(TextConfig(vocab_size=300, max_length=24), CAPTIONS)
    config = LatentPriorConfig(
        kind=kind,  # type: ignore[arg-type]
        components=5,
        transforms=2,
        width=16,
        context_features=context_features,
    )
    torch.manual_seed(0)
    prior = LatentPriorModule(
        config,
        images.latent_dim,
        (3, *images.size),
        text_vocab_size=text.vocab_size if context_features else 0,
        text_pad_id=text.pad_id,
    )
    with torch.no_grad():
        for name, parameter in prior.named_parameters():
            parameter.normal_(std=0.1 if "output" in name else 0.5)
    if isinstance(prior.prior, AggregatedPosterior):
        prior.prior.set_posteriors(torch.randn(5, 64), torch.zeros(5, 64))
    attach_encoder(prior, images)
    prior.config.trained_with_caption_dropout = True
    return LatentPipeline(images, prior.eval(), text, trained_on=trained_on)


def tiny_icons_pipeline(known_prompts: KnownPrompts | None = None) -> TextToImagePipeline:
    """As `tiny_pipeline`, of transparent icons in two styles."""
    captions = [f"{caption}, {style} style" for caption in CAPTIONS for style in ("noto", "blob")]
    pipe = tiny_pipeline(captions=captions, channels=4)
    pipe.known_prompts = known_prompts
    return pipe
