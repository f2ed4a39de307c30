"""`Source`: what every source of images and captions offers, and what makes one usable. Knows no
source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

from pipeline.config.data import DataConfig

Split = Literal["train", "held_out"]


class Source(Protocol):
    """Images with captions, numbered. Everything is asked for in batches."""

    name: str
    fingerprint: str
    """Changes when an image or a caption would."""

    @property
    def problems(self) -> list[str]:
        """What was left out or changed while reading, a line each, for the user."""
        ...

    def __len__(self) -> int: ...

    def images(self, indices: Sequence[int], draws: Sequence[int] | None = None) -> np.ndarray:
        """Images (N,S,S,3) uint8. A number per image in `draws` chooses its crop and whether it
        is mirrored, where the configuration has it vary; without them, each is its largest centred
        square."""
        ...

    def captions(self, indices: Sequence[int]) -> list[str]:
        """The first caption of each image."""
        ...

    def all_captions(self, indices: Sequence[int]) -> list[list[str]]:
        """Every caption of each image; each has at least one."""
        ...

    def names(self, indices: Sequence[int]) -> list[str]:
        """What to call each image in messages."""
        ...


def check_usable(name: str, usable: int, problems: Sequence[str]) -> None:
    """Raises ValueError where no image of a source is left, with what was left out."""
    if not usable:
        raise ValueError(
            f"{name} has no usable image with a caption; {'; '.join(problems) or 'it is empty'}"
        )


def check_splits(
    config: DataConfig, name: str, train: int, held_out: int, held_out_in_all: int
) -> None:
    """Raises ValueError where a source has no image to train on, or there is none at all to judge
    on."""
    if not train or not held_out_in_all:
        raise ValueError(
            f"{name} has {train} images to train on and {held_out} held out to judge on, and "
            "each needs at least "
            f"one; with few images another share than data.val_fraction={config.val_fraction} is "
            "needed (0.2)"
        )
