"""Squared errors give grey; a discriminator moves decoded images away from it."""

from __future__ import annotations

from pathlib import Path

import torch

from examples.lectures.gan import main, stripes, train


def test_the_mean_of_the_stripes_is_grey():
    true = stripes(4000, torch.Generator().manual_seed(0))
    assert (true.abs() == 1).all()
    assert float(true.mean(0).abs().max()) < 0.1


def test_the_squared_error_ends_at_grey():
    decoded, _ = train(60, 0)
    assert float(decoded.abs().mean()) < 0.1


def test_the_plot_is_written(tmp_path: Path):
    main(tmp_path / "gan.png", steps=1)
    assert (tmp_path / "gan.png").read_bytes().startswith(b"\x89PNG")
