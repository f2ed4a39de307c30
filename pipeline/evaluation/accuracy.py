"""`Accuracy`: a fraction of images that are right, with its 95% interval. Knows counts; no
images."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

ENOUGH = 20
"""Images below which an interval is too wide to say much: at 10 of 19 it spans 41 points."""
Z = 1.959964
"""Standard deviations of a normal distribution within which 95% of it lie."""


@dataclass(frozen=True)
class Accuracy:
    """How many of `count` images are right. One image does not depend on another."""

    correct: int
    count: int

    @classmethod
    def of(cls, hits: Iterable[bool]) -> Accuracy:
        """Of images that are right or wrong."""
        judged = [bool(hit) for hit in hits]
        return cls(sum(judged), len(judged))

    @property
    def value(self) -> float:
        return self.correct / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval: the fractions at which so many right images are no surprise (Wilson
        1927). Unlike the normal approximation it holds for few images and near 0 and 1."""
        spread = Z**2 / self.count
        middle = (self.value + spread / 2) / (1 + spread)
        half = math.sqrt(spread * (self.value * (1 - self.value) + spread / 4)) / (1 + spread)
        return max(middle - half, 0.0), min(middle + half, 1.0)

    def text(self) -> str:
        """The interval and what is behind it, for a table."""
        low, high = self.interval
        return f"95% interval {low:.1%} to {high:.1%}, of {self.count}"
