"""Which images each step sees, as a pure function of (seed, step): no position in the data needs to
be saved. And prefetching."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np

from pipeline.data.mixture import MixtureSchedule
from pipeline.data.source import Item, Source

MAX_EXPLICIT_PERMUTATION = 2**24
"""Rows up to which the order of an epoch is a list of 8 bytes per row. The order of more rows is
computed row by row, in no memory."""
_ROUNDS = 4
"""Of the Feistel network."""


class ShuffledEpochs:
    """Endless shuffled passes over `length` rows, each row once a pass."""

    def __init__(self, length: int, seed: int) -> None:
        if length < 1:
            raise ValueError(
                "there are no images to train on; check data.source and data.val_fraction"
            )
        self.length = length
        self.seed = seed
        self._held = (-1, np.empty(0, dtype=np.int64))

    def row(self, position: int) -> int:
        return int(self.rows(np.array([position]))[0])

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """The rows (N,) at ascending positions (N,)."""
        passes, places = np.divmod(positions, self.length)
        return np.concatenate(
            [self._of_pass(int(number), places[passes == number]) for number in np.unique(passes)]
        )

    def _of_pass(self, number: int, places: np.ndarray) -> np.ndarray:
        if self.length > MAX_EXPLICIT_PERMUTATION:
            return feistel_permutation(places, self.length, [self.seed, number])
        # Read once and written once: the thread that prefetches and the one that names rows may ask
        # for different epochs.
        held = self._held
        if held[0] != number:
            held = self._held = (
                number,
                np.random.default_rng([self.seed, number]).permutation(self.length),
            )
        return held[1][places]


class BatchSampler:
    """The rows of each step: batches run on across passes.

    Args:
        lengths: rows there are, or those of each part of a mixture, which lie one after another.
        batch_size: rows per step, over all processes.
        seed: start of the shuffles.
        weights: of the parts.
    """

    def __init__(
        self,
        lengths: int | Sequence[int],
        batch_size: int,
        seed: int,
        weights: Sequence[float] = (1.0,),
    ) -> None:
        parts = [lengths] if isinstance(lengths, int) else list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self._starts = np.cumsum([0, *parts])
        self._passes = [ShuffledEpochs(length, seed) for length in parts]
        self._mixture = MixtureSchedule(weights, seed) if len(parts) > 1 else None

    def rows(self, step: int) -> np.ndarray:
        """The rows (batch_size,) of a step."""
        positions = step * self.batch_size + np.arange(self.batch_size)
        if self._mixture is None:
            return self._passes[0].rows(positions)
        taken = np.array([self._mixture.at(int(position)) for position in positions])
        rows = np.empty(self.batch_size, np.int64)
        for part in np.unique(taken[:, 0]):
            places = taken[:, 0] == part
            rows[places] = self._starts[part] + self._passes[part].rows(taken[places, 1])
        return rows

    def share(self, step: int, process: int, processes: int) -> np.ndarray:
        """One process's equal part of the rows of a step."""
        return process_share(self.rows(step), process, processes)

    def draws(self, step: int, process: int, processes: int) -> list[int]:
        """One number for each of those rows; it chooses the crop and whether it is mirrored."""
        draws = step_draws(self.seed, step, self.batch_size)
        return process_share(draws, process, processes).tolist()


def step_draws(seed: int, step: int, count: int) -> np.ndarray:
    """Random numbers (count,) int64 of a step."""
    return np.random.default_rng([seed, step, 2]).integers(0, 2**62, count)


def process_share(values: np.ndarray, process: int, processes: int) -> np.ndarray:
    """One process's equal part of what all have."""
    each = len(values) // processes
    return values[process * each : (process + 1) * each]


def order_of(source: Source, batch_size: int, seed: int) -> BatchSampler:
    """The order in which training sees a source, or codes that were made of it."""
    return BatchSampler([len(part) for part in source.parts], batch_size, seed, source.weights)


class MapBatchLoader:
    """Images of a source that is read in any order. Each process has its part of the batch that one
    process would have."""

    def __init__(
        self, source: Source, batch_size: int, seed: int, process: int, processes: int
    ) -> None:
        self._source = source
        self._order = order_of(source, batch_size, seed)
        self._place = (process, processes)

    def images(self, step: int) -> np.ndarray:
        """(B,H,W,3) uint8."""
        return self._source.images(
            self._order.share(step, *self._place).tolist(), self._order.draws(step, *self._place)
        )

    def with_batch_size(self, batch_size: int) -> MapBatchLoader:
        """The same images, with another number of them per step."""
        return MapBatchLoader(self._source, batch_size, self._order.seed, *self._place)

    def names(self, step: int) -> list[str]:
        """What to call the images of a step in messages."""
        return self._source.names(self._order.share(step, *self._place).tolist())


def feistel_permutation(places: np.ndarray, length: int, seed: Sequence[int]) -> np.ndarray:
    """A pseudo-random permutation of 0..length-1 at places (N,) int64, without a list of it.

    A Feistel network of four rounds (Luby & Rackoff 1988) permutes 0 to the next even power of two.
    It is applied again to what lands outside (cycle walking, Black & Rogaway 2002).
    """
    half = max((length - 1).bit_length() + 1, 2) // 2
    mask = np.uint64(2**half - 1)
    keys = np.random.default_rng(seed).integers(0, 2**64, size=_ROUNDS, dtype=np.uint64)
    found = places.astype(np.uint64)
    outside = np.ones(len(found), dtype=bool)
    while outside.any():
        left = found[outside] >> np.uint64(half)
        right = found[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        found[outside] = left << np.uint64(half) | right
        outside = found >= np.uint64(length)
    return found.astype(np.int64)


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """64-bit numbers with each bit of theirs in each bit of the result (the finalizer of
    splitmix64, Steele et al. 2014)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        numbers = (numbers ^ (numbers >> np.uint64(shift))) * np.uint64(factor)
    return numbers ^ (numbers >> np.uint64(31))


def prefetch(items: Iterable[Item]) -> Iterator[Item]:
    """The items; one thread computes the next item while the caller uses the last one. One, because
    not every source can be read by several."""
    rest = iter(items)

    def take() -> list[Item]:
        return list(islice(rest, 1))

    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        ahead = pool.submit(take)
        while item := ahead.result():
            ahead = pool.submit(take)
            yield from item
