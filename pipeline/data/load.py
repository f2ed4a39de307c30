"""Finds the source that a configuration names. Knows which sources exist; does not know how they
read."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.data import DataConfig
from pipeline.data.builtin.emoji import EmojiSource
from pipeline.data.builtin.shapes_captions import ShapesSource
from pipeline.data.map_source import MappedSource, SourceIndex
from pipeline.data.mixture import MixedSource
from pipeline.data.readers.base import Rows
from pipeline.data.readers.folder import TABLE_SUFFIXES, folder_rows, table_rows
from pipeline.data.readers.hub import HubRows, is_saved_dataset
from pipeline.data.readers.path_list import LIST_SUFFIX, path_list_rows
from pipeline.data.readers.webdataset import ShardRows, is_remote, shard_names
from pipeline.data.source import Source, Split
from pipeline.data.streaming.source import HeldRows, StreamSource, as_read, streams
from pipeline.data.worker_info import SINGLE_PROCESS, WorkerInfo


def load_sources(
    config: DataConfig,
    folder: Path | None = None,
    share: WorkerInfo = SINGLE_PROCESS,
    *,
    require_captions: bool = True,
) -> tuple[Source, Source]:
    """Training and held-out images of the source that `config` names. They are the same in every
    run.

    Args:
        folder: keeps the results of scanning the images, so that a later call is quick.
        share: this process's part of the scan.
        require_captions: leave out images without a caption, as a prior needs one. Otherwise they
            are used, too.

    Returns:
        A source each; with `data.streaming` the first is a stream, or a mixture that has one.

    Raises:
        FileNotFoundError: the folder, the font or the names do not exist; says what to install or
            give.
        ValueError: the source has no captions, lacks a column, or too many of its images are
            unreadable.
    """
    if config.mix:
        # Folders and tables of files are read in any order; only the other parts are streamed.
        each = [
            config.of_part(part, streaming=config.streaming and streams(part.source))
            for part in config.mix
        ]
        loaded = [
            load_sources(own, folder, share, require_captions=require_captions) for own in each
        ]
        train, held_out = zip(*loaded, strict=True)
        weights = [part.weight for part in config.mix]
        return MixedSource(train, weights), MixedSource(held_out, weights)
    if config.source == "shapes":
        return ShapesSource(config, "train"), ShapesSource(config, "held_out")
    if config.source == "emoji":
        return EmojiSource(config, "train"), EmojiSource(config, "held_out")
    if config.streaming:
        stream = StreamSource(config, require_captions=require_captions)
        held = SourceIndex(HeldRows(stream), as_read(config), require_captions=require_captions)
        return stream, MappedSource(held, "held_out")
    rows = find_rows(config, require_captions=require_captions)
    everything = SourceIndex(rows, config, folder, share, require_captions=require_captions)
    return MappedSource(everything, "train"), MappedSource(everything, "held_out")


def load_source(
    config: DataConfig, split: Split, folder: Path | None = None, *, require_captions: bool = True
) -> Source:
    """One split of `load_sources`."""
    return load_sources(config, folder, require_captions=require_captions)[split == "held_out"]


def find_rows(config: DataConfig, *, require_captions: bool = True) -> Rows:
    """The rows of a source of files, by the kind of what its name leads to. Raises what
    `load_sources` does."""
    if is_remote(config.source):
        raise ValueError(
            f"data.source {config.source} is not on this disk; set data.streaming=true"
        )
    path = Path(config.source).expanduser()
    if path.is_dir() and is_saved_dataset(path):
        return HubRows(config)
    if shards := shard_names(config.source):
        return ShardRows(config.source, shards, config.image_column)
    if path.is_dir():
        return folder_rows(
            path, config.text_column, config.caption_template, require_captions=require_captions
        )
    if path.is_file() and path.suffix.lower() in TABLE_SUFFIXES:
        return table_rows(path, config.image_column)
    if path.is_file() and path.suffix.lower() == LIST_SUFFIX:
        return path_list_rows(path, config, require_captions=require_captions)
    return HubRows(config)
