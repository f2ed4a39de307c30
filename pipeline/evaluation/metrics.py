"""Metrics of a tokenizer and a prior on validation images. Knows models and arrays; writes
nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.data.source import Source
from pipeline.inference.base import BasePipeline
from pipeline.inference.pipeline import TextToImagePipeline
from pipeline.runtime.devices import uses_bf16
from stage1_tokenizer import (
    TokenizerModule,
    count_codes,
    distinct_codes,
    reencoding_metrics,
    statistics_by_level,
    to_model_range,
)
from stage1_tokenizer.metrics import psnr, ssim
from stage1_tokenizer.pixels import image_array
from stage1_tokenizer.transparency import on_background
from stage2_prior import OrderSchedule, PriorObjective, PriorObjectiveConfig

BATCH = 64
_HIGHEST_PSNR = 99.0
"""In dB, of images that are equal: their PSNR is infinite."""


@dataclass(frozen=True)
class Reconstructions:
    """Images of a source beside what a tokenizer makes of them."""

    real: np.ndarray
    """(N,H,W,C) uint8."""
    drawn: np.ndarray
    """(N,H,W,C) uint8."""
    metrics: dict[str, float]
    """PSNR (mean over images), SSIM, codebook usage and perplexity, distinct codes, and the
    fraction of codes unchanged by encoding again, directly and after JPEG."""


def check_channels(what: str, tokenizer: TokenizerModule, channels: int) -> None:
    """Raises ValueError where images have other channels than a tokenizer."""
    needed = tokenizer.own_config.channels
    if channels != needed:
        alpha = "keep" if needed == 4 else "white"
        raise ValueError(
            f"{what} has images of {needed} channels, and those of the configuration have "
            f"{channels}; set data.alpha={alpha}"
        )


def autocast(pipe: BasePipeline, precision: str) -> torch.autocast:
    """The precision that the experiment trained in."""
    device = pipe.tokenizer.device
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(precision, device))


def tokenizer_metrics(pipe: TextToImagePipeline, source: Source, count: int) -> Reconstructions:
    """Encodes and decodes the first `count` images of a source."""
    layout = pipe.tokenizer.layout
    histogram = torch.zeros(sum(level.num_codes for level in layout), dtype=torch.long)
    real = []
    drawn = []
    batches = []
    for _, images, codes in _encoded(pipe, source, count):
        histogram += count_codes(codes.cpu(), layout)
        real.append(images)
        drawn.append(stacked(pipe.tokenizer.to_images(codes)))
        batches.append((codes, torch.from_numpy(drawn[-1])))
    truth = np.concatenate(real)
    reconstruction = np.concatenate(drawn)
    metrics = {"psnr": mean_psnr(truth, reconstruction), "ssim": ssim(truth, reconstruction)}
    for name, statistics in statistics_by_level(histogram, layout).items():
        metrics[f"codebook_usage{name}"] = float(statistics.usage)
        metrics[f"codebook_perplexity{name}"] = float(statistics.perplexity)
    distinct = distinct_codes(pipe.tokenizer, histogram)
    metrics |= {f"distinct_codes{name}": float(number) for name, number in distinct.items()}
    metrics |= reencoding_metrics(pipe.tokenizer, batches)
    return Reconstructions(truth, reconstruction, metrics)


def mean_psnr(real: np.ndarray, drawn: np.ndarray) -> float:
    """Mean over images (N,H,W,C) uint8, in dB."""
    decibels = [psnr(a, b) for a, b in zip(real, drawn, strict=True)]
    return float(np.minimum(decibels, _HIGHEST_PSNR).mean())


def prior_metrics(pipe: TextToImagePipeline, source: Source, count: int) -> dict[str, float]:
    """Nats per code, and per text token but for a prior with a text encoder, on the first `count`
    images of a source; per caption token too where the prior captions. Codes come in the order that
    the prior was trained on."""
    trained = pipe.prior.config
    objective = PriorObjective(
        pipe.prior,
        PriorObjectiveConfig(text_weight=0.0),  # which evaluation does not read
        OrderSchedule(order=trained.trained_order),
        image_first=0.5 if trained.trained_image_first else 0.0,
    )
    metrics = objective.evaluate(
        {
            "text_ids": pipe.text.encode(source.captions(rows), truncate=True).to(codes.device),
            "codes": codes.flatten(1),
        }
        for rows, _, codes in _encoded(pipe, source, count)
    )
    pipe.prior.eval()
    names = ("nats_per_code", "nats_per_text_token", "nats_per_caption_token")
    return {name: metrics[name] for name in names if name in metrics}


def sampled(
    pipe: TextToImagePipeline, prompts: Sequence[str], num_inference_steps: int | None = None
) -> np.ndarray:
    """One image per prompt, seed 0: (N,H,W,3) uint8, transparency on white."""
    output = pipe(prompts, truncate=True, num_inference_steps=num_inference_steps)
    return on_background(stacked(output.images))


def stacked(images: Sequence[Image.Image]) -> np.ndarray:
    """Images of one size as (N,H,W,C) uint8, with four channels premultiplied."""
    return np.stack([image_array(image) for image in images])


def _encoded(
    pipe: TextToImagePipeline, source: Source, count: int
) -> Iterator[tuple[range, np.ndarray, Tensor]]:
    """Rows, images and codes of the first `count` images, a batch at a time."""
    for first in range(0, count, BATCH):
        rows = range(first, min(first + BATCH, count))
        images = source.images(rows)
        pixels = to_model_range(torch.from_numpy(images)).to(pipe.tokenizer.device)
        yield rows, images, pipe.tokenizer.encode(pixels)
