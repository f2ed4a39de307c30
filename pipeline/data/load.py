"""Finds the source that a configuration names. Knows which sources exist; does not know how they
read."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.config.data import DataConfig
from pipeline.data.builtin.emoji import EmojiSource
from pipeline.data.builtin.icons import IconSource
from pipeline.data.builtin.shapes_captions import ShapesSource
from pipeline.data.map_source import MappedSource, SourceIndex
from pipeline.data.mixture import MixedSource
from pipeline.data.readers.base import Rows, printable
from pipeline.data.readers.folder import LAYOUTS, folder_rows, table_rows
from pipeline.data.readers.hub import hub_rows, is_saved_dataset, parquet_rows
from pipeline.data.readers.images import EXTENSIONS
from pipeline.data.readers.locate import (
    ACCEPTED,
    contents,
    described,
    files_below,
    files_of_rows,
    is_hub_name,
    is_remote,
    matching,
    not_found,
)
from pipeline.data.readers.path_list import is_path_list, path_list_rows
from pipeline.data.readers.split_folders import split_folder_rows
from pipeline.data.readers.splits import with_held_out_source, with_named_splits
from pipeline.data.readers.tables import TABLE_SUFFIXES
from pipeline.data.readers.webdataset import shard_rows
from pipeline.data.source import Source, Split
from pipeline.data.streaming.samples import streams
from pipeline.data.streaming.source import HELD_OUT, HeldRows, StreamSource, as_read
from pipeline.data.worker_info import SINGLE_PROCESS, WorkerInfo

_DRAWINGS = "a folder of SVGs is read by data.source=icons, data.icons.sets=[FOLDER]"


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
        for (trained, _), (_, other) in itertools.permutations(loaded, 2):
            if isinstance(trained, MappedSource | StreamSource) and isinstance(other, MappedSource):
                trained.leave_out_copies(other.digests)
        weights = [part.weight for part in config.mix]
        return MixedSource(train, weights), MixedSource(held_out, weights)
    if config.source == "shapes":
        return ShapesSource(config, "train"), ShapesSource(config, "held_out")
    if config.source == "emoji":
        return EmojiSource(config, "train"), EmojiSource(config, "held_out")
    if config.source == "icons":
        return IconSource(config, "train"), IconSource(config, "held_out")
    if config.streaming:
        stream = StreamSource(config, require_captions=require_captions)
        if config.held_out_source is not None:
            found, own = held_out_rows(config, require_captions=require_captions)
            found.held_out = np.ones(len(found), bool)
            index = SourceIndex(found, own, folder, share, require_captions=require_captions)
            second = MappedSource(index, "held_out")
            stream.leave_out_copies(second.digests)
            return stream, second
        rows = HeldRows(stream, stream.held_out())
        held = SourceIndex(rows, as_read(config), require_captions=require_captions)
        return stream, MappedSource(held, "held_out")
    found = find_rows(config, require_captions=require_captions)
    everything = SourceIndex(found, config, folder, share, require_captions=require_captions)
    return MappedSource(everything, "train"), MappedSource(everything, "held_out")


def load_source(
    config: DataConfig, split: Split, folder: Path | None = None, *, require_captions: bool = True
) -> Source:
    """One split of `load_sources`."""
    return load_sources(config, folder, require_captions=require_captions)[split == "held_out"]


def find_rows(config: DataConfig, *, require_captions: bool = True) -> Rows:
    """The rows of a source of files, by the kind of what its name leads to, and the splits that
    they name. Raises what `load_sources` does."""
    rows = with_named_splits(_rows_of(config, require_captions), config)
    if config.held_out_source is None:
        return rows
    with _errors_of_second():
        second = _rows_of(_second(config), require_captions)
    return with_held_out_source(rows, second, config, require_captions=require_captions)


def held_out_rows(config: DataConfig, *, require_captions: bool = True) -> tuple[Rows, DataConfig]:
    """All rows of the held-out source of a stream, the first ones of a remote one; and the
    configuration that reads their captions. Raises what `load_sources` does."""
    config = _second(config)
    with _errors_of_second():
        if is_remote(config.source):
            stream = StreamSource(config, require_captions=require_captions)
            return HeldRows(stream, list(stream.first(HELD_OUT))), as_read(config)
        config = replace(config, streaming=False)
        return _rows_of(config, require_captions), config


def _second(config: DataConfig) -> DataConfig:
    """The configuration of the held-out source: all of it is held out, whatever splits it has."""
    assert config.held_out_source is not None
    return replace(config, source=config.held_out_source, held_out_source=None, split_column="none")


@contextmanager
def _errors_of_second() -> Iterator[None]:
    """Errors that name the setting of the held-out source: readers know `data.source` alone."""
    try:
        yield
    except (ValueError, OSError) as error:
        if "data.source" in str(error):
            error.args = (str(error).replace("data.source", "data.held_out_source"),)
        raise


def _rows_of(config: DataConfig, require_captions: bool) -> Rows:
    source = config.source
    if is_remote(source):
        raise ValueError(
            f"data.source {source} is not on this disk; set data.streaming=true, or download "
            "it and give its path"
        )
    path = Path(source).expanduser()
    if path.is_dir() and is_saved_dataset(path):
        return hub_rows(config)
    if files := files_of_rows(source):
        return (
            shard_rows(config, files)
            if files[0].suffix.lower() == ".tar"
            else parquet_rows(config, files)
        )
    if path.is_dir():
        if not any(file.suffix.lower() in EXTENSIONS for file in files_below(path)):
            svgs = any(file.suffix.lower() == ".svg" for file in files_below(path))
            drawings = f"; {_DRAWINGS}" if svgs else ""
            raise ValueError(
                f"{path} holds 0 images and no captions, shards or Parquet; it holds "
                f"{contents(path)}; {LAYOUTS}{drawings}"
            )
        return split_folder_rows(path, config, require_captions) or folder_rows(
            path, config, require_captions=require_captions
        )
    files = matching(source)
    if len(files) == 1 and is_path_list(files[0], config.delimiter):
        return path_list_rows(files[0], config, require_captions=require_captions)
    if len(files) == 1 and files[0].suffix.lower() in TABLE_SUFFIXES:
        return table_rows(files[0], config, require_captions=require_captions)
    if files or path.exists():
        raise ValueError(
            f"data.source {printable(source)} is {described(files, Path())}, which is no source; "
            f"{ACCEPTED}"
        )
    if is_hub_name(source):
        return hub_rows(config)
    raise not_found(source)
