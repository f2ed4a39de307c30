"""Images to train on from samples that are read from beginning to end. Knows samples; knows no
files, no order and no training.

What is read is kept in memory only. The held-out images are the first ones of the stream.
"""

from __future__ import annotations

import io
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import ceil
from threading import Lock

import numpy as np

from pipeline.config.data import DataConfig, data_settings, settings_beside_content
from pipeline.data.codes.dataset import ShardPlan
from pipeline.data.readers.base import (
    NoCaptions,
    Record,
    Rows,
    SkipCounter,
    content_fingerprint,
    existing_column,
    is_held_out,
    reason_of,
    split_hash,
)
from pipeline.data.readers.captions import UNCAPTIONED, CaptionReader, caption_reader
from pipeline.data.readers.deep import depth_of
from pipeline.data.readers.images import (
    crop_of,
    enough,
    header,
    pixels_decoded,
    prepared,
    shrinks,
    upright_size,
)
from pipeline.data.readers.scan import UNREADABLE, file_digest, too_large, unwanted_sizes
from pipeline.data.readers.splits import (
    COPIES,
    Role,
    SplitName,
    check_column,
    split_of_image,
    values_of_no_split,
)
from pipeline.data.source import ImageBatch, Source
from pipeline.data.streaming.samples import MembersApart, RawSample, SampleStream, open_streams

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
    split: SplitName = ""
    """The split that `data.split_column` names."""
    held_out: bool = False
    """Whether it is of the files or the data set that are held out."""


