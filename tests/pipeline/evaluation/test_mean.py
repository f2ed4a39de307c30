"""`Mean`: its interval by hand."""

from __future__ import annotations

import math

import pytest

from pipeline.evaluation.mean import Mean


def test_the_interval_is_two_standard_errors_around_the_mean():
    mean = Mean.of([1.0, 2.0, 3.0, 6.0])
    error = math.sqrt((4 + 1 + 0 + 9) / 3) / 2
    assert mean.value == 3.0 and mean.count == 4
    assert mean.interval == pytest.approx((3 - 1.959964 * error, 3 + 1.959964 * error))
    assert mean.text() == "95% interval 0.883 to 5.117, of 4"
