"""What a stage hands to the training loop, and what the loop asks of it. Knows names and shapes;
trains nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor, nn

from pipeline.training.batch import Batch

Autocast = Callable[[], AbstractContextManager[object]]
"""Makes the context of a forward pass: torch.autocast with its arguments."""


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
        self, batch: Batch, step: int, networks: Mapping[str, nn.Module] | None = None
    ) -> Iterator[Loss]:
        """The losses of a step, one after another; the gradient of each is taken before the next is
        asked for.

        Args:
            networks: what to call in place of the objective's own networks: the same ones, wrapped
                so that gradients are averaged over processes.
        """
        ...

    def compile(self) -> None:
        """Compiles the networks in place, and what else the losses call."""
        ...

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]: ...


@dataclass
class Task:
    """What a stage hands to `fit`."""

    objective: Objective
    batch: Callable[[int], Batch]
    """(step) -> this process's part of the step's batch, on the CPU; a pure function of the
    step."""
    eval_batches: Callable[[], Iterable[Batch]]
    best_metric: str
    """Name of the held-out metric that decides which weights are best (smaller is better)."""
    sample_images: Callable[[], Mapping[str, np.ndarray]]
    """() -> name -> uint8 (H,W,3) grids to log at each evaluation, made with the EMA weights."""
    check_health: Callable[[Mapping[str, float], int], str | None] = lambda scalars, step: None
    """(scalars, step) -> a one-line warning that says what to do, or None."""
    sample_names: Callable[[int], Sequence[str]] = lambda step: ()
    """(step) -> names of the images in this process's part of the step's batch, for errors."""
