"""f-divergences against closed forms, and the Gaussians that fit a mixture best."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from examples.lectures import f_divergences
from examples.lectures.f_divergences import (
    GENERATORS,
    POINTS,
    TARGET,
    Gaussian,
    Mixture,
    divergence,
    fit,
    log_mixture,
    log_normal,
    main,
)

EVERY = pytest.mark.parametrize("name", GENERATORS)
SPACING = float(POINTS[1] - POINTS[0])
P = Gaussian(-0.5, 1.2)
Q = Gaussian(0.7, 1.0)


def between(p: Gaussian, q: Gaussian, name: str) -> float:
    log_p = log_normal(POINTS, p.mean, p.std)
    log_q = log_normal(POINTS, q.mean, q.std)
    return float(divergence(log_p, log_q, SPACING, GENERATORS[name]))


def kl_of_gaussians(p: Gaussian, q: Gaussian) -> float:
    squares = (p.std**2 + (p.mean - q.mean) ** 2) / q.std**2
    return math.log(q.std / p.std) + squares / 2 - 0.5


@EVERY
def test_generators_are_convex_and_0_at_1(name):
    f = GENERATORS[name]
    u = torch.linspace(0.05, 20, 800, dtype=torch.float64)
    values = f(u)
    assert float(f(torch.ones(1, dtype=torch.float64))) == pytest.approx(0, abs=1e-12)
    assert (values[2:] - 2 * values[1:-1] + values[:-2] > 0).all()


@EVERY
def test_a_divergence_is_0_for_equal_distributions_alone(name):
    assert between(P, P, name) == pytest.approx(0, abs=1e-9)
    for other in (Gaussian(-0.5, 1.25), Gaussian(-0.45, 1.2), Q, Gaussian(3.0, 2.0)):
        assert between(P, other, name) > 1e-5


def test_kl_of_gaussians_in_closed_form():
    assert between(P, Q, "KL") == pytest.approx(kl_of_gaussians(P, Q), rel=1e-6)
    assert between(P, Q, "reverse KL") == pytest.approx(kl_of_gaussians(Q, P), rel=1e-6)


def test_pearson_of_gaussians_in_closed_form():
    """exp((m - n)^2 / s^2) - 1 for equal standard deviations."""
    found = between(Gaussian(0.0, 1.5), Gaussian(1.0, 1.5), "Pearson")
    assert found == pytest.approx(math.exp(1 / 1.5**2) - 1, rel=1e-6)


def test_squared_hellinger_of_gaussians_in_closed_form():
    """2 - 2 times the Bhattacharyya coefficient."""
    variances = P.std**2 + Q.std**2
    overlap = math.sqrt(2 * P.std * Q.std / variances)
    overlap *= math.exp(-((P.mean - Q.mean) ** 2) / (4 * variances))
    assert between(P, Q, "squared Hellinger") == pytest.approx(2 - 2 * overlap, rel=1e-6)


def test_jensen_shannon_is_the_mean_kl_to_the_middle_and_half_of_gan():
    p = log_normal(POINTS, P.mean, P.std)
    q = log_normal(POINTS, Q.mean, Q.std)
    middle = torch.logaddexp(p, q) - math.log(2)
    kl = GENERATORS["KL"]
    by_hand = float(divergence(p, middle, SPACING, kl) + divergence(q, middle, SPACING, kl)) / 2
    assert between(P, Q, "Jensen-Shannon") == pytest.approx(by_hand, rel=1e-6)
    assert between(P, Q, "GAN") == pytest.approx(2 * by_hand, rel=1e-6)
    far = between(Gaussian(-5.0, 0.5), Gaussian(5.0, 0.5), "Jensen-Shannon")
    assert far == pytest.approx(math.log(2), abs=1e-6)


def moments(mixture: Mixture) -> tuple[float, float]:
    """Mean and standard deviation."""
    pairs = list(zip(mixture.weights, mixture.parts, strict=True))
    mean = sum(weight * part.mean for weight, part in pairs)
    square = sum(weight * (part.std**2 + part.mean**2) for weight, part in pairs)
    return mean, math.sqrt(square - mean**2)


def test_forward_kl_is_maximum_likelihood_and_takes_the_moments_of_the_mixture():
    q = fit(TARGET, GENERATORS["KL"])
    assert (q.mean, q.std) == pytest.approx(moments(TARGET), abs=1e-3)

    def mean_log_likelihood(mean: float, std: float) -> float:
        density = log_mixture(POINTS, TARGET).exp()
        return float((density * log_normal(POINTS, mean, std)).sum() * SPACING)

    best = mean_log_likelihood(q.mean, q.std)
    for mean, std in ((0.1, 0.0), (-0.1, 0.0), (0.0, 0.1), (0.0, -0.1)):
        assert mean_log_likelihood(q.mean + mean, q.std + std) < best


def test_forward_kl_covers_both_modes_and_reverse_kl_seeks_the_larger():
    covering = fit(TARGET, GENERATORS["KL"])
    seeking = fit(TARGET, GENERATORS["reverse KL"])
    large, small = TARGET.parts
    for mode in (large, small):
        assert abs(mode.mean - covering.mean) < 1.5 * covering.std
    assert seeking.mean == pytest.approx(large.mean, abs=0.2)
    assert seeking.std == pytest.approx(large.std, abs=0.2)
    assert abs(small.mean - seeking.mean) > 4 * seeking.std


@EVERY
def test_a_gaussian_is_fitted_by_itself(name, monkeypatch):
    monkeypatch.setattr(f_divergences, "ROUNDS", 7)
    q = fit(Mixture((1.0,), (Gaussian(1.0, 1.5),)), GENERATORS[name])
    assert (q.mean, q.std) == pytest.approx((1.0, 1.5), abs=5e-3)


def test_the_plot_is_written(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(f_divergences, "ROUNDS", 1)
    main(tmp_path / "f_divergences.png")
    assert (tmp_path / "f_divergences.png").read_bytes().startswith(b"\x89PNG")
