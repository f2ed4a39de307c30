"""A continuous flow: its solver, its density, and the adjoint gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from examples.lectures.continuous_flow import (
    adjoint_gradient,
    direct_gradient,
    log_density_along,
    main,
    path,
    solve,
)
from stage2_prior.flows.base import standard_normal_log_prob

THETA = torch.tensor(2.0, dtype=torch.float64)


def noise(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, generator=generator, dtype=torch.float64)


def test_the_solver_has_order_four():
    """dy/dt = y from 1 ends at e; half the step has a sixteenth of the error."""
    start = torch.ones(1, dtype=torch.float64)
    exact = start.exp()
    errors = [float((solve(lambda y: y, start, steps)[-1] - exact).abs()) for steps in (10, 20)]
    assert errors[0] < 1e-5 and errors[0] / errors[1] == pytest.approx(16, rel=0.1)


def test_the_density_along_a_path_is_that_of_the_change_of_variables():
    start = noise(20).requires_grad_()
    end = path(start, THETA, 60)[-1]
    (stretch,) = torch.autograd.grad(end.sum(), start)
    expected = standard_normal_log_prob(start.detach()[:, None]) - stretch.log()
    z, log_p = log_density_along(start.detach(), THETA, 60)
    torch.testing.assert_close(z, end.detach())
    torch.testing.assert_close(log_p, expected, atol=1e-3, rtol=0)


def test_the_adjoint_gradient_is_that_through_the_solver():
    start = noise(20)
    end = path(start, THETA, 60)[-1]
    direct = direct_gradient(start, THETA, 60)
    torch.testing.assert_close(adjoint_gradient(end, THETA, 60), direct, atol=0, rtol=1e-3)


def test_the_plot_is_written(tmp_path: Path):
    main(tmp_path / "continuous-flow.png", samples=50)
    assert (tmp_path / "continuous-flow.png").read_bytes().startswith(b"\x89PNG")
