"""Captions that are lists of tags: shuffled, or some left out, each time they are used. Knows texts
only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.config.data import TagOptions

_STREAM = 3
"""Of the random numbers: others of the same seed and step are drawn for other purposes."""


def varied_tags(
    captions: Sequence[str], rows: Sequence[int], options: TagOptions, seed: int, step: int
) -> list[str]:
    """Captions as this step sees them: a pure function of the seed, the step and each row, so that
    a resumed training sees the same.

    Args:
        captions: one per row.
        rows: the images' numbers.
    """
    if not options.vary:
        return list(captions)
    return [
        _varied(caption, options, np.random.default_rng([seed, step, row, _STREAM]))
        for caption, row in zip(captions, rows, strict=True)
    ]


def _varied(caption: str, options: TagOptions, random: np.random.Generator) -> str:
    tags = [tag.strip() for tag in caption.split(options.separator.strip())]
    tags = [tag for tag in tags if tag]
    if len(tags) < 2:
        return caption
    kept = tags[: options.keep_first]
    rest = tags[options.keep_first :]
    # All numbers are drawn whatever the options are, so that one option changes nothing of the
    # other.
    order = random.permutation(len(rest))
    stays = random.random(len(rest)) >= options.dropout
    if not kept and not stays.any():
        stays[random.integers(len(rest))] = True
    chosen = [int(place) for place in (order if options.shuffle else range(len(rest)))]
    return options.separator.join(kept + [rest[place] for place in chosen if stays[place]])
