"""Which pictures a step sees, a pure function of (seed, step), so that no position in the data needs to be saved; and loading ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

import numpy as np

from pipeline.data.mixing import MixedSource, Mixture
from pipeline.data.sources import Source

Loaded = TypeVar("Loaded")
Part = TypeVar("Part")


class Feed(Protocol):
    """One process's pictures, step by step."""

    def pictures(self, step: int) -> np.ndarray:
        """(B,S,S,3) uint8."""
        ...

    def names(self, step: int) -> list[str]:
        """What to call the pictures of a step in messages."""
        ...


class Passes:
    """Endless shuffled passes over `length` rows, each row once a pass."""

    def __init__(self, length: int, seed: int) -> None:
        if length < 1:
            raise ValueError("there are no pictures to train on; check data.source and data.held_out")
        self.length, self.seed = length, seed
        self._pass, self._shuffled = -1, np.empty(0, dtype=np.int64)

    def row(self, position: int) -> int:
        number, within = divmod(position, self.length)
        if number != self._pass:
            self._pass = number
            self._shuffled = np.random.default_rng([self.seed, number]).permutation(self.length)
        return int(self._shuffled[within])


class Order:
    """The rows of each step: batches run on across passes.

    Args:
        lengths: rows there are, or those of each part of a mixture, which lie one after another.
        batch_size: rows a step, over all processes.
        seed: start of the shuffles.
        weights: of the parts.
    """

    def __init__(self, lengths: int | Sequence[int], batch_size: int, seed: int, weights: Sequence[float] = (1.0,)) -> None:
        parts = [lengths] if isinstance(lengths, int) else list(lengths)
        self.batch_size, self.seed = batch_size, seed
        self._starts = np.cumsum([0, *parts])
        self._passes = [Passes(length, seed) for length in parts]
        self._mixture = Mixture(weights, seed) if len(parts) > 1 else None

    def rows(self, step: int) -> np.ndarray:
        """The rows (batch_size,) of a step."""
        first = step * self.batch_size
        return np.array([self._row(first + i) for i in range(self.batch_size)])

    def share(self, step: int, process: int, processes: int) -> np.ndarray:
        """One process's equal part of the rows of a step."""
        return self.rows(step)[_part(self.batch_size, process, processes)]

    def draws(self, step: int, process: int, processes: int) -> list[int]:
        """A number for each of those rows, for what is random about how it is seen."""
        return step_draws(self.seed, step, self.batch_size)[_part(self.batch_size, process, processes)].tolist()

    def _row(self, position: int) -> int:
        if self._mixture is None:
            return self._passes[0].row(position)
        part, number = self._mixture.at(position)
        return int(self._starts[part]) + self._passes[part].row(number)


def step_draws(seed: int, step: int, count: int) -> np.ndarray:
    """Random numbers (count,) int64 of a step."""
    return np.random.default_rng([seed, step, 2]).integers(0, 2**62, count)


def order_of(source: Source, batch_size: int, seed: int) -> Order:
    """The order in which training sees a source, or codes that were made of it."""
    if isinstance(source, MixedSource):
        return Order(source.lengths, batch_size, seed, source.weights)
    return Order(len(source), batch_size, seed)


class MappedFeed:
    """Pictures of a source that is read in any order: each process has its part of what one process would have."""

    def __init__(self, source: Source, batch_size: int, seed: int, process: int, processes: int) -> None:
        self._source, self._order, self._place = source, order_of(source, batch_size, seed), (process, processes)

    def pictures(self, step: int) -> np.ndarray:
        return self._source.images(self._order.share(step, *self._place).tolist(), self._order.draws(step, *self._place))

    def names(self, step: int) -> list[str]:
        return self._source.names(self._order.share(step, *self._place).tolist())


def _part(batch_size: int, process: int, processes: int) -> slice:
    each = batch_size // processes
    return slice(process * each, (process + 1) * each)


def loaded_ahead(load: Callable[[Part], Loaded], parts: Iterable[Part]) -> Iterator[tuple[Part, Loaded]]:
    """Each part with what `load` gives for it, the next one's being loaded meanwhile: by one thread, as not every source takes several."""
    with ThreadPoolExecutor(1, thread_name_prefix="pictures") as pool:
        waiting: tuple[Part, Future[Loaded]] | None = None
        for part in parts:
            ahead = (part, pool.submit(load, part))
            if waiting:
                yield waiting[0], waiting[1].result()
            waiting = ahead
        if waiting:
            yield waiting[0], waiting[1].result()