class StreamSource(Source):
    """The training images of a stream: shards of samples that are read from beginning to end.

    Raises:
        FileNotFoundError: there is no such shard or data set.
        ValueError: a column is missing.
    """

    num_images = None
    number_limit = _SHARDS * _NUMBERS_PER_SHARD

    def __init__(self, config: DataConfig, *, require_captions: bool = True) -> None:
        self.name = config.source
        self.config = config
        self._require_captions = require_captions
        self.tally = SkipCounter()
        self._decoded = 0
        self._bad = 0
        self._lock = Lock()
        self._left_out: set[tuple[str, str]] = set()
        self._held_digests: set[int] = set()
        self.single_held_out: str | None = None
        """The only held-out sample of a stream of few."""
        self._of_no_split: Counter[str] = Counter()
        opened = open_streams(config, self.tally)
        self._train = opened.train
        self._held_out = opened.held_out
        self.shard_names = opened.shard_names
        self.num_shards = opened.train.num_shards
        self.layout = opened.train.layout
        self.facts = opened.train.facts
        self.note = opened.note
        if config.held_out_source is not None:
            self.note = (
                f"splits by data.held_out_source: held out is {config.held_out_source}, and not "
                "data.val_fraction"
            )
        self._reader = self._caption_reader()
        self._column = self._split_column()
        settings = data_settings(asdict(config))
        everything = [] if require_captions else ["images without captions"]
        identity = [*opened.identity, self.num_shards, self._column, *everything]
        self.fingerprint = content_fingerprint(
            [*identity, sorted(settings_beside_content(settings).items())]
        )
        if opened.earlier is not None and not self._column and config.held_out_source is None:
            self.earlier_fingerprint = content_fingerprint(
                [*opened.earlier, self.num_shards, sorted(settings.items())]
            )

    def _split_column(self) -> str | None:
        """The column that says what is held out. A stream is not read to the end to find out
        whether a column does, so only one that is named is taken."""
        wanted = self.config.split_column
        if wanted in ("auto", "none"):
            if wanted == "auto" and "split" in self._train.columns and not self.note:
                self.note = (
                    "the column split is not used while streaming; data.split_column=split holds "
                    "out what it says"
                )
            return None
        column = existing_column(self.name, wanted, self._train.columns, "data.split_column")
        self.note = f"splits by the column {column}, and not by data.val_fraction"
        return column

    @property
    def problems(self) -> list[str]:
        """What is held out by the data, and what has been skipped so far."""
        return [*filter(None, [self.note]), *self.tally.lines()]

    def encoding_plan(self, first: int, limit: int | None) -> dict[str, int | None]:
        each = None if limit is None else ceil(limit / self.num_shards)
        return {"shards": self.num_shards, "most": each}

    def batches(self, unit: ShardPlan, first: int, size: int) -> Iterator[ImageBatch]:
        start = first + unit.shard * _NUMBERS_PER_SHARD
        samples = enumerate(itertools.islice(self.samples(unit.shard), unit.most), start)
        while few := list(itertools.islice(samples, size)):
            decoded = [
                (number, sample.captions, sample.name, image)
                for number, sample in few
                if (image := self.decode(sample)) is not None
            ]
            if decoded:
                numbers, captions, names, images = map(list, zip(*decoded, strict=True))
                yield ImageBatch(numbers, captions, names, partial(self._crops, images))

    def _crops(self, images: Sequence[np.ndarray], draws: Sequence[int] | None) -> np.ndarray:
        chosen = [None] * len(images) if draws is None else draws
        return np.stack([self.crop(p, d) for p, d in zip(images, chosen, strict=True)])

    def samples(self, shard: int, part: int = 0, parts: int = 1) -> Iterator[Sample]:
        """The training samples of one shard, or every `parts`-th of them from number `part` on."""
        accepted = (
            sample
            for sample in self._readable(self._train, shard)
            if self._role(sample) == "train" and not self._is_copy(sample)
        )
        return itertools.islice(accepted, part, None, parts)

    def _is_copy(self, sample: Sample) -> bool:
        """Whether a sample's image is one of those that the data hold out; copies are counted."""
        if not self._held_digests or file_digest(sample.content) not in self._held_digests:
            return False
        self._leave_out(COPIES, sample.name)
        return True

    def _role(self, sample: Sample) -> Role:
        """What a sample of the streams to train on is for."""
        if self._column is not None:
            return "train" if sample.split == "train" else "held_out"
        if self._held_out is not None or self.config.held_out_source is not None:
            return "train"
        held_out = is_held_out(sample.name, self.config.val_fraction)
        return "held_out" if held_out or sample.name == self.single_held_out else "train"

    def decode(self, sample: Sample) -> np.ndarray | None:
        """A sample's image, prepared (see `crop`). None where it cannot be decoded; those are
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
                    f"decoded (the last: {sample.name}, {error}); repair them, or raise "
                    f"data.filter.max_corrupt_fraction (now {allowed})"
                ) from error
            return None
        with self._lock:
            self._decoded += 1
        return image

    def crop(self, image: np.ndarray, draw: int | None) -> np.ndarray:
        """The part of a decoded image that is seen, (H,W,C) uint8; see `Source.images` for
        `draw`."""
        return crop_of(image, self.config, draw)

    @property
    def is_split(self) -> bool:
        """Whether the data say what is held out."""
        return self._held_out is not None or self._column is not None

    def held_out(self) -> list[Sample]:
        """The first held-out samples. Where the data say what is held out, copies of them are left
        out of `samples` from then on."""
        found = self._first_held_out()
        if self.is_split:
            self.leave_out_copies(file_digest(sample.content) for sample in found)
        return found

    def leave_out_copies(self, digests: Iterable[int]) -> None:
        """Leaves images with these digests (`file_digest`) out of `samples` from now on."""
        self._held_digests |= set(digests)

    def _first_held_out(self) -> list[Sample]:
        if self._held_out is not None:
            return list(itertools.islice(self._everything(self._held_out), HELD_OUT))
        if self._column is None:
            found = (s for s in self._everything(self._train) if self._role(s) == "held_out")
            return list(itertools.islice(found, HELD_OUT)) or self._hold_out_one()
        return self._held_out_by_column(self._column)

    def _hold_out_one(self) -> list[Sample]:
        """Of few samples the hash may choose none; then the one with the lowest is held out."""
        if not self.config.val_fraction or self.config.held_out_source is not None:
            return []
        every = list(self._everything(self._train))
        if len(every) < 2:
            return []
        chosen = min(every, key=lambda sample: split_hash(sample.name))
        self.single_held_out = chosen.name
        return [chosen]

    def _held_out_by_column(self, column: str) -> list[Sample]:
        """The first images of the validation split, or else of the test split.

        Raises:
            ValueError: a value read on the way names no split, or none names what is needed.
        """
        by_split: dict[SplitName, list[Sample]] = {}
        for sample in self._everything(self._train):
            own = by_split.setdefault(sample.split, [])
            if sample.split != "train" and len(own) < HELD_OUT:
                own.append(sample)
            if len(by_split.get("validation", [])) == HELD_OUT:
                by_split.setdefault("train", [])  # it may come later
                break
        if by_split or self._of_no_split:
            check_column(self.name, column, set(by_split), self._of_no_split)
        return by_split.get("validation") or by_split.get("test") or []

    def first(self, most: int) -> Iterator[Sample]:
        """The first samples of either split."""
        if self._held_out is None:
            return itertools.islice(self._everything(self._train), most)
        few = min(HELD_OUT, max(most // 10, 1))
        return itertools.chain(
            itertools.islice(self._everything(self._train), most - few),
            itertools.islice(self._everything(self._held_out), few),
        )

    def is_sample_held_out(self, sample: Sample) -> bool:
        """Whether a sample of `first` is held out."""
        return sample.held_out or self._role(sample) != "train"

    def _everything(self, stream: SampleStream) -> Iterator[Sample]:
        return itertools.chain.from_iterable(
            self._readable(stream, shard) for shard in range(stream.num_shards)
        )

    def _readable(self, stream: SampleStream, shard: int) -> Iterator[Sample]:
        rows = stream.samples(shard)
        while True:
            try:
                raw = next(rows, None)
            except MembersApart:
                raise
            except Exception as error:  # networks and readers fail in many ways
                known = stream is self._train and shard < len(self.shard_names)
                where = self.shard_names[shard] if known else shard
                raise OSError(
                    f"reading shard {where} of {self.name} failed ({reason_of(error)}); run the "
                    "same command again: it resumes from what is saved"
                ) from error
            if raw is None:
                return
            if (sample := self._sample(raw, stream is self._held_out)) is not None:
                yield sample

    def _caption_reader(self) -> CaptionReader | None:
        """None where no caption can be read and none is required."""
        try:
            columns = self._train.columns
            return caption_reader(self.name, columns, self.config, required=self._require_captions)
        except NoCaptions as error:
            if apart := self._train.captions_apart():
                raise ValueError(f"{error}; {apart}") from error
            raise

    def _sample(self, raw: RawSample, held_out: bool) -> Sample | None:
        name = raw.name
        record: Record = dict(raw.record)
        for value in list(record.values()):
            if isinstance(value, dict):
                record = value | record
        captions = self._captions(name, record)
        if raw.image is None:
            self._leave_out(
                f"samples without an image in the column {self._train.image} left out", name
            )
            return None
        if not captions and self._require_captions:
            return None
        if (split := self._split(name, record)) is None:
            return None
        config = self.config
        try:
            content = raw.image()
            # The pixels are decoded when they are needed.
            image = header(io.BytesIO(content))
            width, height = upright_size(image)
            pixels = pixels_decoded(width, height, shrinks(image), enough(config))
            depth = depth_of(image)
        except Exception:  # see `images.open_image`
            self._leave_out(UNREADABLE, name)
            return None
        if pixels > config.max_pixels:
            self._leave_out(too_large(config.max_pixels), name)
            return None
        if depth != "8bit" and config.value_range == "auto":
            raise ValueError(
                f"{name} of {self.name} has more than 8 bits per value ({image.mode}), and the "
                "values of a stream cannot be looked at beforehand; set data.value_range: 16bit, "
                "12bit, or [low, high] (minidalle doctor shows the first ones)"
            )
        for reason, stands in unwanted_sizes(width, height, config):
            if stands:
                self._leave_out(reason, name)
                return None
        return Sample(name, content, captions, split, held_out)

    def _split(self, name: str, record: Record) -> SplitName | None:
        """The split that `data.split_column` names; None where it names none, which is counted."""
        if self._column is None:
            return ""
        split = split_of_image([record], self._column)
        if split is None:
            if len(self._of_no_split) < _REMEMBERED:
                self._of_no_split.update(values_of_no_split([record], self._column))
            self._leave_out(
                f"images that the column {self._column} puts in no split left out", name
            )
        return split

    def _captions(self, name: str, record: Record) -> list[str]:
        if self._reader is None:
            return []
        found = self._reader.of([record])
        for reason in found.reasons:
            if self._require_captions or reason not in UNCAPTIONED:
                self._leave_out(reason, name)
        return found.texts

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


class HeldRows(Rows):
    """The held-out samples of a stream as rows."""

    def __init__(self, stream: StreamSource, samples: list[Sample]) -> None:
        self.name = stream.name
        self.tally = stream.tally
        self.columns = ["text"]
        self._samples = samples
        if stream.is_split or stream.single_held_out is not None:
            self.held_out = np.ones(len(self._samples), bool)
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
