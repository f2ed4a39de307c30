"""The ELBO's three parts: they add up, keep their limits, and equal sums over all grids of codes on
posteriors small enough to enumerate."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.evaluation import elbo_surgery
from pipeline.evaluation.elbo_surgery import (
    BitPosteriors,
    CategoricalPosteriors,
    Densities,
    GaussianPosteriors,
    PointPosteriors,
    Posteriors,
    densities,
    elbo_parts,
    fixed_prior,
    posteriors_of,
    surgery,
    surgery_metrics,
)
from stage1_tokenizer import GaussianPosterior, TokenizerModule, to_model_range
from stage2_prior import AggregatedPosterior, LatentPriorConfig, LatentPriorModule, score_codes
from tests.helpers.pipelines import CAPTIONS, tiny_pipeline
from tests.helpers.tokenizers import ALL_KINDS, EVERY_TOKENIZER, tiny_tokenizer

STOCHASTIC = ["gumbel", "binary", "score_function", "gaussian", "gaussian vector"]
EVERY_STOCHASTIC = pytest.mark.parametrize("kind", STOCHASTIC)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 7) -> Tensor:
    shape = (count, 16, 16, 3)
    return torch.randint(256, shape, generator=generator(), dtype=torch.uint8)


def exact_log_q(tokenizer: TokenizerModule, z: Tensor) -> Tensor:
    """log q(z_i | x_i) of the test images by torch's distributions."""
    pixels = to_model_range(images())
    if not tokenizer.own_config.has_codes:
        posterior = tokenizer.posterior(pixels)
        normal = torch.distributions.Normal(posterior.mean, posterior.log_std.exp())
        return normal.log_prob(z).sum(1)
    features = tokenizer.encoder(pixels)
    if tokenizer.own_config.quantizer == "binary":
        logits = tokenizer.quantizer.of_codes(features)
    else:
        logits = features.permute(0, 2, 3, 1)
    chosen = torch.distributions.Categorical(logits=logits.flatten(1, 2))
    return chosen.log_prob(z).sum(1)


def exact_log_likelihood(tokenizer: TokenizerModule, z: Tensor) -> Tensor:
    if tokenizer.own_config.has_codes:
        embedded = tokenizer.quantizer.embed(z.unflatten(1, (4, 4)), (4, 4))
        parameters = tokenizer.decoder(embedded)
    else:
        parameters = tokenizer.latent_parameters(z)
    return -tokenizer.likelihood.exact_nll(images().permute(0, 3, 1, 2), parameters)


@EVERY_STOCHASTIC
@torch.no_grad()
def test_the_parts_add_up_to_the_elbo_of_the_same_samples(kind):
    tokenizer = tiny_tokenizer(**ALL_KINDS[kind])
    parts = surgery(tokenizer, images(), {"fixed": fixed_prior(tokenizer)}, seed=3)["fixed"]
    z = posteriors_of(tokenizer, to_model_range(images())).sample(generator(3))
    log_q = exact_log_q(tokenizer, z)
    if tokenizer.own_config.has_codes:
        log_p = torch.full((7,), -16 * math.log(tokenizer.num_codes))
    else:
        log_p = torch.distributions.Normal(0, 1).log_prob(z).sum(1)
    log_likelihood = exact_log_likelihood(tokenizer, z)
    elbo = float((log_likelihood - (log_q - log_p)).mean())
    assert parts.elbo == pytest.approx(elbo, abs=1e-4)
    assert parts.reconstruction == pytest.approx(float(log_likelihood.mean()), abs=1e-4)
    assert parts.mutual_information + parts.marginal_kl == pytest.approx(
        float((log_q - log_p).mean()), abs=1e-4
    )


@EVERY_TOKENIZER
def test_mutual_information_is_between_0_and_log_n_for_every_tokenizer(kind):
    tokenizer = tiny_tokenizer(**ALL_KINDS[kind])
    parts = surgery(tokenizer, images(), {"fixed": fixed_prior(tokenizer)})["fixed"]
    assert 0 <= parts.mutual_information <= math.log(7) + 1e-6
    assert parts.marginal_kl > 0


@pytest.mark.parametrize("kind", ["gumbel", "binary", "gaussian"])
def test_parts_do_not_depend_on_the_batches(kind, monkeypatch):
    tokenizer = tiny_tokenizer(**ALL_KINDS[kind])
    priors = {"fixed": fixed_prior(tokenizer)}
    once = surgery(tokenizer, images(), priors)["fixed"]
    monkeypatch.setattr(elbo_surgery, "BATCH", 3)
    split = surgery(tokenizer, images(), priors)["fixed"]
    # The noise of bits and codes is drawn batch after batch, so it is the same.
    assert split.mutual_information == pytest.approx(once.mutual_information, abs=1e-5)
    assert split.elbo == pytest.approx(once.elbo, rel=1e-6)


