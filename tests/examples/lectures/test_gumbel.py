"""Gumbel-max has the shares of the softmax; the gradient of the relaxation is biased."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from examples.lectures.gumbel import (
    LOGITS,
    VECTORS,
    cost,
    exact_gradient,
    main,
    relaxed_gradients,
    shares,
)


def test_gumbel_max_has_the_shares_of_the_softmax():
    found = shares(20_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, LOGITS.softmax(0), atol=0.015, rtol=0)


def test_the_exact_gradient_by_hand():
    """p_k (cost_k - expected cost), of the softmax's derivative."""
    p = LOGITS.softmax(0)
    costs = cost(torch.eye(3))
    torch.testing.assert_close(costs, (VECTORS - 0.9).square())
    torch.testing.assert_close(exact_gradient(), p * (costs - p @ costs))


def test_the_relaxed_gradient_is_biased_less_at_lower_temperatures_and_varies_more():
    generator = torch.Generator().manual_seed(0)
    exact = exact_gradient()
    high, low = (relaxed_gradients(t, 20_000, generator) for t in (1.0, 0.2))
    biases = [float((found.mean(0) - exact).norm() / exact.norm()) for found in (high, low)]
    assert biases[0] == pytest.approx(0.35, abs=0.05) and biases[1] < 0.12
    assert float(low.var(0).sum()) > 4 * float(high.var(0).sum())


def test_the_plot_is_written(tmp_path: Path):
    main(tmp_path / "gumbel.png", samples=100)
    assert (tmp_path / "gumbel.png").read_bytes().startswith(b"\x89PNG")
