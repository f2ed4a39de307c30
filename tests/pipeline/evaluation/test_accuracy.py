"""`Accuracy`: Wilson intervals against hand-computed and exact ones."""

from __future__ import annotations

import math

import pytest

from pipeline.evaluation.accuracy import Accuracy


def test_hits_are_counted():
    assert Accuracy.of([True, False, True]) == Accuracy(2, 3)
    assert Accuracy(2, 3).value == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("correct", "count", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_intervals_match_published_values(correct, count, low, high):
    """Newcombe 1998, table I, method 3; the last is the mirror of 0 of 20."""
    assert Accuracy(correct, count).interval == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize("probability", [0.05, 0.5, 0.9])
def test_intervals_contain_the_true_fraction_in_95_percent(probability):
    """Over all outcomes of 100 images, weighted by their probability."""
    covered = 0.0
    for correct in range(101):
        low, high = Accuracy(correct, 100).interval
        weight = (
            math.comb(100, correct) * probability**correct * (1 - probability) ** (100 - correct)
        )
        covered += weight * (low <= probability <= high)
    assert covered == pytest.approx(0.95, abs=0.02)
