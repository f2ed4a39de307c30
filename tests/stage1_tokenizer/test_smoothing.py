"""Smoothing transformations against hand-computed values, their definitions and finite
differences."""

from __future__ import annotations

import math
import typing
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stage1_tokenizer.options import BinaryOptions
from stage1_tokenizer.quantizers.smoothing import (
    Mixture,
    Smoothing,
    density,
    distributions,
    inverse,
    smooth,
)

MIXTURES = typing.get_args(Mixture)
KINDS = typing.get_args(Smoothing)
EVERY_MIXTURE = pytest.mark.parametrize("kind", MIXTURES)
EVERY = pytest.mark.parametrize("kind", KINDS)
SHARPNESS = pytest.mark.parametrize("b", [1.5, 5.0, 16.0])


def grid(count: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and uniform numbers, every pair of each."""
    q = torch.linspace(0.03, 0.97, count, dtype=torch.float64)
    u = torch.linspace(0.013, 0.987, count + 1, dtype=torch.float64)
    return q.repeat_interleave(len(u)), u.repeat(len(q))


def test_the_options_list_every_smoothing():
    assert set(typing.get_args(typing.get_type_hints(BinaryOptions)["smoothing"])) == set(KINDS)


def test_spike_and_exponential_by_hand():
    """b = 2, q = 0.8: below u = 0.2 the spike; at u = 0.6 half of the mass of the one: s = log(1 +
    (e^2 - 1) / 2) / 2."""
    s = inverse(
        torch.tensor([0.1, 0.6, 1.0]), torch.tensor([0.8, 0.8, 0.8]), 2.0, "spike_exponential"
    )
    torch.testing.assert_close(s, torch.tensor([0.0, math.log(1 + (math.exp(2) - 1) / 2) / 2, 1.0]))


def test_exponential_pair_by_hand():
    """An even bit is symmetric, so its middle is 1/2; certain bits are truncated exponentials."""
    even, zero, one = (
        float(inverse(torch.tensor([0.5]), torch.tensor([q]), 3.0, "exponential_pair"))
        for q in (0.5, 0.0, 1.0)
    )
    median = -math.log(1 - 0.5 * (1 - math.exp(-3))) / 3
    assert even == pytest.approx(0.5, abs=1e-6)
    assert zero == pytest.approx(median, rel=1e-5) and one == pytest.approx(1 - median, rel=1e-5)


def test_power_pair_by_hand():
    """A certain 0 at b = 3 has F(s) = s^(1/3), so u = 1/2 gives 1/8; a certain 1 mirrors it; an
    even bit has its middle at 1/2."""
    s = inverse(torch.tensor([0.5, 0.5, 0.5]), torch.tensor([0.0, 1.0, 0.5]), 3.0, "power_pair")
    torch.testing.assert_close(s, torch.tensor([0.125, 0.875, 0.5]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("base", [2.0, math.e, 10.0])
def test_spike_and_exponential_is_f1_whose_base_rescales_b(base):
    """log_a(x (a^b - 1) + 1) / b for x = (u + q - 1) / q, as lecture notes have it."""
    q, u = grid()
    x = ((u + q - 1) / q).clamp(min=0)
    f1 = (x * (base**3 - 1) + 1).log() / math.log(base) / 3
    torch.testing.assert_close(f1, inverse(u, q, 3 * math.log(base), "spike_exponential"))


def test_spike_and_power_functions_by_hand():
    """b = 3, q = 0.8: below u = 0.2 the spike; at u = 0.6 x is 1/2; at u = 1 it is 1."""
    u = torch.tensor([0.1, 0.6, 1.0])
    q = torch.full_like(u, 0.8)
    power = torch.tensor([0.0, 1 - 0.5**3, 1.0])
    root = torch.tensor([0.0, 0.5 ** (1 / 3), 1.0])
    torch.testing.assert_close(inverse(u, q, 3.0, "spike_power"), power)
    torch.testing.assert_close(inverse(u, q, 3.0, "spike_root"), root)


def test_two_sided_power_by_hand():
    """b = 3, q = 0.8: 0.2 (1/2)^3 at u = 0.1, 1 - q = 0.2 at the joint, 1 - 0.8 (1/2)^3 at 0.6."""
    u = torch.tensor([0.0, 0.1, 0.2, 0.6, 1.0])
    s = inverse(u, torch.full_like(u, 0.8), 3.0, "two_sided_power")
    torch.testing.assert_close(s, torch.tensor([0.0, 0.025, 0.2, 0.9, 1.0]))


def has_the_properties_of_a_smoothing(f: Callable[[float, Tensor, Tensor], Tensor]) -> bool:
    """Whether f(b, q, u) is 0 at u = 0 and 1 at u = 1, never falls, and converges to the step
    1[u >= 1-q] as b grows."""
    q = torch.tensor([[0.05], [0.2], [0.5], [0.8], [0.95]], dtype=torch.float64)
    u = torch.linspace(0, 1, 501, dtype=torch.float64).expand(len(q), -1)
    step = (u >= 1 - q).double()
    away = (u - (1 - q)).abs() > 0.04
    distances = []
    for b in (1.5, 5.0, 16.0, 128.0):
        s = f(b, q.expand_as(u), u)
        ends = s[:, 0].abs().max() < 1e-6 and (s[:, -1] - 1).abs().max() < 1e-6
        if not ends or (s[:, 1:] - s[:, :-1]).min() < -1e-8:  # of bisection
            return False
        distances.append(float((s - step)[away].abs().max()))
    return distances == sorted(distances, reverse=True) and distances[-1] < 0.03


@EVERY
def test_a_smoothing_rises_from_0_to_1_and_converges_to_the_step(kind):
    assert has_the_properties_of_a_smoothing(lambda b, q, u: inverse(u, q, b, kind))


def on_two_sides(
    side: Callable[[Tensor, float], Tensor],
) -> Callable[[float, Tensor, Tensor], Tensor]:
    """(1-q) side(u / (1-q)) below 1-q, and 1 - q side((1-u) / q) above."""

    def f(b: float, q: Tensor, u: Tensor) -> Tensor:
        below = (1 - q) * side((u / (1 - q)).clamp(max=1), b)
        above = 1 - q * side(((1 - u) / q).clamp(max=1), b)
        return torch.where(u < 1 - q, below, above)

    return f


def above_a_spike(
    side: Callable[[Tensor, float], Tensor],
) -> Callable[[float, Tensor, Tensor], Tensor]:
    return lambda b, q, u: side(((u + q - 1) / q).clamp(0, 1), b)


def test_the_properties_decide_which_way_exponents_go():
    """What docs/theory/12-smoothing.md says of the forms that lecture notes call f2'' and f3'."""
    assert has_the_properties_of_a_smoothing(
        above_a_spike(lambda x, b: (1 - (1 - x) ** b) ** (1 / b))
    )
    assert not has_the_properties_of_a_smoothing(above_a_spike(lambda x, b: x**b))
    assert not has_the_properties_of_a_smoothing(above_a_spike(lambda x, b: 1 - (1 - x) ** (1 / b)))
    assert has_the_properties_of_a_smoothing(on_two_sides(lambda t, b: 1 - (1 - t) ** (1 / b)))
    assert not has_the_properties_of_a_smoothing(on_two_sides(lambda t, b: t ** (1 / b)))
    assert not has_the_properties_of_a_smoothing(on_two_sides(lambda t, b: 1 - (1 - t) ** b))


@EVERY_MIXTURE
@SHARPNESS
def test_the_inverse_inverts_the_mixtures_distribution(kind, b):
    q, u = grid()
    s = inverse(u, q, b, kind)
    f0, f1 = distributions(s, b, kind)
    inside = (s > 1e-6) & (s < 1 - 1e-6)  # elsewhere the spike, or the edge that s keeps from
    assert inside.any() and s.min() >= 0 and s.max() <= 1
    torch.testing.assert_close(((1 - q) * f0 + q * f1)[inside], u[inside], atol=1e-5, rtol=0)


@EVERY_MIXTURE
@SHARPNESS
def test_densities_are_derivatives_of_the_distributions(kind, b):
    s, step = torch.linspace(0.05, 0.95, 30, dtype=torch.float64), 1e-6
    for q in (0.1, 0.5, 0.9):
        weight = torch.full_like(s, q)
        f = [
            (1 - q) * f0 + q * f1
            for f0, f1 in (distributions(s + d, b, kind) for d in (-step, step))
        ]
        torch.testing.assert_close(
            density(s, weight, b, kind), (f[1] - f[0]) / (2 * step), atol=1e-5, rtol=1e-5
        )


@EVERY
@SHARPNESS
def test_gradients_are_those_of_finite_differences(kind, b):
    q, u = grid()
    step = 1e-4
    moved = (inverse(u, q + step, b, kind) - inverse(u, q - step, b, kind)) / (2 * step)
    q.requires_grad_()
    smooth(q, u, b, kind).sum().backward()
    s = inverse(u, q.detach(), b, kind)
    # Where the spike begins there is no derivative, and bisection is fine to 1e-9 only
    away = (s > 1e-3) & (s < 1 - 1e-3)
    torch.testing.assert_close(q.grad[away], moved[away], atol=2e-3, rtol=2e-3)


def test_spike_has_no_gradient():
    q = torch.tensor([0.3], requires_grad=True)
    s = smooth(q, torch.tensor([0.5]), 4.0, "spike_exponential")
    s.backward()
    assert float(s.detach()) == 0.0 and float(q.grad) == 0.0


@EVERY
def test_the_edge_of_the_spike_stays_finite(kind):
    q = torch.linspace(0.001, 0.999, 999).repeat_interleave(3).requires_grad_()
    edge = (1 - q.detach()).view(-1, 3)
    edge[:, 0] = edge[:, 0].nextafter(torch.tensor(0.0))
    edge[:, 2] = edge[:, 2].nextafter(torch.tensor(1.0))
    for b in (1.01, 5.0, 80.0):
        s = smooth(q, edge.flatten(), b, kind)
        (gradient,) = torch.autograd.grad(s.sum(), q)
        assert s.isfinite().all() and gradient.isfinite().all() and (gradient >= 0).all()


def test_two_sided_power_carries_nothing_of_a_bit_at_1():
    q, u = grid()
    torch.testing.assert_close(inverse(u, q, 1.0, "two_sided_power"), u)


@EVERY
def test_samples_become_bits_as_the_inverse_temperature_grows(kind):
    torch.manual_seed(0)
    q, u = torch.full((20_000,), 0.3), torch.rand(20_000)
    between = [
        float(((s := inverse(u, q, b, kind)) * (1 - s)).mean()) for b in (2.0, 8.0, 32.0, 80.0)
    ]
    assert between == sorted(between, reverse=True) and between[-1] < 0.02
    assert float(inverse(u, q, 80.0, kind).mean()) == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("kind", ["exponential_pair", "power_pair", "two_sided_power"])
def test_smoothings_without_a_spike_are_symmetric_and_flat_at_both_ends(kind):
    q, u = grid()
    torch.testing.assert_close(
        inverse(u, q, 8.0, kind), 1 - inverse(1 - u, 1 - q, 8.0, kind), atol=1e-6, rtol=0
    )
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    s = inverse(u, torch.full_like(u, 0.5), 8.0, kind)
    slope = (s[1:] - s[:-1]) / 0.01
    assert slope[0] < 0.35 and slope[-1] < 0.35 and slope[49] > 2


@EVERY
def test_certain_bits_and_extreme_numbers_stay_finite(kind):
    q = torch.tensor([0.0, 1e-30, 1e-7, 0.5, 1 - 1e-7, 1.0]).repeat_interleave(5).requires_grad_()
    u = torch.tensor([0.0, 1e-7, 0.5, 1 - 1e-7, 1.0]).repeat(6)
    for b in (1.01, 16.0, 200.0):
        s = smooth(q, u, b, kind)
        (gradient,) = torch.autograd.grad(s.sum(), q)
        assert s.isfinite().all() and gradient.isfinite().all() and 0 <= s.min() <= s.max() <= 1
