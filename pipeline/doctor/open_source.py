"""The rows of any source: files as they lie, synthetic images, the first samples of a stream.

Knows how each kind is opened; judges nothing.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.config.data import SYNTHETIC_SOURCES, DataConfig
from pipeline.data.load import find_rows, held_out_rows, load_sources
from pipeline.data.readers.base import Record, Rows, SkipCounter, content_fingerprint
from pipeline.data.readers.captions import Captions, captions_of
from pipeline.data.readers.splits import with_held_out_source
from pipeline.data.source import Source
from pipeline.data.streaming.source import StreamSource, as_read
from stage1_tokenizer.pixels import pil_image


@dataclass(frozen=True)
class Opened:
    """A source's rows.

    Attributes:
        rows: the rows.
        config: how their captions are read.
        first_only: whether there may be more.
    """

    rows: Rows
    config: DataConfig
    first_only: bool = False


def open_source(config: DataConfig, most: int, *, require_captions: bool = True) -> Opened:
    """Opens the source that `config` names.

    Args:
        most: images to read of a source that is unlimited, or that is streamed.

    Raises:
        ValueError, FileNotFoundError: see `pipeline.data.load.load_sources`.
    """
    if config.source in SYNTHETIC_SOURCES:
        synthetic = SyntheticRows(config, most)
        return Opened(synthetic, config, synthetic.first_only)
    if config.streaming:
        streamed = StreamedRows(config, most, require_captions=require_captions)
        opened = Opened(streamed, as_read(config), len(streamed) == most)
        if config.held_out_source is None:
            return opened
        found, own = held_out_rows(config, require_captions=require_captions)
        captions = captions_of(found, own, streamed.tally, required=require_captions)
        rows = with_held_out_source(
            streamed,
            CaptionedRows(found, captions),
            opened.config,
            require_captions=require_captions,
        )
        return replace(opened, rows=rows)
    return Opened(find_rows(config, require_captions=require_captions), config)


def open_without_captions(config: DataConfig, most: int) -> Opened:
    """A source whose captions cannot be read, as images alone. Raises as `open_source`."""
    config = replace(config, text_column="text", caption_template=None)
    return open_source(config, most, require_captions=False)


class CaptionedRows(Rows):
    """Rows whose captions have been read already, whatever column they came from."""

    def __init__(self, rows: Rows, captions: Captions) -> None:
        self.name = rows.name
        self.columns = ["text"]
        self.tally = rows.tally
        self.layout = rows.layout
        self.facts = rows.facts
        self.stamp = rows.stamp
        self._rows = rows
        self._captions = captions

    def __len__(self) -> int:
        return len(self._rows)

    def label(self, row: int) -> str:
        return self._rows.label(row)

    def image(self, row: int) -> bytes:
        return self._rows.image(row)

    def records(self, columns: Sequence[str]) -> Iterator[list[Record]]:
        for row in range(len(self)):
            yield [{"text": self._captions[row]}]


class SyntheticRows(Rows):
    """Images of `shapes`, `emoji` or `icons`: `train` of training and then those held out."""

    def __init__(self, config: DataConfig, most: int) -> None:
        self.name = config.source
        self.columns = ["text"]
        self.tally = SkipCounter()
        # Repeats of a drawing are no copies, and icons are looked at with their transparency.
        once = replace(config, icons=replace(config.icons, untoned_repeats=1))
        if config.source == "icons":
            once = replace(once, alpha="keep")
        self._splits = load_sources(once)
        train, held_out = self._splits
        self.problems = train.problems
        self.train = min(len(train), most)
        self._held_out = min(len(held_out), most)
        self.first_only = self.train < len(train)
        if self.first_only:
            self._held_out = min(self._held_out, max(round(most * config.val_fraction), 1))
        self.held_out = np.arange(self.train + self._held_out) >= self.train
        self.stamp = content_fingerprint([train.fingerprint, held_out.fingerprint])

    def __len__(self) -> int:
        return self.train + self._held_out

    def label(self, row: int) -> str:
        source, index = self._of(row)
        return source.names([index])[0]

    def image(self, row: int) -> bytes:
        source, index = self._of(row)
        buffer = io.BytesIO()
        image = pil_image(source.images([index])[0])
        image.save(buffer, "PNG" if image.mode == "RGBA" else "BMP")
        return buffer.getvalue()

    def records(self, columns: Sequence[str]) -> Iterator[list[Record]]:
        for row in range(len(self)):
            source, index = self._of(row)
            yield [{"text": source.all_captions([index])[0]}]

    def _of(self, row: int) -> tuple[Source, int]:
        """The split of a row, and the row's index in it."""
        train, held_out = self._splits
        return (train, row) if row < self.train else (held_out, row - self.train)


class StreamedRows(Rows):
    """The first samples of a stream. A temporary file holds their images as long as these rows
    live."""

    def __init__(self, config: DataConfig, most: int, *, require_captions: bool) -> None:
        # Sizes and values are judged later: here only samples of no caption or no known format are
        # left out.
        stream = StreamSource(
            replace(
                config,
                upscale=True,
                value_range="16bit" if config.value_range == "auto" else config.value_range,
                filter=replace(config.filter, min_size=None, max_size=None, max_aspect=None),
            ),
            require_captions=require_captions,
        )
        self.name = stream.name
        self.columns = ["text"]
        self.tally = stream.tally
        self.layout = stream.layout
        self.facts = stream.facts
        self.note = stream.note
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the rows live
        self._names: list[str] = []
        self._captions: list[list[str]] = []
        ends = [0]
        held_out = []
        for sample in stream.first(most):
            self._file.write(sample.content)
            ends.append(ends[-1] + len(sample.content))
            self._names.append(sample.name)
            self._captions.append(sample.captions)
            held_out.append(stream.is_sample_held_out(sample))
        if stream.is_split:
            self.held_out = np.array(held_out, bool)
        self._file.flush()
        self._ends = np.array(ends, np.int64)
        self.stamp = content_fingerprint([stream.fingerprint, *self._names])

    def __len__(self) -> int:
        return len(self._names)

    def label(self, row: int) -> str:
        return self._names[row]

    def image(self, row: int) -> bytes:
        start = int(self._ends[row])
        return os.pread(self._file.fileno(), int(self._ends[row + 1]) - start, start)

    def records(self, columns: Sequence[str]) -> Iterator[list[Record]]:
        for captions in self._captions:
            yield [{"text": captions}]

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()
