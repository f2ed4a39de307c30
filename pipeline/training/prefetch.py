"""Batches made while the step before is taken. Knows threads; knows no data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class BatchPrefetcher:
    """The batches of a training, each made in a thread while the step before it is taken. A context
    manager.

    Args:
        batch: (step) -> the batch of that step.
        steps: number of steps in all; none is made beyond them.
        pin_memory: whether batches lie in page-locked memory, from which a GPU reads them while it
            computes.
    """

    def __init__(
        self, batch: Callable[[int], Any], steps: int, *, pin_memory: bool = False
    ) -> None:
        self._batch = (lambda step: pinned(batch(step))) if pin_memory else batch
        self._steps = steps
        self._made: dict[int, Future[Any]] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")

    def __enter__(self) -> BatchPrefetcher:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()

    def get(self, step: int) -> Any:
        """The batch of a step; the next one is made meanwhile."""
        for wanted in (step, step + 1):
            if wanted < self._steps and wanted not in self._made:
                self._made[wanted] = self._pool.submit(self._batch, wanted)
        return self._made.pop(step).result()


def pinned(batch: Any) -> Any:
    """A batch, or a mapping of batches, in page-locked memory."""
    if isinstance(batch, Mapping):
        return {key: pinned(value) for key, value in batch.items()}
    return batch.pin_memory()
