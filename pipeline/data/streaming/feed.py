"""Batches for training from streams: shards are shuffled and dealt to processes, samples are
shuffled in blocks, and several sources are mixed. Knows no training.

Epoch after epoch, each in its own random order, the shards form one endless list. Of L readers,
`shards_per_worker` per process, reader l takes every L-th shard of the list. So each shard is read
once per epoch for any number of processes, and no reader runs out of shards. A process takes
samples from its readers in turn and shuffles them in blocks of `shuffle_buffer`. All of this is a
pure function of (seed, process, position). A resumed run needs no state: it finds its position
again, and skips shards whose lengths are recorded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from copy import copy
from pathlib import Path
from threading import Lock

import numpy as np

from pipeline.data.mixture import MixtureSchedule
from pipeline.data.sampler import MapBatchLoader, ShuffledEpochs, process_share, step_draws
from pipeline.data.source import Source, in_places
from pipeline.data.streaming.source import Sample, StreamSource
from pipeline.runtime.atomic_io import atomic_write_text


class ShardLengthCache:
    """How many training samples each part of a shard has, as far as it has been read. Kept in a
    file, so that a resumed run can skip shards.

    Args:
        path: of the file; None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[str, int] = {}
        self._lock = Lock()
        if path is not None and path.is_file():
            # A truncated file is ignored: the shards are counted again.
            with suppress(ValueError, AttributeError, TypeError, RecursionError, OSError):
                self._known = {
                    str(key): int(value) for key, value in json.loads(path.read_text()).items()
                }

    def get(self, key: str) -> int | None:
        return self._known.get(key)

    def empty(self, parts: int) -> int:
        """How many parts are known to have no samples, where each shard has so many parts."""
        return sum(
            count == 0 and key.endswith(f"/{parts}") for key, count in list(self._known.items())
        )

    def add(self, key: str, count: int) -> None:
        with self._lock:  # several threads read
            if self._known.get(key) == count:
                return
            self._known[key] = count
            if self._path is not None:
                atomic_write_text(self._path, json.dumps(self._known))


