"""Reads an image of the embedded world back into objects, and checks claims against it. Knows
sprites and pixels; no captions.

An image is read in four steps: the background is the palette colour nearest to the border's
median; what differs from it falls into connected components; a component's colour is the palette
colour nearest to its fullest pixels; its coverage (how far each pixel went from background to
colour) is matched against every (shape, size) sprite at small offsets. A match must be good to
count, so a smear is not read as whatever it resembles most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import permutations

import numpy as np

from pipeline.data.builtin.shapes import BACKGROUNDS, COLOURS, SHAPES, SIZES, sprite
from pipeline.data.builtin.shapes_captions import Claims, ObjectClaim

FOREGROUND = 45.0
"""RGB distance from the background above which a pixel belongs to an object (objects' colours are
90 or more away)."""
MATCH = 0.88
"""Least similarity (cosine of coverages) of a component to its best sprite; blur lowers it little,
a wrong outline a lot."""
SPECK = 0.35
"""Components with less than this share of the smallest sprite's area are ignored."""
APART = 0.06
"""How far apart, as a share of the image, centres lie for a stated relation to hold."""
_OFFSETS = 2


@dataclass(frozen=True)
class FoundItem:
    """One object read from an image; `match` is its similarity to the best sprite, 1 for a perfect
    one."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    match: float


@dataclass(frozen=True)
class Reading:
    """What an image shows; `unreadable` counts components that match no sprite well."""

    background: str
    items: tuple[FoundItem, ...]
    unreadable: int
    image_size: int


@dataclass(frozen=True)
class Verdict:
    """Which of a caption's claims hold. A kind that the caption does not mention is None."""

    correct: bool
    count: bool
    shapes: bool
    colours: bool
    sizes: bool | None
    relations: bool | None
    background: bool | None


@lru_cache(maxsize=8)
def _bank(image_size: int) -> tuple[np.ndarray, list[tuple[str, str, int, int]], int]:
    """Every sprite at every offset in a window of n x n pixels: (M, n*n), the label of each row,
    and n.

    At offset 0 the middle of the sprite's bounding box is in the middle of the window. A label is
    (shape, size, dx, dy); dx and dy are the sprite's centre relative to the middle.
    """
    reach = (
        max(sprite(s, z, image_size).shape[0] for s in SHAPES for z in SIZES) // 2 + 2 * _OFFSETS
    )
    n = 2 * reach + 1
    rows = []
    labels = []
    for shape in SHAPES:
        for size in SIZES:
            small = sprite(shape, size, image_size)
            half = len(small) // 2
            middle_y, middle_x = (_middle(np.nonzero(small > 0.2)[axis]) - half for axis in (0, 1))
            for dy in range(-_OFFSETS - middle_y, _OFFSETS - middle_y + 1):
                for dx in range(-_OFFSETS - middle_x, _OFFSETS - middle_x + 1):
                    window = np.zeros((n, n), dtype=np.float32)
                    top = reach + dy - half
                    left = reach + dx - half
                    # What would lie outside the window is cut off.
                    inside = small[max(-top, 0) : n - top, max(-left, 0) : n - left]
                    window[max(top, 0) : top + len(small), max(left, 0) : left + len(small)] = (
                        inside
                    )
                    rows.append(window.ravel())
                    labels.append((shape, size, dx, dy))
    return np.stack(rows), labels, n


def _middle(values: np.ndarray) -> int:
    return round((int(values.min()) + int(values.max())) / 2)


def components(mask: np.ndarray) -> list[np.ndarray]:
    """Connected sets (4 neighbours) of a bool image (H,W), each as (pixels, 2) rows and
    columns."""
    height, width = mask.shape
    left = set(map(int, np.flatnonzero(mask)))
    found = []
    while left:
        stack = [left.pop()]
        members = []
        while stack:
            pixel = stack.pop()
            members.append(pixel)
            row, column = divmod(pixel, width)
            for near, inside in (
                (pixel - width, row > 0),
                (pixel + width, row < height - 1),
                (pixel - 1, column > 0),
                (pixel + 1, column < width - 1),
            ):
                if inside and near in left:
                    left.remove(near)
                    stack.append(near)
        found.append(np.stack(divmod(np.array(members), width), axis=1))
    return found


