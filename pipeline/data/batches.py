"""Which rows a step sees, a pure function of (seed, step), so that no position in the data needs to be saved; and pictures loaded ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

Loaded = TypeVar("Loaded")


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
        first = step * self.batch_size
        return np.array([self._row(first + i) for i in range(self.batch_size)])

    def share(self, step: int, process: int, processes: int) -> np.ndarray:
        """One process's equal part of the rows of a step."""
        rows = self.rows(step)
        each = len(rows) // processes
        return rows[process * each : (process + 1) * each]

    def _row(self, position: int) -> int:
        number, within = divmod(position, self.length)
        if number != self._pass:
            self._pass = number
            self._shuffled = np.random.default_rng([self.seed, number]).permutation(self.length)
        return int(self._shuffled[within])


def loaded_ahead(load: Callable[[list[int]], Loaded], parts: Iterable[list[int]]) -> Iterator[tuple[list[int], Loaded]]:
    """Each part with what `load` gives for it, the next one's being loaded meanwhile: by one thread, as not every source takes several."""
    with ThreadPoolExecutor(1, thread_name_prefix="pictures") as pool:
        waiting: tuple[list[int], Future[Loaded]] | None = None
        for part in parts:
            ahead = (part, pool.submit(load, part))
            if waiting:
                yield waiting[0], waiting[1].result()
            waiting = ahead
        if waiting:
            yield waiting[0], waiting[1].result()