def toy(kind: str, count: int = 3) -> Posteriors:
    """Posteriors of grids of 1x2 codes out of 4."""
    if kind == "bits":
        return BitPosteriors(2 * torch.randn(count, 2, 1, 2, generator=generator(1)))
    logits = 2 * torch.randn(count, 2, 4, generator=generator(1))
    return CategoricalPosteriors(logits.log_softmax(-1))


def by_hand(posteriors: Posteriors, image: int, grid: tuple[int, ...]) -> float:
    """q(grid | image) as a product over codes, or bits: the highest first."""
    if isinstance(posteriors, CategoricalPosteriors):
        return math.prod(
            math.exp(float(posteriors.log_q[image, place, code])) for place, code in enumerate(grid)
        )
    assert isinstance(posteriors, BitPosteriors)
    q = posteriors.logits.sigmoid()[image, :, 0]
    result = 1.0
    for place, code in enumerate(grid):
        high, low = code // 2, code % 2
        result *= float(q[0, place]) if high else 1 - float(q[0, place])
        result *= float(q[1, place]) if low else 1 - float(q[1, place])
    return result


GRIDS = list(itertools.product(range(4), repeat=2))


@pytest.mark.parametrize("kind", ["codes", "bits"])
def test_probabilities_of_all_grids_are_products_over_codes(kind):
    posteriors = toy(kind)
    table = posteriors.log_probs(torch.tensor(GRIDS)).exp()
    assert table.shape == (16, 3) and table.dtype == torch.float64
    expected = torch.tensor([[by_hand(posteriors, j, grid) for j in range(3)] for grid in GRIDS])
    torch.testing.assert_close(table.float(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(table.sum(0), torch.ones(3).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["codes", "bits"])
def test_estimates_equal_sums_over_all_grids(kind):
    """Three posteriors, 300 samples of each. q_agg is no product over codes: one of pooled or
    averaged codes gives other values."""
    posteriors = toy(kind)
    q = torch.tensor([[by_hand(posteriors, j, grid) for grid in GRIDS] for j in range(3)])
    aggregated = q.mean(0)
    prior = torch.rand(16, generator=generator(2)) + 0.1
    log_prior = (prior / prior.sum()).log()
    information = float((q * (q / aggregated).log()).sum(1).mean())
    kl = float((aggregated * (aggregated.log() - log_prior)).sum())

    many = toy(kind)
    for name, values in vars(many).items():
        object.__setattr__(many, name, values.repeat_interleave(300, dim=0))
    z = many.sample(generator())
    at = densities(z, [many])
    parts = elbo_parts(torch.zeros(900), at, log_prior[z[:, 0] * 4 + z[:, 1]])
    assert 0.1 < information < math.log(3) - 0.1 and kl > 0.1
    assert parts.mutual_information == pytest.approx(information, abs=0.05)
    assert parts.marginal_kl == pytest.approx(kl, abs=0.05)


def test_identical_posteriors_share_no_information_with_images():
    same = torch.randn(1, 4).expand(6, 4)
    gaussian = GaussianPosteriors(GaussianPosterior(same, -same.abs()))
    codes = CategoricalPosteriors(torch.randn(1, 3, 5).log_softmax(-1).expand(6, 3, 5))
    bits = BitPosteriors(torch.randn(1, 2, 3, 1).expand(6, 2, 3, 1))
    points = PointPosteriors(torch.tensor([[1, 2]]).expand(6, 2))
    for posteriors in (gaussian, codes, bits, points):
        at = densities(posteriors.sample(generator()), [posteriors])
        torch.testing.assert_close(at.own, at.aggregated, rtol=0, atol=1e-9)


def test_posteriors_far_apart_tell_which_image_it_is():
    far = 100 * torch.arange(6.0)[:, None].expand(6, 4)
    gaussian = GaussianPosteriors(GaussianPosterior(far, torch.zeros(6, 4)))
    one_each = 50 * F.one_hot(torch.arange(6), 6)[:, None].expand(6, 3, 6).float()
    codes = CategoricalPosteriors(one_each.log_softmax(-1))
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)))[:6]
    bits = BitPosteriors(40 * signs[..., None, None])
    points = PointPosteriors(torch.arange(6)[:, None])
    for posteriors in (gaussian, codes, bits, points):
        z = posteriors.sample(generator())
        parts = elbo_parts(torch.zeros(6), densities(z, [posteriors]), torch.zeros(6))
        assert parts.mutual_information == pytest.approx(math.log(6), abs=1e-6)


def test_points_have_the_entropy_of_their_grids():
    points = PointPosteriors(torch.tensor([[0, 1], [0, 1], [0, 2], [3, 1]]))
    at = densities(points.sample(generator()), [points])
    parts = elbo_parts(torch.zeros(4), at, torch.full((4,), -2 * math.log(4)))
    entropy = 0.5 * math.log(2) + 0.5 * math.log(4)
    assert parts.mutual_information == pytest.approx(entropy)
    assert parts.marginal_kl == pytest.approx(2 * math.log(4) - entropy)


