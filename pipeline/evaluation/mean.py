"""`Mean`: the mean of a number over images, with its 95% interval. Knows numbers; no images."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.evaluation.accuracy import Z


@dataclass(frozen=True)
class Mean:
    """A mean over images that do not depend on one another."""

    value: float
    standard_deviation: float
    """Over the images (n - 1 in the denominator)."""
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Of the numbers of at least two images."""
        return cls(statistics.fmean(values), statistics.stdev(values), len(values))

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval by the normal approximation, which needs some twenty images."""
        half = Z * self.standard_deviation / math.sqrt(self.count)
        return self.value - half, self.value + half

    def text(self) -> str:
        """The interval and what is behind it, for a table."""
        low, high = self.interval
        return f"95% interval {low:.3f} to {high:.3f}, of {self.count}"
