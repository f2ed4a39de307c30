"""The images that are encoded several times: as they are, then cropped, moved or mirrored, each a
function of the seed and the row. Knows no tokenizer."""

from __future__ import annotations

import numpy as np

from pipeline.config.experiment import Experiment
from pipeline.data.readers.images import random_shift
from pipeline.data.source import ImageBatch


def image_views(batch: ImageBatch, views: int, experiment: Experiment) -> list[np.ndarray]:
    """Images (B,H,W,3) of each view."""
    seen = [batch.view(None)]
    for view in range(1, views):
        images = seen[0]
        if experiment.data.varies:
            images = batch.view([_draw(experiment.seed, row, view) for row in batch.numbers])
        seen.append(_shifted(images, batch.numbers, view, experiment))
    return seen


def _draw(seed: int, row: int, view: int) -> int:
    return int(np.random.default_rng([seed, row, view, 1]).integers(2**62))


def _shifted(images: np.ndarray, rows: list[int], view: int, experiment: Experiment) -> np.ndarray:
    options = experiment.encode
    return (
        random_shift(images, rows, view, options.shift, experiment.seed, options.flip)
        if options.shift or options.flip
        else images
    )
