"""How often an icon that a pipeline draws is the one of its prompt: nearest by pixel distance.
Knows images and names; does not know how icons are drawn.

Distance is the mean squared error over all pixels and channels on white, at the experiment's size.
One image is drawn per cell, seed 0, by the first wording ("red heart, twemoji style"). Each kind of
held-out cell (`cell`, `tone`, `name`, see `pipeline/data/builtin/icon_split.py`) has metrics of its
own, over the cells that no setting was chosen by:

- `retrieval_at_1_of_100_KIND`: nearest among 100 drawings of the style, its own one included.
- `own_among_siblings_KIND`: nearest among the drawings of its base name in its style, which differ
  in skin tone and sex, and, since the base name counts, in nothing else.
- `style_KIND`: nearest among the drawings of its name in all styles.
- `tone_KIND`: nearest among the skin tones of its name in its style.
- `all_siblings_KIND`: nearest among the drawings of its base name in all styles, skin tones and
  sexes.

A cell without such siblings is left out of a metric. Each `_chance` is the accuracy of a random
choice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from pipeline.config.experiment import Experiment
from pipeline.data.builtin.icon_captions import styled_captions
from pipeline.data.builtin.icon_split import base_of, tone_of, without_tones
from pipeline.data.builtin.icons import Icon, IconSource, by_hash, reported
from pipeline.data.readers.transparency import composed
from pipeline.evaluation.accuracy import Accuracy
from pipeline.evaluation.emoji import squared_errors
from pipeline.evaluation.metrics import sampled
from pipeline.inference.pipeline import TextToImagePipeline

CANDIDATES = 100
SIBLINGS: dict[str, Callable[[Icon], tuple[str, ...] | None]] = {
    "own_among_siblings": lambda icon: (icon.style, base_of(icon.key)),
    "style": lambda icon: (icon.key,),
    "tone": lambda icon: (
        None if tone_of(icon.key) is None else (icon.style, without_tones(icon.key))
    ),
    "all_siblings": lambda icon: (base_of(icon.key),),
}
"""What an icon shares with those that it is compared with, by metric; None where it has none."""


def icon_metrics(
    pipe: TextToImagePipeline, experiment: Experiment, limit: int
) -> dict[str, Accuracy | float]:
    """The metrics of this module's description.

    Args:
        limit: cells of each kind that are drawn at most.
    """
    everything = IconSource(experiment.data, "train").everything
    metrics: dict[str, Accuracy | float] = {}
    for kind, cells in reported(experiment.data).items():
        chosen = some(cells, limit)
        if not chosen:
            continue
        drawn = sampled(pipe, [styled_captions(icon.name, icon.style)[0] for icon in chosen])
        metrics |= {
            f"{name}_{kind}": value for name, value in judged(drawn, chosen, everything).items()
        }
    return metrics


def some(icons: Sequence[Icon], limit: int) -> list[Icon]:
    """At most `limit` icons, chosen by a hash of their names: the same whatever else there is."""
    return by_hash(icons)[:limit]


def judged(
    drawn: np.ndarray, icons: Sequence[Icon], everything: Sequence[Icon]
) -> dict[str, Accuracy | float]:
    """The metrics of images (N,S,S,3) uint8 drawn for N icons, told from others among
    `everything`."""
    found: dict[str, Accuracy | float] = {}
    hits, _ = _hits(drawn, icons, lambda icon: _hundred(icon, everything))
    found["retrieval_at_1_of_100"] = Accuracy.of(hits)
    for name, shared in SIBLINGS.items():
        groups: dict[tuple[str, ...] | None, list[Icon]] = {None: []}
        for one in everything:
            if (group := shared(one)) is not None:
                groups.setdefault(group, []).append(one)
        candidates = {icon: groups.get(shared(icon), []) for icon in icons}
        hits, sizes = _hits(drawn, icons, candidates.__getitem__)
        if hits:
            found[name] = Accuracy.of(hits)
            found[f"{name}_chance"] = float(np.mean([1 / size for size in sizes]))
    return found


def _hundred(icon: Icon, everything: Sequence[Icon]) -> list[Icon]:
    """The icon and 99 others of its style, chosen by a hash of both names."""
    others = [one for one in everything if one.style == icon.style and one.key != icon.key]
    others.sort(key=lambda one: _hash(f"{icon.label}/{one.label}"))
    return [icon, *others[: CANDIDATES - 1]]


def _hits(
    drawn: np.ndarray, icons: Sequence[Icon], candidates: Callable[[Icon], list[Icon]]
) -> tuple[list[bool], list[int]]:
    """For each icon with more than one candidate, itself among them: whether what was drawn is
    nearest to its own image, and how many there are."""
    hits = []
    sizes = []
    for image, icon in zip(drawn, icons, strict=True):
        among = candidates(icon)
        if icon in among and len(among) > 1:
            images = np.stack([composed(one.image, "white") for one in among])
            nearest = among[int(squared_errors(image[None], images)[0].argmin())]
            hits.append(nearest.key == icon.key and nearest.style == icon.style)
            sizes.append(len(among))
    return hits, sizes


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
