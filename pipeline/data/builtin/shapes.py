"""The embedded world: scenes of shapes, drawn in-process. Knows scenes and pixels; knows no
captions and reads no images.

Scene i of a split is a pure function of (seed, split, i). Sizes and positions scale with the
image; at 64 pixels objects are about 16, 22 and 29 pixels wide and at least 4 pixels apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 30, 38),
    "orange": (245, 140, 15),
    "yellow": (250, 220, 40),
    "green": (35, 155, 55),
    "cyan": (40, 205, 225),
    "blue": (35, 70, 215),
    "purple": (125, 35, 165),
    "pink": (255, 110, 185),
    "brown": (140, 75, 20),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "silver": (195, 195, 195),
    "gray": (128, 128, 128),
    "charcoal": (55, 55, 55),
    "black": (5, 5, 5),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "crescent")
SIZES: dict[str, float] = {"small": 0.125, "medium": 0.17, "large": 0.225}
"""Half an object's extent as a share of the image's width."""
SPLITS = ("train", "held_out", "new_pairs")

NEW_PAIRS = frozenset(
    (shape, tuple(COLOURS)[(2 * i + 1) % len(COLOURS)]) for i, shape in enumerate(SHAPES)
)
"""(shape, colour) pairs that never occur in training; each shape and each of these colours occurs
in other pairs."""

_GAP = 4 / 64
_TRIES = 60


@dataclass(frozen=True)
class Item:
    """One object; x and y are its centre in pixels, from the top left."""

    shape: str
    colour: str
    size: str
    x: int
    y: int


@dataclass(frozen=True)
class Scene:
    """What an image shows."""

    background: str
    items: tuple[Item, ...]


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points lie in a shape of half-extent 1; y grows downwards."""
    radius = np.hypot(x, y)
    match shape:
        case "circle":
            return radius <= 1
        case "square":
            return np.maximum(np.abs(x), np.abs(y)) <= 0.88
        case "triangle":
            return (y <= 0.85) & (np.abs(x) <= (y + 0.95) / 1.8)
        case "star":
            # Five spikes: the polar angle folded onto one half-spike, whose edge is a straight
            # line.
            angle = np.abs((np.arctan2(x, -y) + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5)
            tip = 1.08
            notch = 0.42
            across = tip * notch * math.sin(math.pi / 5)
            edge = tip * np.sin(angle) + notch * np.sin(math.pi / 5 - angle)
            return radius * edge <= across
        case "cross":
            return (np.minimum(np.abs(x), np.abs(y)) <= 0.32) & (
                np.maximum(np.abs(x), np.abs(y)) <= 1
            )
        case "ring":
            return (radius <= 1) & (radius >= 0.55)
        case "heart":
            lobes = np.hypot(np.abs(x) - 0.48, y + 0.35) <= 0.53
            return lobes | ((y >= -0.35) & (np.abs(x) * 1.22 + y * 0.98 <= 0.91) & (np.abs(x) <= 1))
        case "crescent":
            return (radius <= 1) & (np.hypot(x - 0.55, y) > 0.8)
    raise ValueError(f"{shape!r} is no shape; choose one of {', '.join(SHAPES)}")


@lru_cache(maxsize=512)
def sprite(shape: str, size: str, image_size: int) -> np.ndarray:
    """Coverage (n,n) in [0,1] of a centred object; n is odd. Antialiased by 8x8 samples per
    pixel."""
    half = SIZES[size] * image_size
    reach = math.ceil(half * 1.1)
    n = 2 * reach + 1
    samples = 8
    points = ((np.arange(n * samples) + 0.5) / samples - n / 2) / half
    inside = _inside(shape, points[None, :], points[:, None])
    return inside.reshape(n, samples, n, samples).mean(axis=(1, 3)).astype(np.float32)


def draw(scene: Scene, image_size: int) -> np.ndarray:
    """A scene as uint8 (image_size, image_size, 3)."""
    image = np.empty((image_size, image_size, 3), dtype=np.uint8)
    image[:] = BACKGROUNDS[scene.background]
    background = np.array(BACKGROUNDS[scene.background], dtype=np.float32)
    for item in scene.items:
        patch = _patch(item.shape, item.size, item.colour, scene.background, image_size)
        reach = len(patch) // 2
        top = item.y - reach
        left = item.x - reach
        # A sprite's margin can lie outside the image. It is empty.
        rows = slice(max(top, 0), min(top + len(patch), image_size))
        columns = slice(max(left, 0), min(left + len(patch), image_size))
        cut = patch[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
        target = image[rows, columns]
        np.copyto(target, cut, where=(cut != background.astype(np.uint8)).any(-1, keepdims=True))
    return image


@lru_cache(maxsize=4096)
def _patch(shape: str, size: str, colour: str, background: str, image_size: int) -> np.ndarray:
    """A sprite in its colour on its background: uint8 (n,n,3)."""
    coverage = sprite(shape, size, image_size)[..., None]
    front, back = (
        np.array(c, dtype=np.float32) for c in (COLOURS[colour], BACKGROUNDS[background])
    )
    return (back + coverage * (front - back)).round().astype(np.uint8)


class ShapesWorld:
    """Endless scenes of one split.

    Args:
        image_size: height and width of an image, at least 32.
        grid_cells: evenly spaced centres per axis where objects can stand; 0 allows any pixel.
        split: `train` and `held_out` have the same (shape, colour) pairs and different seeds. Each
            scene of `new_pairs` has a pair that training never has.

    Raises:
        ValueError: the size is too small, the counts are not 1 to 3, grid_cells does not divide
            the size, or the split is unknown.
    """

    def __init__(
        self,
        image_size: int = 64,
        *,
        min_objects: int = 1,
        max_objects: int = 3,
        grid_cells: int = 0,
        seed: int = 0,
        split: str = "train",
    ) -> None:
        if image_size < 32:
            raise ValueError(f"image_size is {image_size}; the shapes need at least 32 pixels")
        if not 1 <= min_objects <= max_objects <= 3:
            raise ValueError(
                f"min_objects {min_objects} and max_objects {max_objects} must satisfy 1 <= min <= "
                "max <= 3"
            )
        if grid_cells and (grid_cells < 8 or image_size % grid_cells):
            raise ValueError(
                f"grid_cells is {grid_cells}; it must be 0 (any pixel) or a divisor of image_size "
                f"{image_size}, at least 8"
            )
        if split not in SPLITS:
            raise ValueError(f"{split!r} is no split; choose one of {', '.join(SPLITS)}")
        self.image_size = image_size
        self.seed = seed
        self.split = split
        self.min_objects = min_objects
        self.max_objects = max_objects
        self._step = image_size // grid_cells if grid_cells else 1
        pairs = [(s, c) for s in SHAPES for c in COLOURS]
        self._seen = [p for p in pairs if p not in NEW_PAIRS]
        self._new = [p for p in pairs if p in NEW_PAIRS]

    def random(self, index: int, stream: int) -> np.random.Generator:
        """The generator of scene `index`. Streams 0 (scene) and 1 (caption) are independent."""
        key = self.seed * 64 + SPLITS.index(self.split) * 2 + stream
        return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, index]))

    def scene(self, index: int) -> Scene:
        """Scene number `index`."""
        numbers = iter(self.random(index, 0).random(4 * _TRIES * 3 + 32).tolist())
        count = self.min_objects + _choice(numbers, self.max_objects - self.min_objects + 1)
        background = tuple(BACKGROUNDS)[_choice(numbers, len(BACKGROUNDS))]
        items: list[Item] = []
        for i in range(count):
            pairs = self._new if self.split == "new_pairs" and i == 0 else self._seen
            shape, colour = pairs[_choice(numbers, len(pairs))]
            size = tuple(SIZES)[_choice(numbers, len(SIZES))]
            # Small objects always fit. A larger one that finds no place in `_TRIES` is shrunk.
            for smaller in (size, "medium", "small", "small"):
                if SIZES[smaller] <= SIZES[size] and (
                    place := self._place(items, smaller, numbers)
                ):
                    items.append(Item(shape, colour, smaller, *place))
                    break
        return Scene(background, tuple(items))

    def _place(
        self, items: Sequence[Item], size: str, numbers: Iterator[float]
    ) -> tuple[int, int] | None:
        half = SIZES[size] * self.image_size
        step = self._step
        margin = math.ceil(half) + 1
        low = math.ceil(margin / step)
        span = math.ceil((self.image_size - margin) / step) - low
        for _ in range(_TRIES // 4):
            x, y = ((low + _choice(numbers, span)) * step for _ in range(2))
            if all(
                max(abs(x - other.x), abs(y - other.y))
                >= half + SIZES[other.size] * self.image_size + _GAP * self.image_size
                for other in items
            ):
                return x, y
        return None

    def images(self, indices: Sequence[int]) -> np.ndarray:
        """Images (N, image_size, image_size, 3) uint8."""
        return np.stack([draw(self.scene(int(i)), self.image_size) for i in indices])


def _choice(numbers: Iterator[float], count: int) -> int:
    return int(next(numbers) * count)
