"""How often an emoji that a pipeline draws is the one of its prompt: nearest by pixel distance.
Knows images, not how they are drawn.

Distance is the mean squared error over all pixels and channels, at the experiment's size, of images
on white. One image is drawn per name, seed 0. The accuracies, the strictest first:

- `retrieval_among_siblings_held_out`: over all held-out names with siblings, the fraction of drawn
  images whose nearest among the images of the same base name, in all tones and genders, is their
  own. `siblings_per_name` is their mean number, the own image among them, and
  `retrieval_among_siblings_chance` the accuracy of a random choice among them.
- `retrieval_at_1_of_100_held_out` and `_seen`: the same among 100 random names of the split. No two
  held-out names are tones of one name, so a wrong tone counts as right.
- `skin_tone_accuracy_val`: the same among the five tones of the name. A random choice has 20%.
- `caption_of_100_held_out` and `_seen`, where the prior captions: the fraction of real images whose
  own caption is the likeliest of the 100.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pipeline.config.data import DataConfig
from pipeline.config.experiment import Experiment
from pipeline.data.builtin.emoji import EmojiSource
from pipeline.evaluation.accuracy import Accuracy
from pipeline.evaluation.metrics import sampled
from pipeline.inference.pipeline import TextToImagePipeline
from stage1_tokenizer.pixels import pil_image
from stage1_tokenizer.transparency import on_background

CANDIDATES = 100


def emoji_metrics(
    pipe: TextToImagePipeline, experiment: Experiment, images: int
) -> dict[str, Accuracy | float]:
    """The metrics of this module's description, on up to `images` names of each split."""
    seen = EmojiSource(experiment.data, "train")
    held_out = EmojiSource(experiment.data, "held_out")
    drawn = sampled(pipe, held_out.captions(range(min(images, len(held_out)))))
    metrics = _among_siblings(drawn, held_out)
    for name, source in (("held_out", held_out), ("seen", seen)):
        most = len(drawn) if source is held_out else len(source)
        rows = np.random.default_rng(0).permutation(most)[: min(images, CANDIDATES)].tolist()
        captions = source.captions(rows)
        real = source.images(rows)
        own = drawn[rows] if source is held_out else sampled(pipe, captions)
        nearest = squared_errors(own, real).argmin(axis=1)
        metrics[f"retrieval_at_1_of_100_{name}"] = Accuracy.of(nearest == np.arange(len(rows)))
        if pipe.prior.config.trained_image_first:
            metrics[f"caption_of_100_{name}"] = captions_found(pipe, real, captions)
    hits, _ = _hits(drawn, held_out.tone_siblings)
    if hits:
        metrics["skin_tone_accuracy_val"] = Accuracy.of(hits)
    return metrics


def check_split(pipe: TextToImagePipeline, data: DataConfig) -> None:
    """Raises ValueError where a pipeline was trained on emoji with another split, so that it has
    seen names that are held out of this one."""
    trained = pipe.trained_on.get("data", {})
    seed = trained.get("emoji", {}).get("split_seed", 0)
    if trained.get("source") == "emoji" and seed != data.emoji.split_seed:
        raise ValueError(
            f"the bundle was trained with data.emoji.split_seed {seed}, and the evaluation has "
            f"{data.emoji.split_seed}, whose held-out names it has seen; evaluate with "
            f"data.emoji.split_seed={seed}"
        )


def captions_found(pipe: TextToImagePipeline, images: np.ndarray, captions: list[str]) -> Accuracy:
    """Images whose own caption has the highest log p(caption | codes) among all of the captions."""
    best = [pipe.caption(pil_image(image), captions, truncate=True)[0][0] for image in images]
    return Accuracy.of(found == own for found, own in zip(best, captions, strict=True))


def squared_errors(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean squared errors (len(a), len(b)) between two sets of images, transparency on white."""
    x, y = (on_background(v).reshape(len(v), -1).astype(np.float64) for v in (a, b))
    return np.asarray(((x**2).sum(1)[:, None] - 2 * x @ y.T + (y**2).sum(1)) / x.shape[1])


def _among_siblings(drawn: np.ndarray, source: EmojiSource) -> dict[str, Accuracy | float]:
    """Retrieval of all images (N,S,S,3) drawn for a source's names among their siblings; nothing
    where no name has any."""
    hits, sizes = _hits(drawn, source.siblings)
    if not hits:
        return {}
    return {
        "retrieval_among_siblings_held_out": Accuracy.of(hits),
        "retrieval_among_siblings_chance": float(np.mean([1 / size for size in sizes])),
        "siblings_per_name": float(np.mean(sizes)),
    }


def _hits(
    drawn: np.ndarray, candidates: Callable[[int], tuple[np.ndarray, int]]
) -> tuple[list[bool], list[int]]:
    """For each name with more than one candidate: whether the image drawn is nearest to its own
    one, and how many there are."""
    hits = []
    sizes = []
    for row, image in enumerate(drawn):
        images, own = candidates(row)
        if len(images) > 1:
            hits.append(int(squared_errors(image[None], images)[0].argmin()) == own)
            sizes.append(len(images))
    return hits, sizes
