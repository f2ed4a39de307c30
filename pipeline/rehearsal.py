"""What a training will take in time, by a few of its steps before the first, all of which are taken back. Knows clocks; knows no stage.

Nothing but the very steps foretells them: how much compiling wins and what the data cost differ from machine to machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from pipeline.sharding import local

_UNTIMED, _TIMED = 3, 10
"""Steps that compile and warm up; and steps timed."""
_STEPS_A_TIMED_ONE = 20
"""Steps of the training for each timed one, so that foretelling a short training does not take as long as it."""


class Ahead:
    """The batches of a training, each made in a thread while the step before it is taken. A context manager.

    Args:
        batch: (step) -> the batch of that step.
        steps: number of steps in all; none is made beyond them.
    """

    def __init__(self, batch: Callable[[int], Any], steps: int) -> None:
        self._batch, self._steps = batch, steps
        self._made: dict[int, Future[Any]] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()

    def take(self, step: int, *, keep: bool = False) -> Any:
        """The batch of a step; the next one is made meanwhile. With `keep` it can be taken again: a stream does not go back."""
        for wanted in (step, step + 1):
            if wanted < self._steps and wanted not in self._made:
                self._made[wanted] = self._pool.submit(self._batch, wanted)
        batch = self._made[step].result()
        if not keep:
            del self._made[step]
        return batch


@dataclass(frozen=True)
class Rehearsed:
    """Seconds a step takes from each of some steps on, to the end of the training."""

    pace: tuple[tuple[int, float], ...]
    steps: int

    @property
    def seconds(self) -> float:
        """All steps together."""
        ends = [*(first for first, _ in self.pace[1:]), self.steps]
        return sum((end - first) * each for (first, each), end in zip(self.pace, ends, strict=True))

    def line(self) -> str:
        (first, each), *later = self.pace
        paces = ", ".join([f"{each:.3g} s each", *(f"{each:.3g} s from step {step:,} on" for step, each in later)])
        return f"about {duration(self.seconds)} for {self.steps - first:,} steps ({paces}, beside evaluating)"


def rehearse(
    step: Callable[[int, Any], None], ahead: Ahead, first: int, steps: int, begins: Sequence[int], taken_back: Callable[[], Any]
) -> Rehearsed | None:
    """How long the steps from `first` on take; None where too few are left to take some of them twice.

    Args:
        step: (number, batch) takes one.
        begins: numbers of the steps at which more takes part than before, so that each takes longer.
        taken_back: () -> a context manager that undoes the steps taken in it.
    """
    timed = min((steps - first) // _STEPS_A_TIMED_ONE, _TIMED)
    if timed < 1:
        return None
    pace, batches = [], iter(range(first, steps))
    with taken_back():
        for begin in (first, *(begin for begin in begins if first < begin < steps)):
            ends = []
            for _ in range(_UNTIMED + timed):
                step(begin, ahead.take(next(batches), keep=True))
                ends.append(time.perf_counter())
            # The median, since what else the machine does falls on single steps.
            pace.append((begin, statistics.median(later - earlier for earlier, later in pairwise(ends[-timed - 1 :]))))
    return Rehearsed(tuple(pace), steps)


@contextmanager
def as_they_were(networks: Iterable[nn.Module], optimizers: Iterable[Optimizer] = ()) -> Iterator[None]:
    """Puts parameters, buffers and moments back when it ends, and takes gradients away; what they were is held in the CPU's memory
    meanwhile. Torch's random state is set by each step anew."""
    tensors = [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]
    held = [(tensor, tensor.data, _put_aside(tensor)) for tensor in tensors]
    moments = {
        optimizer: {p: {key: (value, _put_aside(value)) for key, value in state.items()} for p, state in optimizer.state.items()}
        for optimizer in optimizers
    }
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, data, values in held:
                tensor.grad = None
                if not isinstance(tensor, DTensor):
                    tensor.data = data  # a codebook that restarts is another tensor
                local(tensor.detach()).copy_(values)
            for optimizer, states in moments.items():
                optimizer.state.clear()
                for parameter, state in states.items():
                    for value, before in state.values():
                        local(value).copy_(before)
                    optimizer.state[parameter] = {key: value for key, (value, _) in state.items()}


def _put_aside(tensor: Tensor) -> Tensor:
    """A copy of this process's part."""
    return local(tensor.detach()).to("cpu", copy=True)


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} minutes" if seconds >= 600 else f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:.1f} hours"
