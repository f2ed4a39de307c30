"""Estimates of log p(x) from samples of the latent variable, against the exact sum."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from examples.lectures.likelihood import log_estimates, log_likelihood, main, model


def test_estimates_are_unbiased_and_their_logarithms_too_low():
    mixture = model()
    exact = float(log_likelihood(torch.tensor([0.1], dtype=torch.float64), mixture))
    generator = torch.Generator().manual_seed(0)
    few, many = (log_estimates(0.1, mixture, count, 2000, generator) for count in (50, 800))
    assert float(few.exp().mean().log()) == pytest.approx(exact, abs=0.1)
    assert float(few.mean()) < float(many.mean()) - 0.2 < exact
    assert float(many.mean()) == pytest.approx(exact, abs=0.1)


def test_the_weights_sum_to_one():
    assert float(model().log_weights.exp().sum()) == pytest.approx(1)


def test_the_plot_is_written(tmp_path: Path):
    main(tmp_path / "likelihood.png", repetitions=2)
    assert (tmp_path / "likelihood.png").read_bytes().startswith(b"\x89PNG")
