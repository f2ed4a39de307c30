"""What a stage hands to the training loop, and what the loop asks of it. Knows names and shapes; trains nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn


class Loss(Protocol):
    """One loss to step: for the optimizer of `group`."""

    @property
    def group(self) -> str: ...
    @property
    def value(self) -> Tensor: ...
    @property
    def metrics(self) -> dict[str, Tensor]: ...


class Objective(Protocol):
    """What `fit` minimises. `networks` holds a module an optimizer, by group; the loop puts wrapped ones in their place, and
    `losses` calls those, so that gradients are averaged over processes."""

    networks: dict[str, nn.Module]

    def losses(self, batch: Any, step: int) -> Iterator[Loss]: ...
    def evaluate(self, batches: Iterable[Any]) -> dict[str, float]: ...


@dataclass
class Task:
    """What a stage hands to `fit`.

    Attributes:
        batch: (step) -> this process's part of the batch of that step, on the CPU; a pure function of the step.
        held_out: () -> batches to evaluate on.
        best: name of the held-out figure that says which weights are best (smaller is better).
        pictures: () -> name -> uint8 (H,W,3) grids to log at each evaluation, made with the averaged weights.
        alarm: (scalars, step) -> a line that warns of something wrong with training and says what to do, or None.
        rows: (step) -> names of the pictures in this process's part of the batch of that step, for errors.
        begins: numbers of the steps at which more takes part than before, so that each takes longer.
    """

    objective: Objective
    batch: Callable[[int], Any]
    held_out: Callable[[], Iterable[Any]]
    best: str
    pictures: Callable[[], Mapping[str, Any]]
    alarm: Callable[[Mapping[str, float], int], str | None] = lambda scalars, step: None
    rows: Callable[[int], Sequence[str]] = lambda step: ()
    begins: Sequence[int] = ()
