"""Words for scenes: captions in varied wording, and what each one claims. Knows scenes; knows no
pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.config.data import DataConfig
from pipeline.data.builtin.shapes import Item, Scene, ShapesWorld
from pipeline.data.readers.transparency import as_channels
from pipeline.data.source import Source

SIZE_WORDS = {
    "small": ("small", "tiny", "little"),
    "medium": ("medium", "medium-sized"),
    "large": ("large", "big", "huge"),
}
SHAPE_WORDS = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "plus sign"),
    "ring": ("ring", "hoop"),
    "heart": ("heart",),
    "crescent": ("crescent", "moon"),
}
COLOUR_WORDS = {"purple": ("purple", "violet"), "cyan": ("cyan", "turquoise")}
RELATION_WORDS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
PLAIN_FRAMES = ("{}", "a picture of {}", "an image of {}", "a drawing of {}")
GROUND_FRAMES = (
    "{} on a {ground} background",
    "{} on {ground}",
    "a {ground} background with {}",
    "{ground} background, {}",
)

MENTION_SIZE = 0.8
MENTION_GROUND = 0.6
MENTION_RELATION = 0.75
CLEAR = 0.12
"""How far apart, as a share of the image, centres lie before a relation between them is
stated."""


@dataclass(frozen=True)
class ObjectClaim:
    """What a caption says of one object; a size of None goes unmentioned."""

    shape: str
    colour: str
    size: str | None


@dataclass(frozen=True)
class Claims:
    """Everything a caption states: these objects and no others, and how they lie."""

    objects: tuple[ObjectClaim, ...]
    relations: tuple[tuple[int, str, int], ...] = ()
    """(i, relation, j): object i is left of / right of / above / below object j."""
    background: str | None = None


@dataclass(frozen=True)
class Prompt:
    """A caption and its claims."""

    text: str
    claims: Claims


def describe(scene: Scene, image_size: int, rng: np.random.Generator) -> Prompt:
    """A caption in random wording; everything in it is true of the scene."""
    numbers = iter(rng.random(40).tolist())
    order = sorted(range(len(scene.items)), key=lambda _: next(numbers))
    items = [scene.items[i] for i in order]
    claims = []
    phrases = []
    for item in items:
        size = item.size if next(numbers) < MENTION_SIZE else None
        claims.append(ObjectClaim(item.shape, item.colour, size))
        words = [_pick(SIZE_WORDS[size], numbers)] if size else []
        words += [
            _pick(COLOUR_WORDS.get(item.colour, (item.colour,)), numbers),
            _pick(SHAPE_WORDS[item.shape], numbers),
        ]
        phrases.append(("an " if words[0][0] in "aeiou" else "a ") + " ".join(words))
    relations: tuple[tuple[int, str, int], ...] = ()
    if len(items) == 1:
        body = phrases[0]
    else:
        relation = clear_relation(items[0], items[1], image_size)
        if relation and next(numbers) < MENTION_RELATION:
            relations = ((0, relation, 1),)
            body = f"{phrases[0]} {_pick(RELATION_WORDS[relation], numbers)} {phrases[1]}"
            body += f" and {phrases[2]}" if len(items) == 3 else ""
        else:
            body = (
                f"{phrases[0]} and {phrases[1]}"
                if len(items) == 2
                else f"{phrases[0]}, {phrases[1]} and {phrases[2]}"
            )
    if next(numbers) < MENTION_GROUND:
        text = _pick(GROUND_FRAMES, numbers).format(body, ground=scene.background)
        return Prompt(text, Claims(tuple(claims), relations, scene.background))
    return Prompt(_pick(PLAIN_FRAMES, numbers).format(body), Claims(tuple(claims), relations))


def clear_relation(a: Item, b: Item, image_size: int) -> str | None:
    """The relation of a to b along the axis on which they are farther apart; None where it is not
    clear."""
    dx = b.x - a.x
    dy = b.y - a.y
    if max(abs(dx), abs(dy)) < CLEAR * image_size or 0.75 < abs(dx) / max(abs(dy), 1) < 1.33:
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


class ShapesSource(Source):
    """The embedded world as a source of images and captions."""

    name = "shapes"

    def __init__(self, config: DataConfig, split: str) -> None:
        size = config.size[0]
        options = config.shapes
        fewest = options.min_objects
        most = options.max_objects
        cells = options.grid_cells
        self.world = ShapesWorld(
            size, min_objects=fewest, max_objects=most, grid_cells=cells, split=split
        )
        self._alpha = config.alpha
        self.num_images = options.num_scenes
        self.fingerprint = f"shapes1-{size}-{fewest}{most}-{cells}-{split}"

    def images(self, indices: Sequence[int], draws: Sequence[int] | None = None) -> np.ndarray:
        """Images (N,S,S,C) uint8; each is seen as it is, whatever the draws."""
        return as_channels(self.world.images(indices), self._alpha)

    def captions(self, indices: Sequence[int]) -> list[str]:
        return [prompt.text for prompt in self.prompts(indices)]

    def all_captions(self, indices: Sequence[int]) -> list[list[str]]:
        return [[text] for text in self.captions(indices)]

    def names(self, indices: Sequence[int]) -> list[str]:
        return [f"scene {int(i)}" for i in indices]

    def prompts(self, indices: Sequence[int]) -> list[Prompt]:
        """Captions with their claims."""
        world = self.world
        return [
            describe(world.scene(int(i)), world.image_size, world.random(int(i), 1))
            for i in indices
        ]


def _pick(words: Sequence[str], numbers: Iterator[float]) -> str:
    return words[int(next(numbers) * len(words))]
