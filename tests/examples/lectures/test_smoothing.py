"""The plot of smoothings shows every smoothing, and its curves approach the bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.lectures.smoothing import NAMES, SHARPNESS, curve, main


@pytest.mark.parametrize("kind", NAMES)
def test_curves_approach_the_bit_as_b_grows(kind):
    at = 900  # eps = 0.9, at which a bit with p = 0.2 is 1
    values = [curve(kind, 0.2, b)[1][at] for b in SHARPNESS]
    assert values == sorted(values) and values[-1] > 0.95


def test_the_plot_is_written(tmp_path: Path):
    main(tmp_path / "smoothing.png")
    assert (tmp_path / "smoothing.png").read_bytes().startswith(b"\x89PNG")
