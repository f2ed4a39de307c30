"""`Source`, and `load_sources`, which finds the one that a configuration names. Knows which sources there are, not how they read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from pipeline.data.config import WORLDS, DataConfig
from pipeline.data.rows import Rows
from pipeline.data.share import ALONE, Share

Split = Literal["train", "held_out"]
_TABLES = (".csv", ".jsonl")


class Source(Protocol):
    """Pictures with captions, numbered. Everything is asked for in batches."""

    name: str
    fingerprint: str
    """Changes when a picture or a caption would."""

    @property
    def problems(self) -> list[str]:
        """What was left out or changed while reading, a line each, for the user."""
        ...

    def __len__(self) -> int: ...

    def images(self, indices: Sequence[int], draws: Sequence[int] | None = None) -> np.ndarray:
        """Pictures (N,S,S,3) uint8. A number a picture in `draws` chooses its crop and whether it is mirrored, where the configuration
        has it vary; without them, each is its largest centred square."""
        ...

    def captions(self, indices: Sequence[int]) -> list[str]:
        """The first caption of each picture."""
        ...

    def all_captions(self, indices: Sequence[int]) -> list[list[str]]:
        """Every caption of each picture; each has at least one."""
        ...

    def names(self, indices: Sequence[int]) -> list[str]:
        """What to call each picture in messages."""
        ...


def load_sources(config: DataConfig, folder: Path | None = None, share: Share = ALONE) -> tuple[Any, Source]:
    """Training and held-out pictures of the source that `config` names; they are the same in every run.

    Args:
        folder: where to keep what was found out about the pictures, so that a later call is quick.
        share: this process's part of opening every picture.

    Returns:
        A `Source` each; with `data.streaming` the first is a `StreamSource`, or a mixture with one in it.

    Raises:
        FileNotFoundError: the folder, the font or the names are not there; says what to install or give.
        ValueError: the source has no captions, lacks a column, or too many of its pictures are unreadable.
    """
    if config.mix:
        from pipeline.data.mixing import MixedSource

        # What lies here as files is read in any order; only the other parts are streamed.
        each = [config.of_part(part, streaming=config.streaming and streams(part.source)) for part in config.mix]
        parts = [load_sources(c, folder, share) for c in each]
        weights = [part.weight for part in config.mix]
        return MixedSource([train for train, _ in parts], weights), MixedSource([held_out for _, held_out in parts], weights)
    if config.source == "shapes":
        from pipeline.data.shapes_captions import ShapesSource

        return ShapesSource(config, "train"), ShapesSource(config, "held_out")
    if config.source == "emoji":
        from pipeline.data.emoji import EmojiSource

        return EmojiSource(config, "train"), EmojiSource(config, "held_out")
    from pipeline.data.mapped import Everything, MappedSource

    if config.streaming:
        from pipeline.data.stream import HeldRows, StreamSource, as_read

        stream = StreamSource(config)
        return stream, MappedSource(Everything(HeldRows(stream), as_read(config)), "held_out")
    everything = Everything(find_rows(config), config, folder, share)
    return MappedSource(everything, "train"), MappedSource(everything, "held_out")


def check_usable(name: str, usable: int, problems: Sequence[str]) -> None:
    """Raises ValueError where no picture of a source is left, with what was left out."""
    if not usable:
        raise ValueError(f"{name} has no usable picture with a caption; {'; '.join(problems) or 'it is empty'}")


def check_splits(config: DataConfig, name: str, train: int, held_out: int, held_out_in_all: int) -> None:
    """Raises ValueError where a source has no picture to train on, or there is none at all to judge on."""
    if not train or not held_out_in_all:
        raise ValueError(
            f"{name} has {train} pictures to train on and {held_out} held out to judge on, and each needs at least "
            f"one; with few pictures another share than data.held_out={config.held_out} is needed (0.2)"
        )


def load_source(config: DataConfig, split: Split, folder: Path | None = None) -> Source:
    """One split of `load_sources`."""
    return load_sources(config, folder)[split == "held_out"]


def find_rows(config: DataConfig) -> Rows:
    """The rows of a source that is read from files, by what its name leads to; see `load_sources` for what is raised."""
    from pipeline.data.files import folder_rows, table_rows
    from pipeline.data.hub import HubRows
    from pipeline.data.webdataset import ShardRows, is_remote, shard_names

    if is_remote(config.source):
        raise ValueError(f"data.source {config.source} is not on this disk; set data.streaming=true")
    path = Path(config.source).expanduser()
    if path.is_dir() and is_saved_dataset(path):
        return HubRows(config)
    if shards := shard_names(config.source):
        return ShardRows(config.source, shards, config.image_column)
    if path.is_dir():
        return folder_rows(path, config.text_column, config.caption_template)
    if path.is_file() and path.suffix.lower() in _TABLES:
        return table_rows(path, config.image_column)
    return HubRows(config)


def streams(source: str) -> bool:
    """Whether a source can be read from beginning to end: shards, Parquet and data sets can."""
    from pipeline.data.webdataset import shard_names

    path = Path(source).expanduser()
    if source in WORLDS or path.suffix.lower() in _TABLES:
        return False
    return not path.is_dir() or is_saved_dataset(path) or shard_names(source) is not None


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder was written by `datasets`' save_to_disk."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
