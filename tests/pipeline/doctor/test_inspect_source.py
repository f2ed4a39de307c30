"""Numbers of a source: histograms and spreads by hand."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.doctor.inspect_source import binned, spread
from pipeline.doctor.report import Finding, Spread, findings_that_apply


@pytest.mark.parametrize(("side", "counts"), [("right", [1, 2, 1]), ("left", [2, 1, 1])])
def test_a_value_on_an_edge_lies_on_the_side_that_is_named(side, counts):
    bins = binned(np.array([9, 10, 15, 99]), [10, 20], ["low", "middle", "high"], side)
    assert [one.label for one in bins] == ["low", "middle", "high"]
    assert [one.count for one in bins] == counts


def test_empty_bins_are_kept():
    assert [one.count for one in binned(np.array([5]), [10, 20], ["a", "b", "c"])] == [1, 0, 0]


def test_a_spread_is_of_the_values_and_of_no_values_none():
    values = np.arange(101.0)
    assert spread(values) == Spread(smallest=0, median=50, most=99, largest=100)
    assert spread(values[:0]) is None


def test_findings_that_do_not_apply_are_left_out():
    found = findings_that_apply((0, "fails", "a"), (3, "warns", "b"), (True, "notes", "c"))
    assert found == [Finding("warns", "b"), Finding("notes", "c")]
