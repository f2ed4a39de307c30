"""Prefetches batches, each during the step before it. Knows threads; knows no data."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from pipeline.training.batch import Batch, pinned


class BatchPrefetcher:
    """The batches of a training, each made in a thread during the step before it. A context
    manager.

    Args:
        batch: (step) -> the batch of that step.
        steps: number of steps in all; no batch is made beyond them.
        pin_memory: whether batches lie in page-locked memory, from which a GPU reads them while it
            computes.
    """

    def __init__(
        self, batch: Callable[[int], Batch], steps: int, *, pin_memory: bool = False
    ) -> None:
        self._batch = (lambda step: pinned(batch(step))) if pin_memory else batch
        self._steps = steps
        self._pending: dict[int, Future[Batch]] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")

    def __enter__(self) -> BatchPrefetcher:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()

    def get(self, step: int) -> Batch:
        """The batch of a step; starts making the next one."""
        for wanted in (step, step + 1):
            if wanted < self._steps and wanted not in self._pending:
                self._pending[wanted] = self._pool.submit(self._batch, wanted)
        return self._pending.pop(step).result()
