"""Local or remote shards that are read from beginning to end, through `datasets`. Knows samples;
knows no order and no training.

What is read is kept in memory only. The held-out images are the first ones of the stream.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from pipeline.config.data import SYNTHETIC_SOURCES, DataConfig, data_settings
from pipeline.data.codes.dataset import ShardPlan
from pipeline.data.readers.base import (
    Record,
    SkipCounter,
    content_fingerprint,
    file_signature,
    image_column,
    is_held_out,
    reason_of,
)
from pipeline.data.readers.captions import CaptionReader, lines_of
from pipeline.data.readers.hub import content_of, is_saved_dataset, label_names, load
from pipeline.data.readers.images import header, prepared, square_of
from pipeline.data.readers.paths import FileFinder
from pipeline.data.readers.scan import UNREADABLE, unwanted_sizes
from pipeline.data.readers.tables import TABLE_SUFFIXES
from pipeline.data.readers.webdataset import is_remote, shard_names
from pipeline.data.source import ImageBatch, Source

UNDECODED = "images that cannot be decoded left out"
_REMEMBERED = 100_000
"""Skipped samples whose names are remembered."""
_SURE = 1000
"""Images after which the fraction that cannot be decoded is meaningful."""
HELD_OUT = 500
"""Most held-out images of a stream: to find them, it is read from its beginning."""
_NUMBERS_PER_SHARD = 2**32
"""Image k of shard s has the number s * _NUMBERS_PER_SHARD + k."""
_SHARDS = 2**16
"""Shards of a stream whose numbers stay below those of the next part of a mixture."""


@dataclass(frozen=True)
class Sample:
    """One image of a stream, undecoded."""

    name: str
    content: bytes
    captions: list[str]


class StreamSource(Source):
    """The training images of a stream: shards of samples that are read from beginning to end.

    Raises:
        FileNotFoundError: there is no such shard or data set.
        ValueError: a column is missing.
    """

    num_images = None
    number_limit = _SHARDS * _NUMBERS_PER_SHARD

    def __init__(self, config: DataConfig) -> None:
        self.name = config.source
        self.config = config
        self.tally = SkipCounter()
        self._decoded = 0
        self._bad = 0
        self._lock = Lock()
        self._left_out: set[tuple[str, str]] = set()
        self._files = FileFinder(Path(config.source).expanduser().parent)
        data, self.shard_names = _opened(config)
        self._data = data.decode(False)
        self.num_shards = int(self._data.num_shards)
        features = self._data.features or {}
        if not features:
            raise ValueError(
                f"{self.name} does not say which columns it has, so it cannot be streamed; set "
                "data.streaming=false"
            )
        # Members in JSON have columns of their own.
        inner = [
            column for value in features.values() if isinstance(value, dict) for column in value
        ]
        self._image = image_column(self.name, config.image_column, list(features))
        columns = [column for column in dict.fromkeys([*features, *inner]) if column != self._image]
        self._reader = CaptionReader(self.name, columns, config)
        self._named = label_names(features)
        settings = sorted(data_settings(asdict(config)).items())
        self.fingerprint = content_fingerprint(
            [*_states(config, self.shard_names), self.num_shards, settings]
        )

    @property
    def problems(self) -> list[str]:
        """What has been skipped so far."""
        return self.tally.lines()

    def encoding_plan(self, first: int, limit: int | None) -> dict[str, int | None]:
        each = None if limit is None else ceil(limit / self.num_shards)
        return {"shards": self.num_shards, "most": each}

    def batches(self, unit: ShardPlan, first: int, size: int) -> Iterator[ImageBatch]:
        start = first + unit.shard * _NUMBERS_PER_SHARD
        samples = enumerate(itertools.islice(self.samples(unit.shard), unit.most), start)
        while few := list(itertools.islice(samples, size)):
            decoded = [
                (number, sample.captions, image)
                for number, sample in few
                if (image := self.decode(sample)) is not None
            ]
            if decoded:
                numbers, captions, images = map(list, zip(*decoded, strict=True))
                yield ImageBatch(numbers, captions, partial(self._squares, images))

    def _squares(self, images: Sequence[np.ndarray], draws: Sequence[int] | None) -> np.ndarray:
        chosen = [None] * len(images) if draws is None else draws
        return np.stack([self.square(p, d) for p, d in zip(images, chosen, strict=True)])

    def samples(self, shard: int, part: int = 0, parts: int = 1) -> Iterator[Sample]:
        """The training samples of one shard, or every `parts`-th of them from number `part` on."""
        accepted = (
            sample
            for sample in self._readable(shard)
            if not is_held_out(sample.name, self.config.val_fraction)
        )
        return itertools.islice(accepted, part, None, parts)

    def decode(self, sample: Sample) -> np.ndarray | None:
        """A sample's image, prepared (see `square`). None where it cannot be decoded; those are
        counted.

        Raises:
            ValueError: a larger fraction than `data.filter.max_corrupt_fraction` cannot be decoded.
        """
        try:
            image = prepared(sample.content, self.config)
        except ValueError as error:
            with self._lock:
                self._bad += 1
            self._leave_out(UNDECODED, sample.name)
            allowed = self.config.filter.max_corrupt_fraction
            if self._bad > allowed * max(self._decoded, _SURE):
                raise ValueError(
                    f"{self._bad} of {self._decoded + self._bad} images of {self.name} cannot be "
                    f"decoded (the last: {sample.name}, {error}); repair or remove them, or raise "
                    f"data.filter.max_corrupt_fraction (now {allowed})"
                ) from error
            return None
        with self._lock:
            self._decoded += 1
        return image

    def square(self, image: np.ndarray, draw: int | None) -> np.ndarray:
        """The square of a decoded image, (S,S,3) uint8; see `Source.images` for `draw`."""
        return square_of(image, self.config, draw)

    def held_out(self) -> list[Sample]:
        """The first held-out samples."""
        share = self.config.val_fraction
        found = (sample for sample in self._everything() if is_held_out(sample.name, share))
        return list(itertools.islice(found, HELD_OUT))

    def first(self, most: int) -> Iterator[Sample]:
        """The first samples of either split."""
        return itertools.islice(self._everything(), most)

    def _everything(self) -> Iterator[Sample]:
        return itertools.chain.from_iterable(map(self._readable, range(self.num_shards)))

    def _readable(self, shard: int) -> Iterator[Sample]:
        rows = iter(self._data.shard(num_shards=self.num_shards, index=shard))
        for number in itertools.count():
            try:
                row = next(rows, None)
            except Exception as error:  # networks and readers fail in many ways
                where = self.shard_names[shard] if shard < len(self.shard_names) else shard
                raise OSError(
                    f"reading shard {where} of {self.name} failed ({reason_of(error)}); run the "
                    "same command again: it resumes from what is saved"
                ) from error
            if row is None:
                return
            name = str(row.get("__key__") or f"shard {shard} row {number}")
            if (sample := self._sample(name, row)) is not None:
                yield sample

    def _sample(self, name: str, row: Record) -> Sample | None:
        record: Record = {
            key: self._named(key, value) for key, value in row.items() if key != self._image
        }
        for value in list(record.values()):
            if isinstance(value, dict):
                record = value | record
        for column in self._reader.columns:
            if column in ("txt", "caption") and isinstance(record.get(column), str | bytes):
                record[column] = lines_of(record[column], self.config.caption_lines)
        found = self._reader.of([record])
        for reason in found.reasons:
            self._leave_out(reason, name)
        if not found.texts:
            return None
        if row[self._image] is None:
            self._leave_out(f"samples without an image in the column {self._image} left out", name)
            return None
        config = self.config
        try:
            content = content_of(row[self._image], self._files)
            # The pixels are decoded when they are needed.
            width, height = header(io.BytesIO(content)).size
        except Exception:  # see `images.open_image`
            self._leave_out(UNREADABLE, name)
            return None
        for reason, stands in unwanted_sizes(width, height, config):
            if stands:
                self._leave_out(reason, name)
                return None
        return Sample(name, content, found.texts)

    def _leave_out(self, reason: str, name: str) -> None:
        """Counts a sample once, however often the stream is read. Beyond `_REMEMBERED` samples,
        each is counted every time."""
        with self._lock:  # several threads read the same shard in parts
            known = (reason, name) in self._left_out
            if not known and len(self._left_out) < _REMEMBERED:
                self._left_out.add((reason, name))
        if not known:
            self.tally.add(reason, name)


def as_read(config: DataConfig) -> DataConfig:
    """The configuration that reads the captions of samples: they are texts, whatever column they
    came from."""
    return replace(config, text_column="text", caption_template=None)


class HeldRows:
    """The held-out samples of a stream as rows."""

    def __init__(self, stream: StreamSource) -> None:
        self.name = stream.name
        self.tally = stream.tally
        self.columns = ["text"]
        self._samples = stream.held_out()
        self.stamp = content_fingerprint(
            [stream.fingerprint, *(sample.name for sample in self._samples)]
        )

    def __len__(self) -> int:
        return len(self._samples)

    def label(self, row: int) -> str:
        return self._samples[row].name

    def image(self, row: int) -> bytes:
        return self._samples[row].content

    def records(self, columns: Sequence[str]) -> Iterator[list[Record]]:
        for sample in self._samples:
            yield [{"text": sample.captions}]


def _states(config: DataConfig, shards: Sequence[str]) -> list[object]:
    """What identifies the files of a stream, as far as they are on this disk."""
    path = Path(config.source).expanduser()
    if shards:
        return [shard if is_remote(shard) else file_signature(Path(shard)) for shard in shards]
    files = sorted(path.rglob("*.arrow")) if path.is_dir() else [path]
    return [file_signature(file) for file in files]


def _opened(config: DataConfig) -> tuple[Any, list[str]]:
    """A data set of `datasets`, and the names of its shards as far as they are known."""
    import datasets

    saved = is_saved_dataset(Path(config.source).expanduser())
    shards = None if saved else shard_names(config.source)
    if shards is None:
        if not streams(config.source):
            raise ValueError(
                f"data.streaming is on, and {config.source} is a folder or a table of image files; "
                "streaming reads shards, Parquet and data sets; set data.streaming=false"
            )
        return load(config, streaming=True), []
    try:
        files = {"train": shards}
        data = datasets.load_dataset("webdataset", data_files=files, streaming=True)
        return data["train"], shards
    except Exception as error:  # the library and what it reads through raise many kinds
        raise FileNotFoundError(
            f"the {len(shards)} shards of {config.source} cannot be read ({reason_of(error)})"
        ) from error


def streams(source: str) -> bool:
    """Whether a source can be read from beginning to end: shards, Parquet and data sets can."""
    path = Path(source).expanduser()
    if source in SYNTHETIC_SOURCES or path.suffix.lower() in TABLE_SUFFIXES:
        return False
    return not path.is_dir() or is_saved_dataset(path) or shard_names(source) is not None
