"""How often a drawn emoji is the one that was asked for: nearest by pixel distance. Knows images,
not how they are drawn.

Distance is the mean squared error over all pixels and channels, at the experiment's size.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from pipeline.config.experiment import Experiment
from pipeline.data.load import load_source
from pipeline.inference.pipeline import TextToImagePipeline

CANDIDATES = 100


def emoji_figures(
    figures: dict[str, float], pipe: TextToImagePipeline, experiment: Experiment
) -> None:
    """Adds `retrieval_at_1_of_100_seen`, `retrieval_at_1_of_100_held_out` and
    `skin_tone_accuracy_val`, one image per prompt, seed 0. Where a prior captions, it adds
    `caption_of_100_seen` and `caption_of_100_held_out`."""
    for split in ("train", "held_out"):
        source = load_source(experiment.data, split)
        rng = np.random.default_rng(0)
        rows = rng.permutation(len(source))[:CANDIDATES].tolist()
        drawn = _draw(pipe, source.captions(rows))
        true = source.images(rows)
        distance = squared_errors(drawn, true)
        name = (
            "retrieval_at_1_of_100_seen" if split == "train" else "retrieval_at_1_of_100_held_out"
        )
        figures[name] = float(np.mean(distance.argmin(axis=1) == np.arange(len(rows))))
        if pipe.prior.config.trained_image_first:
            figures[name.replace("nearest", "caption")] = captions_found(
                pipe, true, source.captions(rows)
            )
    # `source` is now the held-out one: every held-out name that has tones, against the images of
    # all its tones.
    hits = []
    everyone = list(range(len(source)))
    drawn = _draw(pipe, source.captions(everyone))
    for row in everyone:
        pictures, own = source.tone_siblings(row)  # type: ignore[attr-defined]
        if len(pictures) > 1:
            hits.append(int(squared_errors(drawn[row : row + 1], pictures)[0].argmin()) == own)
    if hits:
        figures["skin_tone_accuracy_val"] = float(np.mean(hits))


def captions_found(pipe: TextToImagePipeline, pictures: np.ndarray, captions: list[str]) -> float:
    """Share of images whose own caption has the highest log p(caption | codes) among all of the
    captions."""
    best = [
        pipe.caption(Image.fromarray(picture), captions, truncate=True)[0][0]
        for picture in pictures
    ]
    return float(np.mean([found == own for found, own in zip(best, captions, strict=True)]))


def squared_errors(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean squared errors (len(a), len(b)) between two sets of images."""
    x, y = (v.reshape(len(v), -1).astype(np.float64) for v in (a, b))
    return ((x**2).sum(1)[:, None] - 2 * x @ y.T + (y**2).sum(1)) / x.shape[1]


def _draw(pipe: TextToImagePipeline, prompts: list[str]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in pipe(prompts, truncate=True).images])