@torch.no_grad()
def test_the_aggregated_posterior_is_the_prior_without_a_marginal_kl():
    tokenizer = tiny_tokenizer(**ALL_KINDS["gaussian"])
    posterior = tokenizer.posterior(to_model_range(images()))
    best = AggregatedPosterior.of(posterior.mean.double(), posterior.log_std.double())
    other = AggregatedPosterior.of(posterior.mean.double() + 1.0, posterior.log_std.double())
    priors = {"fixed": fixed_prior(tokenizer), "best": best.log_prob, "other": other.log_prob}
    parts = surgery(tokenizer, images(), priors)
    assert parts["best"].marginal_kl == pytest.approx(0, abs=1e-9)
    assert min(parts["fixed"].marginal_kl, parts["other"].marginal_kl) > 0.01
    for name in ("fixed", "other"):
        assert parts[name].mutual_information == parts["best"].mutual_information
        assert parts[name].reconstruction == parts["best"].reconstruction
        assert parts[name].elbo < parts["best"].elbo


def test_parts_by_hand():
    at = Densities(own=torch.tensor([-1.0, -3.0]), aggregated=torch.tensor([-2.0, -3.5]))
    parts = elbo_parts(torch.tensor([-10.0, -20.0]), at, torch.tensor([-4.0, -4.0]))
    assert (parts.reconstruction, parts.mutual_information, parts.marginal_kl) == (-15, 0.75, 1.25)
    assert parts.elbo == -17


@pytest.mark.parametrize("kind", ["gumbel", "binary"])
@torch.no_grad()
def test_metrics_ask_the_learned_prior_with_and_without_captions(kind):
    pipe = tiny_pipeline(**ALL_KINDS[kind])
    ids = pipe.text.encode([CAPTIONS[i % 4] for i in range(7)])
    none = pipe.text.encode([""])
    given = surgery_metrics(pipe.tokenizer, pipe.prior, images(), ids, none)
    assert "marginal_kl" not in given
    pipe.prior.config.trained_with_caption_dropout = True
    found = surgery_metrics(pipe.tokenizer, pipe.prior, images(), ids, none)
    assert list(found) == [
        "elbo_reconstruction",
        "mutual_information",
        "marginal_kl_fixed_prior",
        "marginal_kl",
        "marginal_kl_given_captions",
    ]
    assert given == {name: value for name, value in found.items() if name != "marginal_kl"}
    z = posteriors_of(pipe.tokenizer, to_model_range(images())).sample(generator())
    at = densities(z, [posteriors_of(pipe.tokenizer, to_model_range(images()))])
    null = pipe.prior.stream.null_caption(7)
    for name, captions in (("marginal_kl", null), ("marginal_kl_given_captions", ids)):
        log_prior = score_codes(pipe.prior, captions, z).double()
        assert found[name] == pytest.approx(float((at.aggregated - log_prior).mean()), abs=1e-4)


@torch.no_grad()
def test_metrics_of_gaussian_latents_with_a_learned_prior():
    tokenizer = tiny_tokenizer(**ALL_KINDS["gaussian vector"])
    prior = LatentPriorModule(LatentPriorConfig(kind="standard"), 10)
    found = surgery_metrics(tokenizer, prior, images(), torch.zeros(7, 1), torch.zeros(1, 1))
    assert found["marginal_kl"] == pytest.approx(found["marginal_kl_fixed_prior"], abs=1e-4)
    assert "marginal_kl_given_captions" not in found


@torch.no_grad()
def test_a_conditional_prior_of_latents_gets_the_captions(monkeypatch):
    tokenizer = tiny_tokenizer(**ALL_KINDS["gaussian vector"])
    prior = LatentPriorModule(LatentPriorConfig(kind="mixture", context_features=3), 10)
    prior.config.trained_with_caption_dropout = True
    monkeypatch.setattr(prior, "forward", lambda latents, ids: -ids.sum(1).double())
    ids = torch.arange(21).reshape(7, 3)
    found = surgery_metrics(tokenizer, prior, images(), ids, torch.ones(1, 3))
    given = found["marginal_kl_given_captions"]
    assert given - found["marginal_kl"] == pytest.approx(float(ids.sum(1).double().mean()) - 3)


def test_there_are_no_metrics_of_points_or_of_images_without_a_probability():
    prior = tiny_pipeline().prior
    ids = torch.zeros(7, 24, dtype=torch.long)
    assert surgery_metrics(tiny_tokenizer(), prior, images(), ids, ids[:1]) == {}
    coins = tiny_tokenizer(quantizer="gumbel", likelihood="bernoulli")
    assert surgery_metrics(coins, prior, images(), ids, ids[:1]) == {}
    with pytest.raises(ValueError, match="bernoulli"):
        surgery(coins, images(), {"fixed": fixed_prior(coins)})
    black_and_white = 255 * (images() // 128)
    pipe = tiny_pipeline(quantizer="gumbel", likelihood="bernoulli")
    ids = pipe.text.encode(["a red star"] * 7)
    found = surgery_metrics(pipe.tokenizer, pipe.prior, black_and_white, ids, ids[:1])
    assert found["elbo_reconstruction"] < 0
