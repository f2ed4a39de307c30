"""Flows: transforms invert, their log-determinants are those of the Jacobian, fitted flows beat a
Gaussian, conditional ones tell classes apart."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from stage2_prior import Flow, LatentPrior, LatentPriorConfig, build_latent_prior
from stage2_prior.flows.transform import permutations
from tests.helpers.latent_priors import random_context, tiny_latent_prior

FLOWS = pytest.mark.parametrize("kind", ["realnvp", "maf"])
CONTEXTS = pytest.mark.parametrize("context_features", [0, 3])


def tiny_flow(kind: str, context_features: int = 0, features: int = 5, **settings: object) -> Flow:
    prior = tiny_latent_prior(kind, context_features, features, **settings)
    assert isinstance(prior, Flow)
    return prior


@FLOWS
@CONTEXTS
def test_inverse_undoes_every_transform(kind, context_features):
    flow = tiny_flow(kind, context_features)
    x = torch.randn(7, 5, dtype=torch.float64)
    context = random_context(flow, 7)
    for transform in flow.transforms:
        u, _ = transform(x, context)
        assert not torch.allclose(u, x)
        torch.testing.assert_close(transform.inverse(u, context), x)
    noise, _ = flow.to_noise(x, context)
    torch.testing.assert_close(flow.from_noise(noise, context), x)


@FLOWS
@CONTEXTS
def test_log_determinant_is_that_of_the_jacobian(kind, context_features):
    flow = tiny_flow(kind, context_features)
    for x in torch.randn(3, 1, 5, dtype=torch.float64):
        context = random_context(flow, 1)
        jacobian = torch.autograd.functional.jacobian(
            lambda values, context=context: flow.to_noise(values, context)[0], x
        )
        expected = torch.linalg.slogdet(jacobian[0, :, 0]).logabsdet
        torch.testing.assert_close(flow.to_noise(x, context)[1][0], expected)


@FLOWS
def test_flow_starts_as_the_standard_normal(kind):
    flow = build_latent_prior(LatentPriorConfig(kind=kind, context_features=2), 4)
    latents = torch.randn(3, 4)
    expected = -0.5 * (latents.square() + math.log(2 * math.pi)).sum(1)
    torch.testing.assert_close(flow.log_prob(latents, torch.randn(3, 2)), expected)


@FLOWS
def test_extreme_conditioners_neither_overflow_nor_lose_their_inverse(kind):
    flow = tiny_flow(kind)
    with torch.no_grad():
        for transform in flow.transforms:
            transform.conditioner.output.bias.fill_(1e4)  # type: ignore[union-attr]
            transform.conditioner.output.bias[: len(transform.conditioner.output.bias) // 2] = 0  # type: ignore[union-attr,index]
    noise, log_det = flow.to_noise(torch.randn(7, 5, dtype=torch.float64))
    assert noise.isfinite().all() and (log_det.abs() <= 3 * 3 * 5 + 1e-6).all()


@pytest.mark.parametrize("how", ["reverse", "random"])
@CONTEXTS
def test_maf_shift_and_scale_depend_on_earlier_dimensions_alone(how, context_features):
    """By gradient: those of dimension i see x_j if and only if j comes before i in the order."""
    flow = tiny_flow("maf", context_features, permutation=how)
    for transform in flow.transforms:
        place = {dimension: i for i, dimension in enumerate(transform.order)}
        earlier = torch.tensor([[place[j] < place[i] for j in range(5)] for i in range(5)])
        jacobians = torch.autograd.functional.jacobian(
            lambda x, transform=transform: transform.conditioner(x, random_context(flow, 1)),
            torch.randn(1, 5, dtype=torch.float64),
        )
        for jacobian in jacobians:
            assert torch.equal(jacobian[0, :, 0] != 0, earlier)


def test_every_maf_dimension_depends_on_the_context():
    """The first one, too, which sees no other dimension."""
    flow = tiny_flow("maf", 3)
    context = torch.randn(1, 3, dtype=torch.float64)
    x = torch.randn(1, 5, dtype=torch.float64)
    for transform in flow.transforms:
        jacobian = torch.autograd.functional.jacobian(
            lambda given, transform=transform: transform(x, given)[0], context
        )[0, :, 0]
        assert (jacobian != 0).all()


def test_coupling_keeps_one_half_and_transforms_the_other():
    flow = tiny_flow("realnvp")
    x = torch.randn(4, 5, dtype=torch.float64)
    for transform in flow.transforms:
        u, _ = transform(x)
        assert len(transform.kept) == 2 and len(transform.changed) == 3
        assert torch.equal(u[:, transform.kept], x[:, transform.kept])
        assert (u[:, transform.changed] != x[:, transform.changed]).all()


@pytest.mark.parametrize("how", ["reverse", "random"])
@pytest.mark.parametrize("features", [1, 2, 5])
def test_permutations_are_repeatable_and_reversed_in_turn(how, features):
    orders = permutations(features, 5, how)
    assert orders == permutations(features, 5, how)
    assert all(sorted(order) == list(range(features)) for order in orders)
    assert orders[1] == orders[0][::-1] and orders[3] == orders[2][::-1]
    if features == 5:
        assert (orders[0] == orders[2]) == (how == "reverse")


def test_maf_of_one_dimension_is_an_affine_map():
    flow = tiny_flow("maf", 3, 1)
    x = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    u, _ = flow.to_noise(x, random_context(flow, 3))
    torch.testing.assert_close(u[2] - u[1], u[1] - u[0])


def two_moons(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points (count,2) near two half circles, and which one (count,)."""
    angle = math.pi * torch.rand(count, generator=generator)
    moon = torch.randint(2, (count,), generator=generator)
    sign = 1 - 2 * moon
    points = torch.stack([moon + sign * angle.cos(), 0.5 * moon + sign * angle.sin()], dim=1)
    return points + 0.1 * torch.randn(count, 2, generator=generator), moon


