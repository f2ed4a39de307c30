"""`Source`, and `load_source`, which finds the one that a configuration names. Knows which sources there are, not how they read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from pipeline.data.config import DataConfig

Split = Literal["train", "held_out"]


class Source(Protocol):
    """Pictures with captions, numbered. Everything is asked for in batches."""

    name: str
    fingerprint: str
    """Changes when a picture or a caption would."""
    problems: list[str]
    """What was left out or changed while reading, a line each, for the user."""

    def __len__(self) -> int: ...

    def images(self, indices: Sequence[int]) -> np.ndarray:
        """Pictures (N,S,S,3) uint8."""
        ...

    def captions(self, indices: Sequence[int]) -> list[str]: ...


def load_source(config: DataConfig, split: Split) -> Source:
    """One split of the source that `config.source` names; splits are the same in every run.

    Raises:
        FileNotFoundError: the folder, the font or the names are not there; says what to install or give.
        ValueError: the source has no captions, lacks a column, or too many of its pictures are unreadable.
    """
    if config.source == "shapes":
        from pipeline.data.shapes_captions import ShapesSource

        return ShapesSource(config, split)
    if config.source == "emoji":
        from pipeline.data.emoji import EmojiSource

        return EmojiSource(config, split)
    path = Path(config.source).expanduser()
    if path.is_dir() and not is_saved_dataset(path):
        from pipeline.data.folder import FolderSource

        return FolderSource(path, config, split)
    from pipeline.data.hub import HubSource

    return HubSource(config, split)


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder was written by `datasets`' save_to_disk."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
