"""`Source`: what every source of images and captions offers, and what makes one usable. Knows no
source."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

import numpy as np

from pipeline.config.data import DataConfig
from pipeline.data.codes.dataset import ShardPlan

Split = Literal["train", "held_out"]
Item = TypeVar("Item")


@dataclass(frozen=True)
class ImageBatch:
    """Some images of a source, which can be viewed several times."""

    numbers: list[int]
    """Of the images, in the source or in the mixture that it is part of."""
    captions: list[list[str]]
    """Every caption of each image."""
    names: list[str]
    """What each image is called in its source."""
    view: Callable[[Sequence[int] | None], np.ndarray]
    """Draws -> images (B,H,W,C) uint8; see `Source.images`."""


class Source:
    """Images with captions. Everything is read in batches.

    Most sources number their images and read them in any order: they implement `images`,
    `all_captions` and `names`. A stream does not know how many images it has: `num_images` is None,
    and these three and `len` raise TypeError.
    """

    name: str
    fingerprint: str
    """Changes when an image, a caption or a split would."""
    earlier_fingerprint: str | None = None
    """What earlier versions call the same images; None where that is the same."""
    num_images: int | None
    """None for a stream, which does not know it."""
    weights: Sequence[float] = (1.0,)
    """Of the parts of a mixture."""
    starts: Sequence[int] = (0,)
    """The number of each part's first image."""

    @property
    def parts(self) -> Sequence[Source]:
        """The parts of a mixture; of any other source itself."""
        return [self]

    @property
    def problems(self) -> list[str]:
        """What was skipped or changed while reading, one line each, for the user."""
        return []

    @property
    def number_limit(self) -> int:
        """The numbers of the images are below this."""
        return len(self)

    def __len__(self) -> int:
        if self.num_images is None:
            raise self._unordered()
        return self.num_images

    def _unordered(self) -> TypeError:
        return TypeError(
            f"{self.name} is streamed, so its images are neither counted nor read in any order; "
            "use `batch_loader`, or set data.streaming=false"
        )

    def images(self, indices: Sequence[int], draws: Sequence[int] | None = None) -> np.ndarray:
        """Images (N,H,W,C) uint8; with four channels, alpha is the last and colours are
        premultiplied by it. One number per image in `draws` chooses its crop and whether it is
        mirrored, where the configuration varies them. Without `draws`, each is its largest centred
        part of the shape of `image_size`."""
        raise self._unordered()

    def all_captions(self, indices: Sequence[int]) -> list[list[str]]:
        """Every caption of each image; each has at least one, unless the source was loaded without
        `require_captions`."""
        raise self._unordered()

    def names(self, indices: Sequence[int]) -> list[str]:
        """What to call each image in messages."""
        raise self._unordered()

    def captions(self, indices: Sequence[int]) -> list[str]:
        """The first caption of each image; empty where it has none."""
        return [captions[0] if captions else "" for captions in self.all_captions(indices)]

    def encoding_plan(self, first: int, limit: int | None) -> dict[str, int | None]:
        """What a codes dataset holds of this source; see `planned_files`.

        Args:
            first: number of its first image.
            limit: images that are encoded at most; None encodes all.
        """
        return {"first": first, "rows": min(len(self), limit or len(self))}

    def batches(self, unit: ShardPlan, first: int, size: int) -> Iterator[ImageBatch]:
        """The images of one file of a codes dataset, up to `size` at a time.

        Args:
            first: number of the source's first image.
        """
        assert unit.rows is not None, "the plan is one of a stream"
        for start in range(0, len(unit.rows), size):
            numbers = list(unit.rows[start : start + size])
            rows = [number - first for number in numbers]
            captions = self.all_captions(rows)
            yield ImageBatch(numbers, captions, self.names(rows), partial(self.images, rows))


def in_places(found: Iterable[tuple[Sequence[int], Iterable[Item]]]) -> list[Item]:
    """One list of items, from groups of (places in it, items there)."""
    by_place = {
        place: item for places, items in found for place, item in zip(places, items, strict=True)
    }
    return [by_place[place] for place in range(len(by_place))]


def check_usable(
    name: str, usable: int, problems: Sequence[str], *, require_captions: bool = True
) -> None:
    """Raises ValueError where no image of a source is left, with what was skipped."""
    if not usable:
        wanted = "usable image with a caption" if require_captions else "usable image"
        why = "; ".join(problems) or "it is empty"
        raise ValueError(f"{name} has no {wanted}: {why}; add some, or repair these")


def check_splits(
    config: DataConfig, name: str, train: int | None, held_out: int, held_out_in_all: int
) -> None:
    """Raises ValueError where a source has no image to train on, or where no source has an image to
    validate on.

    Args:
        train: images to train on; None where a stream does not know yet.
    """
    if train == 0 or not held_out_in_all:
        count = "an unknown number of" if train is None else train
        raise ValueError(
            f"{name} has {count} images to train on and {held_out} held out to judge on, and each "
            f"needs at least one; {more_held_out(name, config.val_fraction)}"
        )


def more_held_out(source: str, val_fraction: float) -> str:
    """What to do for more held-out images of a source, as the end of an error."""
    if source == "icons":  # which hold cells out, and by another rule
        return "add drawings of other names"
    return f"raise data.val_fraction (now {val_fraction}), e.g. to 0.2"
