"""The rows of any source, to be looked at: files as they lie, images that are drawn here, the
first samples of a stream.

Knows how each kind is opened; judges nothing.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from pipeline.config.data import SYNTHETIC_SOURCES, DataConfig
from pipeline.data.load import find_rows, load_sources
from pipeline.data.readers.base import Record, Rows, SkipCounter, content_fingerprint, is_held_out
from pipeline.data.streaming.source import StreamSource, as_read


class Opened:
    """A source's rows.

    Attributes:
        rows: the rows.
        config: how their captions are read.
        first_only: whether there may be more.
    """

    def __init__(self, rows: Rows, config: DataConfig, *, first_only: bool = False) -> None:
        self.rows, self.config, self.first_only = rows, config, first_only

    def held_out(self, row: int, share: float) -> bool:
        """Whether a row is kept from training."""
        if isinstance(self.rows, DrawnRows):
            return row >= self.rows.train
        return is_held_out(self.rows.label(row), share)


def open_source(config: DataConfig, most: int) -> Opened:
    """Opens the source that `config` names.

    Args:
        most: images to look at of a source that has no end, or that is streamed.

    Raises:
        ValueError, FileNotFoundError: see `pipeline.data.load.load_sources`.
    """
    if config.source in SYNTHETIC_SOURCES:
        drawn = DrawnRows(config, most)
        return Opened(drawn, config, first_only=drawn.first_only)
    if config.streaming:
        streamed = StreamedRows(config, most)
        return Opened(streamed, as_read(config), first_only=len(streamed) == most)
    return Opened(find_rows(config), config)


def open_without_captions(config: DataConfig) -> Opened:
    """A source whose captions cannot be read, as images alone; see `open_source` for what is
    raised."""
    return Opened(find_rows(replace(config, text_column="name", caption_template="{name}")), config)


class DrawnRows:
    """Images that are drawn here: `train` of training and then those held out."""

    def __init__(self, config: DataConfig, most: int) -> None:
        self.name, self.columns, self.tally = config.source, ["text"], SkipCounter()
        self._splits = load_sources(config)
        train, held_out = self._splits
        self.train, self._held_out = min(len(train), most), min(len(held_out), most)
        self.first_only = self.train < len(train)
        if self.first_only:
            self._held_out = min(self._held_out, max(round(most * config.val_fraction), 1))
        self.stamp = content_fingerprint([train.fingerprint, held_out.fingerprint])

    def __len__(self) -> int:
        return self.train + self._held_out

    def label(self, row: int) -> str:
        source, index = self._of(row)
        return source.names([index])[0]

    def picture(self, row: int) -> bytes:
        source, index = self._of(row)
        buffer = io.BytesIO()
        Image.fromarray(source.images([index])[0]).save(buffer, "BMP")
        return buffer.getvalue()

    def records(self, columns: Sequence[str]) -> Iterator[list[Record]]:
        for row in range(len(self)):
            source, index = self._of(row)
            yield [{"text": source.all_captions([index])[0]}]

    def _of(self, row: int) -> tuple:
        return (self._splits[0], row) if row < self.train else (self._splits[1], row - self.train)


class StreamedRows:
    """The first samples of a stream, their images in a file that is gone when these rows are."""

    def __init__(self, config: DataConfig, most: int) -> None:
        # Sizes are judged later: nothing but what has no caption or no known format is left out
        # here.
        stream = StreamSource(
            replace(
                config,
                upscale=True,
                filter=replace(config.filter, min_size=None, max_size=None, max_aspect=None),
            )
        )
        self.name, self.columns, self.tally = stream.name, ["text"], stream.tally
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the rows are
        self._names: list[str] = []
        self._captions: list[list[str]] = []
        ends = [0]
        for sample in stream.first(most):
            self._file.write(sample.content)
            ends.append(ends[-1] + len(sample.content))
            self._names.append(sample.name)
            self._captions.append(sample.captions)
        self._file.flush()
        self._ends = np.array(ends, np.int64)
        self.stamp = content_fingerprint([stream.fingerprint, *self._names])

    def __len__(self) -> int:
        return len(self._names)

    def label(self, row: int) -> str:
        return self._names[row]

    def picture(self, row: int) -> bytes:
        first, end = self._ends[row], self._ends[row + 1]
        return os.pread(self._file.fileno(), int(end - first), int(first))

    def records(self, columns: Sequence[str]) -> Iterator[list[Record]]:
        for captions in self._captions:
            yield [{"text": captions}]

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()
