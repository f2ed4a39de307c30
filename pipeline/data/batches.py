"""Which rows a step sees, a pure function of (seed, step), so that no position in the data needs to be saved; and pictures loaded ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

LISTED = 2**24
"""Rows up to which a pass is a list of 8 bytes a row; the order of more is worked out row by row, in no memory."""
_ROUNDS = 4


class Order:
    """Endless shuffled passes over `length` rows; each row once a pass, batches run on across passes.

    Args:
        length: rows there are.
        batch_size: rows a step, over all processes.
        seed: start of the shuffles.
    """

    def __init__(self, length: int, batch_size: int, seed: int) -> None:
        if length < 1:
            raise ValueError("there are no pictures to train on; check data.source and data.held_out")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self._pass, self._shuffled = -1, np.empty(0, dtype=np.int64)

    def rows(self, step: int) -> np.ndarray:
        """The rows (batch_size,) of a step."""
        passes, places = np.divmod(step * self.batch_size + np.arange(self.batch_size), self.length)
        return np.concatenate([self._of_pass(int(number), places[passes == number]) for number in np.unique(passes)])

    def share(self, step: int, process: int, processes: int) -> np.ndarray:
        """One process's equal part of the rows of a step."""
        rows = self.rows(step)
        each = len(rows) // processes
        return rows[process * each : (process + 1) * each]

    def _of_pass(self, number: int, places: np.ndarray) -> np.ndarray:
        if self.length > LISTED:
            return scattered(places, self.length, [self.seed, number])
        if number != self._pass:
            self._pass = number
            self._shuffled = np.random.default_rng([self.seed, number]).permutation(self.length)
        return self._shuffled[places]


def scattered(places: np.ndarray, length: int, seed: Sequence[int]) -> np.ndarray:
    """Where a pseudo-random permutation of 0..length-1 puts places (N,) int64, without a list of it: a Feistel network of four rounds
    (Luby & Rackoff 1988) over the next even power of two, walked on from what lies outside (Black & Rogaway 2002)."""
    half = max((length - 1).bit_length() + 1, 2) // 2
    mask = np.uint64(2**half - 1)
    keys = np.random.default_rng(seed).integers(0, 2**64, size=_ROUNDS, dtype=np.uint64)
    found = places.astype(np.uint64)
    outside = np.ones(len(found), dtype=bool)
    while outside.any():
        left, right = found[outside] >> np.uint64(half), found[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        found[outside] = left << np.uint64(half) | right
        outside = found >= np.uint64(length)
    return found.astype(np.int64)


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """64-bit numbers with each bit of theirs in each bit of the result (the finalizer of splitmix64, Steele et al. 2014)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        numbers = (numbers ^ (numbers >> np.uint64(shift))) * np.uint64(factor)
    return numbers ^ (numbers >> np.uint64(31))


def loaded_ahead(load: Callable[[list[int]], np.ndarray], parts: Iterable[list[int]]) -> Iterator[tuple[list[int], np.ndarray]]:
    """Each part with its pictures, the next one's being loaded meanwhile: by one thread, since not every source takes several."""
    with ThreadPoolExecutor(1, thread_name_prefix="pictures") as pool:
        waiting: tuple[list[int], Future[np.ndarray]] | None = None
        for part in parts:
            ahead = (part, pool.submit(load, part))
            if waiting:
                yield waiting[0], waiting[1].result()
            waiting = ahead
        if waiting:
            yield waiting[0], waiting[1].result()