def read_scene(image: np.ndarray) -> Reading:
    """Reads a uint8 image (S,S,3).

    Raises:
        ValueError: the array is no square uint8 RGB image of at least 32 pixels.
    """
    if (
        image.ndim != 3
        or image.shape[2] != 3
        or image.shape[0] != image.shape[1]
        or image.dtype != np.uint8
    ):
        raise ValueError(f"an image must be uint8 (S,S,3); this one is {image.dtype} {image.shape}")
    if len(image) < 32:
        raise ValueError(f"the image has {len(image)} pixels and must have at least 32")
    size = len(image)
    pixels = image.astype(np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = _nearest(np.median(border, axis=0), BACKGROUNDS)
    back = np.array(BACKGROUNDS[ground], dtype=np.float32)
    distance = np.sqrt(((pixels - back) ** 2).sum(-1))
    smallest = min(float(sprite(s, "small", size).sum()) for s in SHAPES)
    items = []
    unreadable = 0
    for members in components(distance > FOREGROUND):
        if len(members) < SPECK * smallest:
            continue
        item = _match(pixels, distance, members, back)
        if item.match >= MATCH:
            items.append(item)
        else:
            unreadable += 1
    return Reading(ground, tuple(items), unreadable, size)


def _match(
    pixels: np.ndarray, distance: np.ndarray, members: np.ndarray, back: np.ndarray
) -> FoundItem:
    rows, columns = members.T
    far = distance[rows, columns]
    # The pixels of most coverage show the colour itself; edges are mixed with the background.
    full = far >= 0.8 * np.quantile(far, 0.9)
    colour = _nearest(np.median(pixels[rows[full], columns[full]], axis=0), COLOURS)
    direction = np.array(COLOURS[colour], dtype=np.float32) - back
    bank, labels, n = _bank(len(pixels))
    reach = n // 2
    y = _middle(rows)
    x = _middle(columns)
    window = np.zeros((n, n), dtype=np.float32)
    # The component and the ring of pixels around it: its antialiased edge is below the threshold.
    own = np.zeros(distance.shape, dtype=bool)
    own[rows, columns] = True
    own[1:] |= own[:-1].copy()
    own[:-1] |= own[1:].copy()
    own[:, 1:] |= own[:, :-1].copy()
    own[:, :-1] |= own[:, 1:].copy()
    grown_rows, grown_columns = np.nonzero(own)
    coverage = (
        (pixels[grown_rows, grown_columns] - back) @ direction / (direction @ direction)
    ).clip(0, 1)
    r = grown_rows - y + reach
    c = grown_columns - x + reach
    inside = (r >= 0) & (r < n) & (c >= 0) & (c < n)
    window[r[inside], c[inside]] = coverage[inside]
    lost = float((coverage[~inside] ** 2).sum())
    flat = window.ravel()
    squared = (flat**2).sum() - 2 * bank @ flat + (bank**2).sum(1)
    best = int(squared.argmin())
    shape, size, dx, dy = labels[best]
    energy = float((flat**2).sum()) + lost
    similarity = (
        float(bank[best] @ flat / np.sqrt((bank[best] ** 2).sum() * energy)) if energy else 0.0
    )
    return FoundItem(shape, colour, size, x + dx, y + dy, similarity)


def _nearest(colour: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: math.dist(colour, palette[name]))


def check(seen: Reading | np.ndarray, claims: Claims) -> Verdict:
    """Checks an image, or its reading, against a caption's claims: all must hold, and there must be
    no further object."""
    reading = seen if isinstance(seen, Reading) else read_scene(seen)
    count = len(reading.items) == len(claims.objects) and not reading.unreadable
    background = None if claims.background is None else reading.background == claims.background
    shapes = _same([i.shape for i in reading.items], [o.shape for o in claims.objects])
    colours = _same([i.colour for i in reading.items], [o.colour for o in claims.objects])
    named = any(o.size for o in claims.objects)
    best: tuple[bool, bool] = (False, False)
    if count:
        for order in permutations(reading.items):
            sizes = all(_fits(i, o) for i, o in zip(order, claims.objects, strict=True))
            bound = all(
                (i.shape, i.colour) == (o.shape, o.colour)
                for i, o in zip(order, claims.objects, strict=True)
            )
            related = all(
                _holds(order[a], relation, order[b], reading.image_size)
                for a, relation, b in claims.relations
            )
            if bound:
                best = max(best, (sizes, related), key=sum)
    sizes, related = best
    return Verdict(
        correct=count and sizes and related and background is not False,
        count=count,
        shapes=shapes,
        colours=colours,
        sizes=sizes if named else None,
        relations=related if claims.relations else None,
        background=background,
    )


def _fits(item: FoundItem, claim: ObjectClaim) -> bool:
    return (item.shape, item.colour) == (claim.shape, claim.colour) and claim.size in (
        None,
        item.size,
    )


def _holds(a: FoundItem, relation: str, b: FoundItem, image_size: int) -> bool:
    apart = {"left of": b.x - a.x, "right of": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}[
        relation
    ]
    return apart >= APART * image_size


def _same(found: Sequence[str], claimed: Sequence[str]) -> bool:
    return sorted(found) == sorted(claimed)


def accuracy(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Fraction of verdicts that hold: overall (`correct`), and of each kind among the captions that
    mention it."""
    shares = {}
    for field in fields(Verdict):
        values = [
            v for v in (getattr(verdict, field.name) for verdict in verdicts) if v is not None
        ]
        if values:
            shares[field.name] = float(np.mean(values))
    return shares
