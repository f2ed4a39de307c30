"""A progress bar that shows the time left of its own work and of the whole run. Knows counts and
seconds; knows no stage."""

from __future__ import annotations

import time
from collections import deque
from statistics import fmean
from typing import Any

from tqdm import tqdm

_FORMAT = (
    "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}, {time_left}, "
    "{rate_fmt}{postfix}]"
)
_WARM_UP = 3
"""Updates whose time is left out of the pace: the first ones compile, load and fill caches."""
_RECENT = 50
"""Updates whose time makes the pace. The slowest 4% of them are left out: they hold evaluations."""


class ProgressBar(tqdm):  # type: ignore[type-arg]  # generic in its stubs alone
    """tqdm with an estimate of the time left that follows the recent pace.

    Args:
        seconds_after: estimated seconds that the rest of the run takes after this work.
        options: those of tqdm.
    """

    def __init__(self, *, seconds_after: float = 0.0, **options: Any) -> None:
        self.seconds_after = seconds_after
        self.updates = 0
        self.updated_at = 0.0
        self.paces: deque[float] = deque(maxlen=_RECENT)
        """Seconds per item of each recent update."""
        known = options.get("total") is not None
        super().__init__(mininterval=1.0, bar_format=_FORMAT if known else None, **options)

    def update(self, n: float | None = 1) -> bool | None:
        shown = super().update(n)
        now = time.perf_counter()
        if self.updates >= _WARM_UP and n:
            self.paces.append((now - self.updated_at) / n)
        self.updates += 1
        self.updated_at = now
        return shown

    def seconds_left(self) -> float | None:
        """Seconds until this work is done; None before there is a pace or where its size is
        unknown. Evaluations to come are not included."""
        if self.total is None or not self.paces:
            return None
        usual = sorted(self.paces)[: len(self.paces) - len(self.paces) // 25]
        return fmean(usual) * (self.total - self.n)

    @property
    def format_dict(self) -> dict[str, Any]:
        return {**super().format_dict, "time_left": self._time_left()}

    def _time_left(self) -> str:
        seconds = self.seconds_left()
        if seconds is None:
            return "? left"
        left = f"{tqdm.format_interval(seconds)} left"
        if not self.seconds_after:
            return left
        return f"{left}, run {tqdm.format_interval(seconds + self.seconds_after)}"
