"""What a stage hands to the training loop, and what the loop asks of it. Knows names and shapes;
trains nothing."""

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
    """What `fit` minimises. `networks` holds a module per optimizer, by group."""

    networks: dict[str, nn.Module]

    def losses(
        self, batch: Any, step: int, networks: Mapping[str, nn.Module] | None = None
    ) -> Iterator[Loss]:
        """The losses of a step, one after another; the gradient of each is taken before the next is
        asked for.

        Args:
            networks: what to call in place of the objective's own networks: the same ones, wrapped
                so that gradients are averaged over processes.
        """
        ...

    def evaluate(self, batches: Iterable[Any]) -> dict[str, float]: ...


@dataclass
class Task:
    """What a stage hands to `fit`.

    Attributes:
        batch: (step) -> this process's part of the batch of that step, on the CPU; a pure function
            of the step.
        held_out: () -> batches to evaluate on.
        best: name of the held-out figure that says which weights are best (smaller is better).
        images: () -> name -> uint8 (H,W,3) grids to log at each evaluation, made with the
            averaged weights.
        alarm: (scalars, step) -> a line that warns of something wrong with training and says what
            to do, or None.
        rows: (step) -> names of the images in this process's part of the batch of that step, for
            errors.
    """

    objective: Objective
    batch: Callable[[int], Any]
    eval_batches: Callable[[], Iterable[Any]]
    best_metric: str
    sample_images: Callable[[], Mapping[str, Any]]
    check_health: Callable[[Mapping[str, float], int], str | None] = lambda scalars, step: None
    sample_names: Callable[[int], Sequence[str]] = lambda step: ()
