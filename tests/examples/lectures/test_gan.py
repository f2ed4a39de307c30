"""Squared errors give grey; a discriminator moves decoded images away from it."""

from __future__ import annotations

from pathlib import Path

import torch

from examples.lectures.gan import main, stripes, train


def test_the_mean_of_the_stripes_is_grey():
    true = stripes(4000, torch.Generator().manual_seed(0))
    assert (true.abs() == 1).all()
    assert float(true.mean(0).abs().max()) < 0.1


def test_the_squared_error_ends_at_grey_and_a_discriminator_moves_images_to_stripes():
    every = stripes(100, torch.Generator().manual_seed(1)).unique(dim=0)
    assert len(every) == 4
    grey = train(60, 0)
    sharp = train(150, 2)
    assert float(grey.abs().mean()) < 0.1
    distances = (sharp[:, None] - every).square().mean((2, 3, 4)).min(1).values
    assert float(distances.median()) < 0.1


def test_the_plot_is_written(tmp_path: Path):
    main(tmp_path / "gan.png", steps=1)
    assert (tmp_path / "gan.png").read_bytes().startswith(b"\x89PNG")
