"""EM never lowers the likelihood; bounds and gaps of exact and amortised posteriors add up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from examples.lectures.em import (
    Mixture,
    bound,
    em,
    gap,
    log_amortised,
    m_step,
    main,
    network,
    sample,
    start,
    train,
)


@pytest.fixture
def x() -> Tensor:
    return sample(200)


@pytest.fixture
def mixture(x: Tensor) -> Mixture:
    return em(x, start(x, 3), 10)[0]


def test_the_likelihood_of_a_mixture_by_hand():
    """An even mixture of N(0, 1) and N(2, 1) at 1: both densities are e^(-1/2) / sqrt(2 pi)."""
    means = torch.tensor([0.0, 2.0])
    mixture = Mixture(torch.tensor([0.5, 0.5]), means, torch.ones(2))
    x = torch.tensor([1.0, 3.0])
    assert float(mixture.log_likelihood(x)[0]) == pytest.approx(-0.5 - 0.918939, abs=1e-5)
    odds = mixture.log_posterior(x)[1]
    assert float(odds[1] - odds[0]) == pytest.approx((3**2 - 1**2) / 2, abs=1e-5)


def test_em_never_lowers_the_likelihood(x):
    likelihoods = torch.tensor(em(x, start(x, 3), 60)[1])
    assert len(likelihoods) == 61 and likelihoods[-1] > likelihoods[0] + 0.05
    assert (likelihoods[1:] >= likelihoods[:-1] - 1e-12).all()


def test_the_bound_of_the_e_step_is_tight(x, mixture):
    log_q = mixture.log_posterior(x)
    torch.testing.assert_close(bound(mixture, x, log_q), mixture.log_likelihood(x))
    torch.testing.assert_close(gap(mixture, x, log_q), torch.zeros_like(x))


def test_no_other_mixture_has_a_higher_bound_than_that_of_the_m_step(x, mixture):
    log_q = mixture.log_posterior(x)
    best = m_step(x, log_q.exp())
    highest = float(bound(best, x, log_q).mean())
    moved = best.weights + torch.tensor([0.02, -0.02, 0.0], dtype=x.dtype)
    others = [
        mixture,
        Mixture(moved, best.means, best.stds),
        Mixture(best.weights, best.means + 0.05, best.stds),
        Mixture(best.weights, best.means, best.stds * 1.05),
    ]
    assert all(float(bound(other, x, log_q).mean()) < highest for other in others)


@pytest.mark.parametrize("hidden", [2, 8])
def test_the_amortised_bound_falls_short_by_the_kl_to_the_posterior(x, mixture, hidden):
    encoder = network(hidden, 3)
    bounds = train(encoder, mixture, x, 60)
    log_q = log_amortised(encoder, x).detach()
    likelihood = float(mixture.log_likelihood(x).mean())
    elbo = float(bound(mixture, x, log_q).mean())
    kl = float(gap(mixture, x, log_q).mean())
    assert max(bounds) <= likelihood and elbo > bounds[0] + 1
    assert kl > 0.001 and likelihood - elbo == pytest.approx(kl, abs=1e-5)


def test_the_plot_is_written(tmp_path: Path):
    main(tmp_path / "em.png", iterations=2, steps=2)
    assert (tmp_path / "em.png").read_bytes().startswith(b"\x89PNG")
