"""The rows of each step, where there are too many rows for a list of them."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.data import sampler
from pipeline.data.sampler import BatchSampler, feistel_permutation


@pytest.mark.parametrize(
    "length", [1, 2, 3, 4, 5, 7, 8, 63, 64, 65, 1000, 4096, 4097, 100_003, 262_145]
)
def test_every_epoch_has_each_row_once(length):
    for seed in ([0, 0], [0, 1], [7, 123456]):
        assert np.array_equal(
            np.sort(feistel_permutation(np.arange(length), length, seed)), np.arange(length)
        )


def test_permutation_of_a_position_does_not_depend_on_others():
    together = feistel_permutation(np.arange(1000), 1000, [3, 4])
    assert [
        int(feistel_permutation(np.array([i]), 1000, [3, 4])[0]) for i in range(0, 1000, 97)
    ] == together[::97].tolist()


def test_epoch_orders_look_random():
    """Neighbours are no nearer than chance has it, passes differ, and each part of the data comes
    as often in each part of a pass."""
    length = 100_000
    one, two = (feistel_permutation(np.arange(length), length, [0, number]) for number in (0, 1))
    assert np.abs(np.diff(one)).mean() == pytest.approx(length / 3, rel=0.01)
    assert (
        (one == two).sum() < 10
        and abs(np.corrcoef(one, two)[0, 1]) < 0.01
        and abs(np.corrcoef(one, np.arange(length))[0, 1]) < 0.01
    )
    met, _, _ = np.histogram2d(np.arange(length), one, bins=10)
    assert ((met - 1000) ** 2 / 1000).sum() < 81 + 4 * (
        2 * 81
    ) ** 0.5  # chi-squared of 9 x 9 degrees of freedom, four deviations above


def test_permutation_of_a_billion_rows_needs_no_memory(monkeypatch):
    rows = BatchSampler(10**9, 64, 0).rows(10**6)
    assert len(set(rows.tolist())) == 64 and rows.min() >= 0 and rows.max() < 10**9
    assert (
        BatchSampler(10, 10, 0).rows(0).tolist()
        == np.random.default_rng([0, 0]).permutation(10).tolist()
    )
    monkeypatch.setattr(sampler, "MAX_EXPLICIT_PERMUTATION", 5)
    order = BatchSampler(10, 4, 0)
    seen = np.concatenate([order.rows(step) for step in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert np.array_equal(np.concatenate([order.share(0, i, 2) for i in range(2)]), order.rows(0))
