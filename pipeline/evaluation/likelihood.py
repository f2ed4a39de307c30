"""Bits per dimension of validation images under a whole pipeline. Knows a pipeline and a source;
writes nothing."""

from __future__ import annotations

import math

import torch

from pipeline.data.source import Source
from pipeline.evaluation.mean import Mean
from pipeline.evaluation.metrics import BATCH
from pipeline.inference.likelihood import HasStages, model_of
from pipeline.likelihood.estimate import image_likelihood


def likelihood_metrics(pipe: HasStages, source: Source, count: int) -> dict[str, float | Mean]:
    """Means over the first `count` images of a source and their captions, each -log2 per dimension
    of exact 8-bit pixels.

    `distortion_bits_per_dimension` is that of p(image | codes or latents).
    `rate_bits_per_dimension` is that of the codes under the prior, minus that under the posterior
    where it is a distribution. `bits_per_dimension` is their sum: a bound by the description
    length, or by the ELBO through one seeded sample. Nothing where the decoder gives an image no
    probability. One image has numbers without an interval.
    """
    model = model_of(pipe)
    distortion: list[float] = []
    rate: list[float] = []
    for first in range(0, count, BATCH):
        rows = range(first, min(first + BATCH, count))
        images = torch.from_numpy(source.images(rows))
        if not pipe.tokenizer.likelihood.covers(images):
            return {}
        ids = pipe.text.encode(source.captions(rows), truncate=True)
        found = image_likelihood(model, ids, images, batch_size=BATCH)
        assert found.distortion is not None and found.rate is not None
        bits = 1 / (found.dimensions * math.log(2))
        distortion += (found.distortion * bits).tolist()
        rate += (found.rate * bits).tolist()
    both = [sum(pair) for pair in zip(distortion, rate, strict=True)]
    metrics = {
        "bits_per_dimension": both,
        "distortion_bits_per_dimension": distortion,
        "rate_bits_per_dimension": rate,
    }
    # One image has no interval.
    return {name: Mean.of(bits) if count > 1 else bits[0] for name, bits in metrics.items()}
