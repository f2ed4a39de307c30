"""Gradients through samples, of a Gaussian and of codes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from examples.lectures.reparameterisation import (
    MEAN,
    costs_of_codes,
    estimates,
    expected_cost,
    main,
)
from stage1_tokenizer.quantizers.categorical import gumbel_noise_like


def test_both_estimators_have_the_exact_mean_and_reparameterisation_varies_less():
    through, score = estimates(20_000, torch.Generator().manual_seed(0))
    exact = 2 * (MEAN - 2)
    assert float(through.mean()) == pytest.approx(exact, abs=0.05)
    assert float(score.mean()) == pytest.approx(exact, abs=0.2)
    assert float(through.std()) < float(score.std()) / 3


def test_the_cost_of_a_sampled_code_is_a_step_function_with_the_expected_mean():
    noise = gumbel_noise_like(torch.zeros(2000, 3), torch.Generator().manual_seed(0))
    first = torch.linspace(-3, 3, 61)
    found = costs_of_codes(first, noise)
    changes = (found[1:] != found[:-1]).sum(0)
    assert int(changes.max()) == 1 and float(changes.float().mean()) > 0.5
    torch.testing.assert_close(found.mean(1), expected_cost(first), atol=0.06, rtol=0)


def test_the_plot_is_written(tmp_path: Path):
    main(tmp_path / "reparameterisation.png", samples=100)
    assert (tmp_path / "reparameterisation.png").read_bytes().startswith(b"\x89PNG")
