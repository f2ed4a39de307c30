"""`Share`: one process's part of work that several do. Knows no processes; whoever starts the work
does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class WorkerInfo:
    """One process's part of work that several do.

    Attributes:
        index, count: of the processes.
        gather: (something) -> everybody's, in order; called by all or by none.
    """

    index: int = 0
    count: int = 1
    gather: Callable[[Any], list[Any]] = lambda own: [own]


SINGLE_PROCESS = WorkerInfo()
