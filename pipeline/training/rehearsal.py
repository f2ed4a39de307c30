"""What a training will take in time, by a few of its steps before the first, all of which are taken back. Knows clocks; knows no stage.

Nothing but the very steps foretells them: how much compiling wins and what the data cost differ from machine to machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pipeline.training.prefetch import Ahead

_UNTIMED, _TIMED = 3, 10
"""Steps that compile; and steps timed, at most."""
_SETTLING = 2.0
"""Seconds of further untimed steps, which are no more than the timed ones: for about a second after compiling, steps were measured to
take a sixth more."""
_STEPS_A_TIMED_ONE = 20
"""Steps of the training for each timed one, so that foretelling a short training does not take as long as it."""
_LEAST = 2
"""Timed steps that are worth the others."""
_LONGEST = 30.0
"""Seconds of timed steps, about."""


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


def steps_to_time(left: int) -> int:
    """How many of the steps that are left are timed; 0 where they are too few to take some of them twice."""
    timed = min(left // _STEPS_A_TIMED_ONE, _TIMED)
    return timed if timed >= _LEAST else 0


def steps_in_all(left: int) -> int:
    """Steps of a rehearsal before so many, at most."""
    timed = steps_to_time(left)
    return _UNTIMED + 2 * timed if timed else 0


def rehearse(
    step: Callable[[int, Any], None],
    ahead: Ahead,
    first: int,
    steps: int,
    begins: Sequence[int],
    taken_back: Callable[[], AbstractContextManager[None]],
    slowest: Callable[[float], float],
) -> Rehearsed | None:
    """How long the steps from `first` on take; None where too few are left.

    Args:
        step: (number, batch) takes one.
        begins: numbers of the steps at which more takes part than before, so that each takes longer.
        taken_back: () -> a context manager that undoes the steps taken in it.
        slowest: (seconds) -> the longest of all processes', on each of them.
    """
    timed, pace = steps_to_time(steps - first), []
    if not timed:
        return None
    with taken_back():
        for begin in (first, *(begin for begin in begins if first < begin < steps)):
            ends: list[float] = []
            settling = 0
            while len(ends) < _UNTIMED + settling + timed:
                behind = len(ends)
                # The same batches again where more takes part, or more and more of them would be held.
                step(min(begin + behind, steps - 1), ahead.take(first + behind % (steps - first), keep=True))
                ends.append(time.perf_counter())
                if behind == _UNTIMED:
                    each = max(slowest(ends[-1] - ends[-2]), 1e-9)
                    settling, timed = min(int(_SETTLING / each), timed), max(min(int(_LONGEST / each), timed), 1)
            took = sorted(later - earlier for earlier, later in pairwise(ends[-timed - 1 :]))
            # Without the slowest: what else the machine does falls on single steps.
            pace.append((begin, statistics.fmean(took[:-1] or took)))
    return Rehearsed(tuple(pace), steps)


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 90:
        return f"{max(seconds, 2):.0f} seconds"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} minutes" if seconds >= 600 else f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:.1f} hours"
