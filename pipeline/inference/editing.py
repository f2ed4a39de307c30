"""Editing parts of images: masks -> codes that are kept, canvases, composites. Knows images and
grids of codes; samples nothing.

White in a mask is replaced. A code is kept where no pixel of its cell is white.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.inference.plan import SamplingPlan
from stage1_tokenizer import Level, to_channels
from stage1_tokenizer.caller import warn_user

_WHITE = 128


@dataclass(frozen=True, eq=False, kw_only=True)
class EditPlan(SamplingPlan):
    """B images that differ from one image inside of a mask alone."""

    known: Tensor
    codes: Tensor
    original: Image.Image
    """In the channels of the tokenizer."""
    replaced: np.ndarray
    """(H,W) bool, true inside the mask."""

    def composite(self, drawn: Sequence[Image.Image]) -> list[Image.Image]:
        """The drawn images inside the mask, the original's own pixels everywhere else."""
        before = np.asarray(self.original)
        inside = self.replaced[..., None]
        return [Image.fromarray(np.where(inside, np.asarray(image), before)) for image in drawn]


def replaced_pixels(mask: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """A mask as bool (H,W), true where it is white.

    Raises:
        ValueError: the mask has another size than the image (width, height), or is not black and
            white.
    """
    if mask.size != size:
        raise ValueError(
            f"the mask is {mask.width}x{mask.height} and the image {size[0]}x{size[1]}; "
            "resize the mask"
        )
    if mask.mode not in ("1", "L"):
        raise ValueError(
            f"the mask has mode {mask.mode}; it must be black and white, of mode L or 1; "
            "convert it first"
        )
    return np.asarray(mask.convert("L")) >= _WHITE


def check_image(
    image: Image.Image, size: tuple[int, int], channels: int, name: str = "the image"
) -> Image.Image:
    """The image in RGB, or RGBA for a tokenizer of four channels.

    Args:
        size: height and width that it must have.
        channels: of the tokenizer.

    Raises:
        ValueError: it is not of the prior's size; says so of `name`.
    """
    image = to_channels(image, channels)
    height, width = size
    if image.size != (width, height):
        raise ValueError(
            f"{name} is {image.width}x{image.height} and this prior draws {width}x{height}; "
            "crop or resize it first"
        )
    return image


def keep_mask(replaced: np.ndarray, levels: Sequence[Level]) -> Tensor:
    """(N,) bool over all levels of the stream: the codes of cells without a replaced pixel
    (H,W)."""
    kept = []
    for level in levels:
        height, width = level.grid
        cells = replaced.reshape(
            height, replaced.shape[0] // height, width, replaced.shape[1] // width
        )
        kept.append(~cells.any(axis=(1, 3)).ravel())
    return torch.from_numpy(np.concatenate(kept))


def place_on_canvas(
    image: Image.Image, size: tuple[int, int], channels: int, at: tuple[int, int]
) -> tuple[Image.Image, Image.Image]:
    """A smaller image on a canvas of the height and width `size`, its top left corner `at` (x, y),
    and the mask of what is new.

    The border's pixels fill the gap, so that codes at the seam continue the image. `channels` are
    the tokenizer's.

    Raises:
        ValueError: the image does not lie on the canvas, or fills it.
    """
    image = to_channels(image, channels)
    height, width = size
    x, y = at
    right = width - x - image.width
    below = height - y - image.height
    if min(x, y, right, below) < 0:
        raise ValueError(
            f"an image of {image.width}x{image.height} at {x}, {y} does not lie on the canvas of "
            f"{width}x{height}; choose another place"
        )
    if not any((x, y, right, below)):
        raise ValueError(
            f"the image fills the canvas of {width}x{height}, so there is nothing to extend; give "
            "a smaller one"
        )
    canvas = np.pad(np.asarray(image), ((y, below), (x, right), (0, 0)), mode="edge")
    mask = np.full(size, 255, np.uint8)
    mask[y : y + image.height, x : x + image.width] = 0
    return Image.fromarray(canvas), Image.fromarray(mask)


def warn_if_trivial(known: Tensor) -> bool:
    """Whether there is nothing to sample. Warns where a mask is empty or full."""
    if known.all():
        warn_user(
            "the mask is empty: nothing is replaced, and the image comes back as it is; make what "
            "is "
            "to be replaced white"
        )
    elif not known.any():
        warn_user(
            "the mask touches every code: nothing of the image is kept, so this is plain sampling; "
            "make what is to be kept black"
        )
    return bool(known.all())


def random_keep_mask(seeds: Sequence[int], count: int, strength: float) -> Tensor:
    """(B,N) bool: the codes that a variation keeps, all but a fraction `strength` of them. They
    depend on each image's seed alone.

    Raises:
        ValueError: the strength is not above 0 and at most 1.
    """
    if not 0 < strength <= 1:
        raise ValueError(
            f"strength is {strength}; it is the fraction of the codes that are resampled, above 0 "
            "and at most 1"
        )
    replaced = max(round(strength * count), 1)
    known = torch.ones(len(seeds), count, dtype=torch.bool)
    for row, seed in zip(known, seeds, strict=True):
        generator = torch.Generator().manual_seed(int(seed))
        row[torch.randperm(count, generator=generator)[:replaced]] = False
    return known
