"""What holds for every prior over latents: densities are normalised, samples follow them, bad input
is named."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from stage2_prior import LatentPriorConfig, build_latent_prior
from tests.helpers.latent_priors import CONTEXT, KINDS, random_context, tiny_latent_prior

EVERY_KIND = pytest.mark.parametrize(("kind", "context_features"), KINDS)


def grid(lowest: float, highest: float, count: int) -> tuple[Tensor, float]:
    """Centres (count^2,2) of the cells of a square, and a cell's area."""
    step = (highest - lowest) / count
    axis = lowest + step * (torch.arange(count, dtype=torch.float64) + 0.5)
    return torch.cartesian_prod(axis, axis), step**2


@EVERY_KIND
def test_density_integrates_to_one(kind, context_features):
    prior = tiny_latent_prior(kind, context_features)
    points, area = grid(-10, 10, 350)
    with torch.no_grad():
        log_p = prior.log_prob(points, random_context(prior, len(points)))
    assert float(log_p.exp().sum() * area) == pytest.approx(1, abs=1e-3)


@EVERY_KIND
def test_samples_follow_the_density(kind, context_features):
    """Chi-squared on a coarse grid, whose cells have the probability that the density gives."""
    prior = tiny_latent_prior(kind, context_features)
    count = 20_000
    samples = prior.sample(
        count, torch.Generator().manual_seed(1), random_context(prior, count)
    ).double()
    points, area = grid(-6, 6, 240)
    with torch.no_grad():
        p = prior.log_prob(points, random_context(prior, len(points))).exp() * area
    cells = p.reshape(12, 20, 12, 20).sum((1, 3)).flatten()
    place = ((samples + 6).floor().clamp(-1, 12)).long()
    inside = ((place >= 0) & (place < 12)).all(1)
    seen = torch.bincount(place[inside] @ torch.tensor([12, 1]), minlength=144).double()
    # Rare cells, and all that lies outside, count as one.
    often = count * cells >= 10
    expected = torch.cat([count * cells[often], count * (1 - cells[often].sum())[None]])
    assert (expected > 0).all()  # a sum of cells above 1 would make chi-squared negative
    observed = torch.cat([seen[often], count - seen[often].sum()[None]])
    chi_squared = float(((observed - expected).square() / expected).sum())
    degrees = len(expected) - 1
    assert degrees > 10 and chi_squared < degrees + 4 * math.sqrt(2 * degrees)


@EVERY_KIND
def test_samples_of_one_seed_are_the_same_and_independent_of_their_batch(kind, context_features):
    prior = tiny_latent_prior(kind, context_features)
    noise = torch.randn(3, prior.noise_features, generator=torch.Generator().manual_seed(2))
    together = prior.from_noise(noise, random_context(prior, 3))
    again = prior.sample(3, torch.Generator().manual_seed(2), random_context(prior, 3))
    torch.testing.assert_close(together, again)
    alone = [prior.from_noise(row[None], random_context(prior, 1)) for row in noise]
    torch.testing.assert_close(together, torch.cat(alone))


@EVERY_KIND
def test_log_prob_is_fp32_under_autocast(kind, context_features):
    prior = tiny_latent_prior(kind, context_features).float()
    if kind == "vamp":
        prior.attach(lambda inputs: (inputs.flatten(1)[:, :2], inputs.flatten(1)[:, 2:]))
    latents = torch.randn(4, 2)
    context = random_context(prior, 4)
    expected = prior.log_prob(latents, context)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(prior.log_prob(latents, context), expected)
    assert expected.dtype == torch.float32 and expected.shape == (4,)


def test_wrong_shapes_are_refused():
    prior = tiny_latent_prior("maf")
    with pytest.raises(
        ValueError, match=r"latents have shape \(4, 3\) and must be \(batch, 2\); flatten"
    ):
        prior.log_prob(torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"latents have shape \(4, 2, 1\)"):
        prior.log_prob(torch.zeros(4, 2, 1))
    with pytest.raises(ValueError, match=r"noise has shape \(4, 3\) and must be \(batch, 2\)"):
        prior.from_noise(torch.zeros(4, 3))


@pytest.mark.parametrize("kind", ["standard", "mixture", "realnvp"])
def test_context_for_an_unconditional_prior_is_refused(kind):
    prior = tiny_latent_prior(kind)
    with pytest.raises(
        ValueError, match=r"unconditional and takes no context; .*context_features=7"
    ):
        prior.log_prob(torch.zeros(4, 2), torch.zeros(4, 7))
    with pytest.raises(ValueError, match="takes no context"):
        prior.sample(4, context=torch.zeros(4, 7))


@pytest.mark.parametrize("kind", ["mixture", "vamp", "realnvp", "maf"])
def test_missing_or_misshaped_context_is_refused(kind):
    prior = tiny_latent_prior(kind, CONTEXT)
    with pytest.raises(ValueError, match=r"conditional; give a context of shape \(4, 3\)"):
        prior.log_prob(torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"conditional; give a context of shape \(5, 3\)"):
        prior.sample(5)
    with pytest.raises(ValueError, match=r"the context has shape \(1, 3\) and must be \(4, 3\)"):
        prior.log_prob(torch.zeros(4, 2), torch.zeros(1, 3))


def test_configuration_errors_are_all_named():
    with pytest.raises(
        ValueError,
        match=r"prior\.latent\.kind is 'glow'; it must be one of standard, .*"
        r"prior\.latent\.components is 0; .*prior\.latent\.transforms is 0; .*"
        r"prior\.latent\.width is 0; .*prior\.latent\.depth is 0; .*"
        r"prior\.latent\.context_features is -1; .*prior\.latent\.permutation is 'shuffled'",
    ):
        LatentPriorConfig(
            kind="glow",  # type: ignore[arg-type]
            components=0,
            transforms=0,
            width=0,
            depth=0,
            context_features=-1,
            permutation="shuffled",  # type: ignore[arg-type]
        )
    for kind in ("standard", "aggregated"):
        with pytest.raises(ValueError, match=f"prior.latent.kind {kind} takes no context"):
            LatentPriorConfig(kind=kind, context_features=4)
    with pytest.raises(ValueError, match=r"prior\.latent\.transforms is 1; realnvp needs"):
        LatentPriorConfig(kind="realnvp", transforms=1)


def test_building_refuses_sizes_that_a_kind_cannot_have():
    with pytest.raises(ValueError, match="latents have 0 dimensions"):
        build_latent_prior(LatentPriorConfig(), 0)
    with pytest.raises(ValueError, match=r"at least 2 dimensions; for 1, set .* maf or mixture"):
        build_latent_prior(LatentPriorConfig(kind="realnvp"), 1)
    with pytest.raises(ValueError, match="vamp needs the shape of an encoder's input"):
        build_latent_prior(LatentPriorConfig(kind="vamp"), 2)
