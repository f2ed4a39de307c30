"""Reads an image of the embedded world back into objects, and checks claims against it. Knows
sprites and pixels; no captions.

An image is read in four steps: the background is the palette colour nearest to the border's
median; what differs from it falls into connected components; a component's colour is the palette
colour nearest to its fullest pixels; its coverage (how far each pixel went from background to
colour) is matched against every (shape, size) sprite at small offsets. A match must be good to
count, so a smear is not read as whatever it resembles most.

The scene that was read is then drawn again. Where too many pixels of the image differ from that
drawing, no claim can make the image right: it shows something that the reading does not hold, such
as an object in two colours, a colour that is none of the palette, or specks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np

from pipeline.data.builtin.shapes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    Item,
    Scene,
    draw,
    sprite,
)
from pipeline.data.builtin.shapes_captions import Claims, ObjectClaim, clear_relation

FOREGROUND = 45.0
"""RGB distance from the background above which a pixel belongs to an object (objects' colours are
90 or more away)."""
MATCH = 0.88
"""Least similarity (cosine of coverages) of a component to its best sprite; blur lowers it little,
a wrong outline a lot."""
SPECK = 0.35
"""Components with less than this share of the smallest sprite's area are ignored."""
COLOUR_LIMIT = 30.0
"""RGB distance from the palette above which an object or the background has no named colour."""
DIFFERENT = 60.0
"""RGB distance above which a pixel of the image differs from the scene drawn again."""
DIFFERENT_PIXELS = 12 / 64**2
"""Share of the image's pixels that may differ: 12 at 64x64."""
_OFFSETS = 2


@dataclass(frozen=True)
class Reading:
    """What an image shows."""

    background: str
    items: tuple[Item, ...]
    unreadable: int
    """Components that match no sprite well, and colours (the background's too) that are none of the
    palette."""
    different: int
    """Pixels that differ from the scene drawn again."""
    image_size: int


@dataclass(frozen=True)
class Verdict:
    """Which of a caption's claims hold. A kind that the caption does not mention is None."""

    correct: bool
    redraw: bool
    """The scene that was read, drawn again, is the image but for few pixels."""
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
    ground, away = _nearest(np.median(border, axis=0), BACKGROUNDS)
    back = np.array(BACKGROUNDS[ground], dtype=np.float32)
    distance = np.sqrt(((pixels - back) ** 2).sum(-1))
    smallest = min(float(sprite(s, "small", size).sum()) for s in SHAPES)
    items = []
    unreadable = int(away > COLOUR_LIMIT)
    for members in components(distance > FOREGROUND):
        if len(members) < SPECK * smallest:
            continue
        item = _match(pixels, distance, members, back)
        if item is None:
            unreadable += 1
        else:
            items.append(item)
    again = draw(Scene(ground, tuple(items)), size).astype(np.float32)
    different = np.sqrt(((pixels - again) ** 2).sum(-1)) > DIFFERENT
    return Reading(ground, tuple(items), unreadable, int(different.sum()), size)


def _match(
    pixels: np.ndarray, distance: np.ndarray, members: np.ndarray, back: np.ndarray
) -> Item | None:
    """The object that a component shows; None where none fits."""
    rows, columns = members.T
    far = distance[rows, columns]
    # The pixels of most coverage show the colour itself; edges are mixed with the background.
    full = far >= 0.8 * np.quantile(far, 0.9)
    colour, away = _nearest(np.median(pixels[rows[full], columns[full]], axis=0), COLOURS)
    if away > COLOUR_LIMIT:
        return None
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
    if similarity < MATCH:
        return None
    return Item(shape, colour, size, x + dx, y + dy)


def _nearest(colour: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> tuple[str, float]:
    """The nearest colour's name, and its distance."""
    name = min(palette, key=lambda name: math.dist(colour, palette[name]))
    return name, math.dist(colour, palette[name])


def check(seen: Reading | np.ndarray, claims: Claims) -> Verdict:
    """Checks an image, or its reading, against a caption's claims: all must hold, and the image
    must show nothing further."""
    reading = seen if isinstance(seen, Reading) else read_scene(seen)
    redraw = reading.different <= DIFFERENT_PIXELS * reading.image_size**2
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
                clear_relation(order[a], order[b], reading.image_size) == relation
                for a, relation, b in claims.relations
            )
            if bound:
                best = max(best, (sizes, related), key=sum)
    sizes, related = best
    return Verdict(
        correct=redraw and count and sizes and related and background is not False,
        redraw=redraw,
        count=count,
        shapes=shapes,
        colours=colours,
        sizes=sizes if named else None,
        relations=related if claims.relations else None,
        background=background,
    )


def _fits(item: Item, claim: ObjectClaim) -> bool:
    return (item.shape, item.colour) == (claim.shape, claim.colour) and claim.size in (
        None,
        item.size,
    )


def _same(found: Sequence[str], claimed: Sequence[str]) -> bool:
    return sorted(found) == sorted(claimed)
