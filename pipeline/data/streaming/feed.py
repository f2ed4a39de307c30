"""Training on streams: shards shuffled and dealt to processes, blocks of samples shuffled, several
sources mixed. Knows no training.

The shards of pass after pass, each pass in its own random order, are one endless list; of L lanes,
`shards_per_worker` a process, lane l takes every L-th shard of it. So each shard is read once a
pass whatever the number of processes, and no lane runs dry. A process goes round its lanes and
shuffles what it gets in blocks of `shuffle_buffer`. All of it is a pure function of (seed, process,
position): a resumed run needs no state, only to find its place again, and for that it skips the
shards whose lengths it wrote down.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from pipeline.data.mixture import MixedSource, MixtureSchedule, parts_of
from pipeline.data.sampler import MapBatchLoader, ShuffledEpochs, step_draws
from pipeline.data.source import Source
from pipeline.data.streaming.source import Sample, StreamSource
from pipeline.runtime.atomic_io import atomic_write_text


class ShardLengthCache:
    """How many training samples each part of a shard turned out to have; in a file, so that a
    resumed run can skip them.

    Args:
        path: of the file; None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path, self._known, self._lock = path, dict[str, int](), Lock()
        if path is not None and path.is_file():
            try:
                self._known = {
                    str(key): int(value) for key, value in json.loads(path.read_text()).items()
                }
            except (ValueError, AttributeError, TypeError):  # cut: the shards are counted anew
                self._known = {}

    def get(self, key: str) -> int | None:
        return self._known.get(key)

    def empty(self, parts: int) -> int:
        """How many parts of shards are known to have none, where each shard is dealt in so many."""
        return sum(
            count == 0 and key.endswith(f"/{parts}") for key, count in list(self._known.items())
        )

    def add(self, key: str, count: int) -> None:
        with self._lock:  # lanes are read side by side
            if self._known.get(key) == count:
                return
            self._known[key] = count
            if self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                atomic_write_text(self._path, json.dumps(self._known))


