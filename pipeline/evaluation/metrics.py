"""Metrics of a tokenizer and a prior on validation images. Knows models and arrays; writes
nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pipeline.data.source import Source
from pipeline.inference.pipeline import TextToImagePipeline
from stage1_tokenizer import codebook_statistics, count_codes, counts_by_level, to_model_range
from stage1_tokenizer.metrics import psnr, ssim
from stage2_prior import OrderSchedule, PriorObjective, PriorObjectiveConfig

BATCH = 64


@dataclass(frozen=True)
class Reconstructions:
    """Images of a source beside what a tokenizer makes of them."""

    real: np.ndarray
    """(N,H,W,3) uint8."""
    drawn: np.ndarray
    """(N,H,W,3) uint8."""
    metrics: dict[str, float]
    """PSNR (mean over images), SSIM, codebook usage and perplexity."""


def tokenizer_metrics(pipe: TextToImagePipeline, source: Source, count: int) -> Reconstructions:
    """Encodes and decodes the first `count` images of a source."""
    tokenizer = pipe.tokenizer
    layout = tokenizer.layout
    histogram = torch.zeros(sum(level.num_codes for level in layout), dtype=torch.long)
    true, drawn = [], []
    for first in range(0, count, BATCH):
        images = source.images(range(first, min(first + BATCH, count)))
        codes = tokenizer.encode(to_model_range(torch.from_numpy(images)).to(tokenizer.device))
        histogram += count_codes(codes.cpu(), layout)
        true.append(images)
        drawn.append(np.stack([np.asarray(image) for image in tokenizer.to_images(codes)]))
    truth, reconstruction = np.concatenate(true), np.concatenate(drawn)
    metrics = {
        "psnr": float(
            np.mean([min(psnr(a, b), 99.0) for a, b in zip(truth, reconstruction, strict=True)])
        ),
        "ssim": ssim(truth, reconstruction),
    }
    for name, counts in counts_by_level(histogram, layout).items():
        statistics = codebook_statistics(counts)
        metrics[f"codebook_usage{name}"] = float(statistics.usage)
        metrics[f"codebook_perplexity{name}"] = float(statistics.perplexity)
    return Reconstructions(truth, reconstruction, metrics)


def prior_metrics(pipe: TextToImagePipeline, source: Source, count: int) -> dict[str, float]:
    """Held-out nats per code and per text token."""
    tokenizer, device = pipe.tokenizer, pipe.prior.device

    def batches():
        for first in range(0, count, BATCH):
            rows = range(first, min(first + BATCH, count))
            codes = tokenizer.encode(
                to_model_range(torch.from_numpy(source.images(rows))).to(device)
            ).flatten(1)
            yield {
                "text_ids": pipe.text.encode(source.captions(rows), truncate=True).to(device),
                "codes": codes,
            }

    trained = pipe.prior.config  # orders and captions are evaluated as they were trained
    schedule, captioning = (
        OrderSchedule(order=trained.trained_order),
        0.5 if trained.trained_image_first else 0.0,
    )
    objective = PriorObjective(pipe.prior, PriorObjectiveConfig(), schedule, captioning)
    figures = objective.evaluate(batches())
    pipe.prior.eval()
    return {
        name: figures[name]
        for name in ("nats_per_code", "nats_per_text_token", "nats_per_caption_token")
        if name in figures
    }
