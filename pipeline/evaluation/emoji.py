"""How often an emoji that a pipeline draws is the one of its prompt: nearest by pixel distance.
Knows images, not how they are drawn.

Distance is the mean squared error over all pixels and channels, at the experiment's size.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from pipeline.config.experiment import Experiment
from pipeline.data.builtin.emoji import EmojiSource
from pipeline.evaluation.metrics import sampled
from pipeline.inference.pipeline import TextToImagePipeline

CANDIDATES = 100


def emoji_metrics(pipe: TextToImagePipeline, experiment: Experiment) -> dict[str, float]:
    """`retrieval_at_1_of_100_seen`, `retrieval_at_1_of_100_held_out` and
    `skin_tone_accuracy_val`, one image per prompt, seed 0. Where a prior captions, also
    `caption_of_100_seen` and `caption_of_100_held_out`."""
    metrics: dict[str, float] = {}
    held_out = EmojiSource(experiment.data, "held_out")
    for name, source in (("seen", EmojiSource(experiment.data, "train")), ("held_out", held_out)):
        rng = np.random.default_rng(0)
        rows = rng.permutation(len(source))[:CANDIDATES].tolist()
        captions = source.captions(rows)
        real = source.images(rows)
        nearest = squared_errors(sampled(pipe, captions), real).argmin(axis=1)
        metrics[f"retrieval_at_1_of_100_{name}"] = float(np.mean(nearest == np.arange(len(rows))))
        if pipe.prior.config.trained_image_first:
            metrics[f"caption_of_100_{name}"] = captions_found(pipe, real, captions)
    if hits := _skin_tone_hits(pipe, held_out):
        metrics["skin_tone_accuracy_val"] = float(np.mean(hits))
    return metrics


def captions_found(pipe: TextToImagePipeline, images: np.ndarray, captions: list[str]) -> float:
    """Fraction of images whose own caption has the highest log p(caption | codes) among all of the
    captions."""
    best = [pipe.caption(Image.fromarray(image), captions, truncate=True)[0][0] for image in images]
    return float(np.mean([found == own for found, own in zip(best, captions, strict=True)]))


def squared_errors(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean squared errors (len(a), len(b)) between two sets of images."""
    x, y = (v.reshape(len(v), -1).astype(np.float64) for v in (a, b))
    return np.asarray(((x**2).sum(1)[:, None] - 2 * x @ y.T + (y**2).sum(1)) / x.shape[1])


def _skin_tone_hits(pipe: TextToImagePipeline, source: EmojiSource) -> list[bool]:
    """Of every name that has tones: whether the image drawn is nearest to its own tone's."""
    drawn = sampled(pipe, source.captions(range(len(source))))
    hits = []
    for row in range(len(source)):
        tones, own = source.tone_siblings(row)
        if len(tones) > 1:
            hits.append(int(squared_errors(drawn[row : row + 1], tones)[0].argmin()) == own)
    return hits