class ShardReader:
    """Every `lanes`-th shard of the endless list, from number `lane` on, sample by sample."""

    def __init__(
        self, stream: StreamSource, lane: int, lanes: int, seed: int, lengths: ShardLengthCache
    ) -> None:
        self._stream = stream
        self._lane = lane
        self._lanes = lanes
        self._lengths = lengths
        # With fewer shards than lanes, each shard is dealt in parts. Otherwise several lanes would
        # read the same shard at once.
        self._parts = -(-lanes // stream.num_shards)
        self._order = ShuffledEpochs(stream.num_shards * self._parts, seed)
        self._rewind()

    def _rewind(self) -> None:
        self._number = 0
        self._position = 0
        self._samples = self._open(0)

    def skip_to(self, position: int) -> None:
        """Moves to just after the first `position` samples of the lane."""
        if position < self._position:
            self._rewind()
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
        """Opens the next shard that is not known to be empty. Each epoch has its own order, so a
        lane may meet many empty shards in a row.

        Raises:
            ValueError: all shards are empty.
        """
        self._number += 1
        while self._lengths.get(self._key(self._number)) == 0:
            # Asked every time: other lanes count shards meanwhile.
            if self._lengths.empty(self._parts) == self._order.length:
                why = "; ".join(self._stream.problems)
                raise ValueError(
                    f"no shard of {self._stream.name} has an image to train on: "
                    f"{why or 'all are held out or missing'}; add shards, or lower "
                    "data.val_fraction"
                )
            self._number += 1
        self._samples = self._open(self._number)

    def _open(self, number: int) -> Iterator[Sample]:
        self._count = 0
        return self._stream.samples(*self._part(number))

    def _key(self, number: int) -> str:
        return "/".join(map(str, self._part(number)))

    def _part(self, number: int) -> tuple[int, int, int]:
        """(shard, part of it, parts of each) that the lane reads as its shard `number`."""
        row = self._order.row(self._lane + number * self._lanes)
        return row // self._parts, row % self._parts, self._parts


class _MappedPart:
    """One process's images of a source that is read in any order, by position. The processes share
    its epochs."""

    def __init__(self, source: Source, seed: int, process: int, processes: int) -> None:
        self._source = source
        self._epochs = ShuffledEpochs(len(source), seed)
        self._process = process
        self._processes = processes

    def images(self, positions: Sequence[int], draws: Sequence[int]) -> Iterator[np.ndarray]:
        # A generator: while it is read, streams decode images that were asked for before.
        yield from self._source.images(self._rows(positions), draws)

    def names(self, positions: Sequence[int]) -> Sequence[str]:
        return self._source.names(self._rows(positions))

    def _rows(self, positions: Sequence[int]) -> list[int]:
        return [self._epochs.row(p * self._processes + self._process) for p in positions]


class ShuffleBuffer:
    """One process's samples of one stream, by position.

    Args:
        folder: keeps the lengths of shards.
    """

    def __init__(
        self,
        stream: StreamSource,
        seed: int,
        process: int,
        processes: int,
        folder: Path | None = None,
    ) -> None:
        self._stream = stream
        self._seed = seed
        self._process = process
        self._block = stream.config.stream.shuffle_buffer
        self._width = stream.config.stream.shards_per_worker
        file = f"lengths-{stream.fingerprint}-{process}-of-{processes}.json"
        lengths = ShardLengthCache(folder / file if folder else None)
        lanes = range(process * self._width, (process + 1) * self._width)
        self._lanes = [
            ShardReader(stream, lane, processes * self._width, seed, lengths) for lane in lanes
        ]
        self._readers = ThreadPoolExecutor(self._width, thread_name_prefix="shards")
        self._prefetcher = ThreadPoolExecutor(1, thread_name_prefix="blocks")
        self._decoders = ThreadPoolExecutor(stream.config.workers, thread_name_prefix="decode")
        self._blocks: dict[int, Future[list[Sample]]] = {}
        self._lock = Lock()

    def images(self, positions: Sequence[int], draws: Sequence[int]) -> Iterator[np.ndarray]:
        """An image (S,S,3) uint8 at each position; `draws` as in `Source.images`."""
        return self._decoders.map(self._decoded, positions, draws)

    def names(self, positions: Sequence[int]) -> Sequence[str]:
        return [self._sample(position).name for position in positions]

    def block(self, number: int) -> list[Sample]:
        """A block's samples in their shuffled order; the next block is read meanwhile."""
        with self._lock:
            for wanted in (number, number + 1):
                if wanted not in self._blocks:
                    self._blocks[wanted] = self._prefetcher.submit(self._read, wanted)
            # A batch may reach into the next block; no batch asks for the one before the last.
            for old in [n for n in self._blocks if not number - 1 <= n <= number + 1]:
                del self._blocks[old]
            wanted_block = self._blocks[number]
        return wanted_block.result()

    def place(self, position: int) -> tuple[int, int]:
        """(block, number within it)."""
        return divmod(position, self._block)

    def _read(self, number: int) -> list[Sample]:
        first = number * self._block
        end = first + self._block

        def of_lane(k: int) -> list[Sample]:
            # Lane k has the positions that are k modulo the number of lanes.
            lane = self._lanes[k]
            before = len(range(k, first, self._width))
            lane.skip_to(before)
            return [next(lane) for _ in range(before, len(range(k, end, self._width)))]

        read = [self._readers.submit(of_lane, k) for k in range(self._width)]
        wait(read)  # also where one fails: the next block must not find a lane still reading
        by_lane = [iter(samples.result()) for samples in read]
        samples = [next(by_lane[position % self._width]) for position in range(first, end)]
        random = np.random.default_rng([self._seed, self._process, number, 3])
        return [samples[i] for i in random.permutation(self._block)]

    def _sample(self, position: int, after: int = 0) -> Sample:
        number, within = self.place(position)
        samples = self.block(number)
        return samples[(within + after) % len(samples)]

    def _decoded(self, position: int, draw: int) -> np.ndarray:
        """An image. Where it cannot be decoded, the next one of its block, so that every process
        has equally many."""
        after = 0
        while (image := self._stream.decode(self._sample(position, after))) is None:
            after += 1
        return self._stream.crop(image, draw)


class StreamBatchLoader:
    """Images of a stream, or of a mixture that has streams."""

    def __init__(
        self,
        source: Source,
        batch_size: int,
        seed: int,
        process: int,
        processes: int,
        folder: Path | None,
    ) -> None:
        self._each = batch_size // processes
        self._seed = seed
        self._place = (process, processes)
        self._mixture = MixtureSchedule(source.weights, seed)
        self._parts: list[ShuffleBuffer | _MappedPart] = [
            ShuffleBuffer(part, seed, process, processes, folder)
            if isinstance(part, StreamSource)
            else _MappedPart(part, seed, process, processes)
            for part in source.parts
        ]

    def images(self, step: int) -> np.ndarray:
        process, processes = self._place
        draws = process_share(
            step_draws(self._seed, step, self._each * processes), process, processes
        ).tolist()
        # All parts are asked before the first is waited for.
        asked = [
            (places, self._parts[part].images(positions, [draws[i] for i in places]))
            for part, places, positions in self._by_part(step)
        ]
        return np.stack(in_places(asked))

    def names(self, step: int) -> list[str]:
        return in_places(
            (places, self._parts[part].names(positions))
            for part, places, positions in self._by_part(step)
        )

    def with_batch_size(self, batch_size: int) -> StreamBatchLoader:
        """The same images, with another number of them per step; both share the threads and what
        was read."""
        other = copy(self)
        other._each = batch_size // self._place[1]
        return other

    def _by_part(self, step: int) -> Iterator[tuple[int, list[int], list[int]]]:
        """(part, places in the batch, positions in the part's own order) of a step's images."""
        taken = [self._mixture.at(step * self._each + i) for i in range(self._each)]
        for part in range(len(self._parts)):
            if places := [i for i in range(self._each) if taken[i][0] == part]:
                yield part, places, [taken[i][1] for i in places]


def batch_loader(
    source: Source,
    batch_size: int,
    seed: int,
    process: int,
    processes: int,
    folder: Path | None = None,
) -> MapBatchLoader | StreamBatchLoader:
    """One process's images of a source, step by step.

    Args:
        batch_size: images per step, over all processes.
        folder: keeps the lengths of a stream's shards.
    """
    if source.num_images is None:
        return StreamBatchLoader(source, batch_size, seed, process, processes, folder)
    return MapBatchLoader(source, batch_size, seed, process, processes)