def fit(prior: LatentPrior, steps: int, conditional: bool = False) -> float:
    """Nats per point of 2,000 further points after `steps` steps of maximum likelihood."""
    generator = torch.Generator().manual_seed(3)
    optimizer = torch.optim.Adam(prior.parameters(), 5e-3)

    def nats(count: int) -> Tensor:
        points, moon = two_moons(count, generator)
        one_hot = torch.nn.functional.one_hot(moon, 2) if conditional else None
        return -prior.log_prob(points, one_hot).mean()

    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * min(1, 2 * (1 - step / steps))
        optimizer.zero_grad()
        nats(128).backward()
        torch.nn.utils.clip_grad_norm_(prior.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        return float(nats(2000))


def gaussian_nats() -> float:
    """Of the Gaussian of any covariance that fits two moons best: its entropy."""
    points, _ = two_moons(20_000, torch.Generator().manual_seed(4))
    return 0.5 * float(torch.logdet(torch.cov(points.T))) + 1 + math.log(2 * math.pi)


@FLOWS
def test_fitted_flow_beats_the_best_gaussian_on_two_moons(kind):
    config = LatentPriorConfig(kind=kind, transforms=4, width=32)
    assert fit(build_latent_prior(config, 2), 300) < gaussian_nats() - 0.25


@FLOWS
def test_conditional_flow_tells_two_classes_apart(kind):
    config = LatentPriorConfig(kind=kind, transforms=4, width=32, context_features=2)
    prior = build_latent_prior(config, 2)
    fit(prior, 150, conditional=True)
    points, moon = two_moons(1000, torch.Generator().manual_seed(5))
    one_hot = torch.eye(2)
    with torch.no_grad():
        log_p = [prior.log_prob(points, row.expand(1000, -1)) for row in one_hot]
    right = (torch.stack(log_p).argmax(0) == moon).float().mean()
    assert right > 0.97
    upper = prior.sample(500, torch.Generator().manual_seed(6), one_hot[0].expand(500, -1))
    lower = prior.sample(500, torch.Generator().manual_seed(6), one_hot[1].expand(500, -1))
    assert float(upper[:, 1].mean() - lower[:, 1].mean()) > 0.5