class ShardReader:
    """Every `lanes`-th shard of the endless list, from number `lane` on, sample by sample."""

    def __init__(
        self, stream: StreamSource, lane: int, lanes: int, seed: int, lengths: ShardLengthCache
    ) -> None:
        self._stream, self._lane, self._lanes, self._seed, self._lengths = (
            stream,
            lane,
            lanes,
            seed,
            lengths,
        )
        # With fewer shards than lanes each is dealt in parts, or several lanes would read the same
        # one at once.
        self._parts = -(-lanes // stream.num_shards)
        self._order = ShuffledEpochs(stream.num_shards * self._parts, seed)
        self._number, self._position, self._samples = 0, 0, self._open(0)

    def skip_to(self, position: int) -> None:
        """Goes on until `position` samples of the lane are behind it."""
        if position < self._position:
            self._number, self._position, self._samples = 0, 0, self._open(0)
        while self._position < position:
            known = self._lengths.get(self._key(self._number))
            if known and self._count == 0 and self._position + known <= position:
                self._position += known
                self._go_on()
            else:
                next(self)

    def __next__(self) -> Sample:
        while True:
            sample = next(self._samples, None)
            if sample is not None:
                self._position += 1
                self._count += 1
                return sample
            self._lengths.add(self._key(self._number), self._count)
            self._go_on()

    def _go_on(self) -> None:
        """To the next shard that is not known to be empty. Passes are shuffled apart, so a lane may
        meet many before it.

        Raises:
            ValueError: all are.
        """
        self._number += 1
        while self._lengths.get(self._key(self._number)) == 0:
            # Asked anew each time: other lanes find out more meanwhile.
            if self._lengths.empty(self._parts) == self._order.length:
                why = "; ".join(self._stream.problems)
                raise ValueError(
                    f"no shard of {self._stream.name} has an image to train on; "
                    f"{why or 'all are held out or missing'}"
                )
            self._number += 1
        self._samples = self._open(self._number)

    def _open(self, number: int) -> Iterator[Sample]:
        self._count = 0
        shard, part = divmod(self._order.row(self._lane + number * self._lanes), self._parts)
        return self._stream.samples(shard, part, self._parts)

    def _key(self, number: int) -> str:
        shard, part = divmod(self._order.row(self._lane + number * self._lanes), self._parts)
        return f"{shard}/{part}/{self._parts}"


class ShuffleBuffer:
    """One process's samples of one stream, by position.

    Args:
        folder: where the lengths of shards are kept.
    """

    def __init__(
        self,
        stream: StreamSource,
        seed: int,
        process: int,
        processes: int,
        folder: Path | None = None,
    ) -> None:
        self.stream, self._seed, self._process = stream, seed, process
        config = stream.config
        self._block, self._width = config.shuffle_buffer, config.shards_per_worker
        path = (
            folder / f"lengths-{stream.fingerprint}-{process}-of-{processes}.json"
            if folder
            else None
        )
        lengths = ShardLengthCache(path)
        lanes = range(process * self._width, (process + 1) * self._width)
        self._lanes = [
            ShardReader(stream, lane, processes * self._width, seed, lengths) for lane in lanes
        ]
        self._readers = ThreadPoolExecutor(self._width, thread_name_prefix="shards")
        self._ahead_by = ThreadPoolExecutor(1, thread_name_prefix="blocks")
        self._blocks: dict[int, Future[list[Sample]]] = {}
        self._lock = Lock()

    def block(self, number: int) -> list[Sample]:
        """A block's samples in their shuffled order; the next one is read meanwhile."""
        with self._lock:
            for wanted in (number, number + 1):
                if wanted not in self._blocks:
                    self._blocks[wanted] = self._ahead_by.submit(self._read, wanted)
            # A batch may reach into the next block; the one before the last is not asked for again.
            for old in [n for n in self._blocks if not number - 1 <= n <= number + 1]:
                del self._blocks[old]
            wanted_block = self._blocks[number]
        return wanted_block.result()

    def place(self, position: int) -> tuple[int, int]:
        """(block, number within it)."""
        return divmod(position, self._block)

    def _read(self, number: int) -> list[Sample]:
        first, count = number * self._block, self._block

        def of_lane(k: int) -> list[Sample]:
            lane = self._lanes[k]
            # Position p is the lane's whose number is p modulo the lanes.
            before, until = (len(range(k, end, self._width)) for end in (first, first + count))
            lane.skip_to(before)
            return [next(lane) for _ in range(before, until)]

        read = [self._readers.submit(of_lane, k) for k in range(self._width)]
        wait(read)  # also where one fails: the next block must not find a lane still reading
        by_lane = [iter(samples.result()) for samples in read]
        samples = [next(by_lane[(first + i) % self._width]) for i in range(count)]
        order = np.random.default_rng([self._seed, self._process, number, 3]).permutation(count)
        return [samples[i] for i in order]


class StreamBatchLoader:
    """Images of a stream, or of a mixture with streams in it."""

    def __init__(
        self,
        source: Source | StreamSource,
        batch_size: int,
        seed: int,
        process: int,
        processes: int,
        folder: Path | None,
    ) -> None:
        parts: Sequence[Source | StreamSource] = parts_of(source)
        weights = source.weights if isinstance(source, MixedSource) else [1.0]
        self._each, self._seed, self._place = batch_size // processes, seed, (process, processes)
        self._mixture = MixtureSchedule(weights, seed)
        self._parts: list[ShuffleBuffer | tuple[Source, ShuffledEpochs]] = [
            ShuffleBuffer(part, seed, process, processes, folder)
            if isinstance(part, StreamSource)
            else (part, ShuffledEpochs(len(part), seed))
            for part in parts
        ]
        self._config = next(part.config for part in parts if isinstance(part, StreamSource))
        self._pool = ThreadPoolExecutor(self._config.workers, thread_name_prefix="decode")

    def pictures(self, step: int) -> np.ndarray:
        draws = step_draws(self._seed, step, self._each * self._place[1])[
            self._place[0] * self._each :
        ][: self._each].tolist()
        taken = self._taken(step)
        result = np.empty(
            (self._each, self._config.image_size, self._config.image_size, 3), np.uint8
        )
        # Samples of streams wait for nothing but the processor; sources that are mapped have
        # threads of their own.
        from_streams = [i for i, (part, _) in enumerate(taken) if isinstance(part, ShuffleBuffer)]
        decoded = self._pool.map(
            lambda i: self._decoded(taken[i][0], taken[i][1], draws[i]), from_streams
        )
        for part in {id(part): part for part, _ in taken if isinstance(part, tuple)}.values():
            places = [i for i, (other, _) in enumerate(taken) if other is part]
            result[places] = part[0].images(
                [self._row(part, taken[i][1]) for i in places], [draws[i] for i in places]
            )
        for i, picture in zip(from_streams, decoded, strict=True):
            result[i] = picture
        return result

    def names(self, step: int) -> list[str]:
        return [
            self._sample(part, number).name
            if isinstance(part, ShuffleBuffer)
            else part[0].names([self._row(part, number)])[0]
            for part, number in self._taken(step)
        ]

    def _taken(self, step: int) -> list[tuple[Any, int]]:
        """(part, number of its images that this process had before) of each image of a step."""
        taken = [self._mixture.at(step * self._each + i) for i in range(self._each)]
        return [(self._parts[part], number) for part, number in taken]

    def _row(self, part: tuple[Source, ShuffledEpochs], number: int) -> int:
        process, processes = self._place
        return part[1].row(number * processes + process)

    @staticmethod
    def _sample(part: ShuffleBuffer, number: int, after: int = 0) -> Sample:
        block, within = part.place(number)
        samples = part.block(block)
        return samples[(within + after) % len(samples)]

    def _decoded(self, part: ShuffleBuffer, number: int, draw: int) -> np.ndarray:
        """An image, or where it cannot be decoded the next one of its block, so that every process
        has as many as every other."""
        after = 0
        while (picture := part.stream.decode(self._sample(part, number, after))) is None:
            after += 1
        return part.stream.square(picture, draw)


def batch_loader(
    source: Source | StreamSource,
    batch_size: int,
    seed: int,
    process: int,
    processes: int,
    folder: Path | None = None,
) -> MapBatchLoader | StreamBatchLoader:
    """One process's images of a source, step by step.

    Args:
        batch_size: images per step, over all processes.
        folder: where what was learned of a stream is kept.
    """
    if any(isinstance(part, StreamSource) for part in parts_of(source)):
        return StreamBatchLoader(source, batch_size, seed, process, processes, folder)
    return MapBatchLoader(source, batch_size, seed, process, processes)  # type: ignore[arg-type]
