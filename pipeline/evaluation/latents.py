"""Metrics of the reconstructions from Gaussian latents on validation images. Knows models and
arrays; writes nothing."""

from __future__ import annotations

import numpy as np
import torch

from pipeline.data.source import Source
from pipeline.evaluation.metrics import BATCH, mean_psnr
from pipeline.inference.latent_pipeline import LatentPipeline
from stage1_tokenizer import to_model_range, to_uint8
from stage1_tokenizer.metrics import ssim


@torch.no_grad()
def latent_metrics(pipe: LatentPipeline, source: Source, count: int) -> dict[str, float]:
    """`psnr` and `ssim` of the posteriors' means, on the first `count` images of a source.
    Probabilities: see `likelihood_metrics` and `surgery_metrics`."""
    tokenizer = pipe.tokenizer
    real = []
    drawn = []
    for first in range(0, count, BATCH):
        images = source.images(range(first, min(first + BATCH, count)))
        pixels = to_model_range(torch.from_numpy(images).to(tokenizer.device))
        real.append(images)
        drawn.append(to_uint8(tokenizer.reconstruct(pixels)).cpu().numpy())
    truth = np.concatenate(real)
    reconstruction = np.concatenate(drawn)
    return {"psnr": mean_psnr(truth, reconstruction), "ssim": ssim(truth, reconstruction)}
