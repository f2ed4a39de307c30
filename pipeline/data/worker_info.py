"""`WorkerInfo`: one process's part of work that several do. Knows no processes: the caller does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class WorkerInfo:
    """One process's part of work that several do.

    Attributes:
        index, count: of the processes.
        gather: (own value) -> the values of all processes, in order; called by all or by none.
    """

    index: int = 0
    count: int = 1
    gather: Callable[[Any], list[Any]] = lambda own: [own]


SINGLE_PROCESS = WorkerInfo()
