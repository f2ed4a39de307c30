"""Bounds of log p(x | caption) against the exact one, of models whose z can all be enumerated."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.inference.pipeline import TextToImagePipeline
from pipeline.likelihood.estimate import image_likelihood, sample_seeds
from pipeline.likelihood.model import CodeModel, LatentModel, image_model
from stage1_tokenizer import GaussianOptions, TokenizerModule, to_model_range, to_uint8
from stage2_prior import LatentPriorConfig, LatentPriorModule, score_codes
from tests.helpers.latent_priors import tiny_latent_prior
from tests.helpers.pipelines import CAPTIONS, tiny_pipeline
from tests.helpers.tokenizers import KINDS, tiny_tokenizer

STOCHASTIC = ["gumbel", "score_function", "binary"]
GRIDS = torch.cartesian_prod(*[torch.arange(4)] * 4).reshape(-1, 2, 2)
"""All 256 grids of 2x2 codes of 4."""


def enumerable(quantizer: str, **changes) -> TextToImagePipeline:
    """A pipeline of 4x4 images, each 2x2 codes of 4."""
    settings = {"num_codes": 4, "likelihood": "discretized_logistic"}
    return tiny_pipeline(
        image_size=4, downsample_factor=2, quantizer=quantizer, **settings | changes
    )


def code_model(pipe: TextToImagePipeline) -> CodeModel:
    return CodeModel(pipe.tokenizer, pipe.prior)


def exact_nats(pipe: TextToImagePipeline, text_ids: Tensor, images: Tensor) -> Tensor:
    """-log p(x | caption) (B,): the sum over all grids."""
    with torch.inference_mode():
        parameters = pipe.tokenizer.code_parameters(GRIDS)
        totals = []
        for ids, image in zip(text_ids, images, strict=True):
            log_prior = score_codes(pipe.prior, ids.expand(256, -1), GRIDS.flatten(1))
            values = image.permute(2, 0, 1).expand(256, -1, -1, -1)
            nll = pipe.tokenizer.likelihood.exact_nll(values, parameters)
            totals.append(-torch.logsumexp(log_prior.double() - nll, dim=0))
    return torch.stack(totals)


@pytest.fixture
def images() -> Tensor:
    """Grey levels about those that an untrained decoder draws."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(90, 166, (4, 4, 4, 3), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("quantizer", "any_order"), [*((kind, False) for kind in STOCHASTIC), ("gumbel", True)]
)
def test_bounds_rise_to_the_exact_probability_with_the_samples(quantizer, any_order, images):
    """In the mean over seeds: negative ELBO > the bound of 4 samples > that of 512 > exact."""
    pipe = enumerable(quantizer, any_order=any_order)
    ids = pipe.text.encode(CAPTIONS)
    exact = exact_nats(pipe, ids, images)
    many = image_likelihood(code_model(pipe), ids, images, num_samples=512, batch_size=2048)
    elbo = many.distortion + many.rate
    four = torch.stack(
        [
            image_likelihood(code_model(pipe), ids, images, num_samples=4, seed=seed).nats
            for seed in range(64)
        ]
    ).mean(0)
    assert many.bound == "importance_weighted" and many.num_samples == 512
    assert (elbo > four).all() and (four > many.nats).all() and (four > exact).all()
    torch.testing.assert_close(many.nats, exact, atol=0.4, rtol=0)


@pytest.mark.parametrize(
    ("quantizer", "codes"),
    [
        ("vq", {}),
        ("lfq", {"num_codes": 4}),
        ("fsq", {"num_codes": 12}),
        ("residual", {}),
        ("hierarchical", {}),
    ],
)
def test_the_description_length_is_that_of_the_codes_by_hand_and_no_less_than_the_exact_one(
    quantizer, codes, images
):
    pipe = enumerable(**{"quantizer": "vq"} | KINDS[quantizer] | codes)
    ids = pipe.text.encode(CAPTIONS)
    found = image_likelihood(code_model(pipe), ids, images, num_samples=3)
    assert found.bound == "description_length" and found.num_samples == 1
    pixels = to_model_range(images)
    codes = pipe.tokenizer.encode(pixels)
    rate = -score_codes(pipe.prior, ids, codes.flatten(1)).double()
    parameters = pipe.tokenizer(pixels).parameters
    distortion = pipe.tokenizer.likelihood.exact_nll(images.permute(0, 3, 1, 2), parameters)
    torch.testing.assert_close(found.rate, rate, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.distortion, distortion.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.nats, found.rate + found.distortion)
    bits = found.nats / math.log(2) / (4 * 4 * 3)
    torch.testing.assert_close(found.bits_per_dimension, bits)
    if quantizer in ("vq", "lfq"):
        assert (found.nats > exact_nats(pipe, ids, images)).all()


class PatchDecoder(nn.Module):
    """Each code draws its own patch of 2x2 pixels."""

    def __init__(self, features: int, parameters: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(features, parameters, 1)

    def forward(self, latents: Tensor) -> Tensor:
        return F.interpolate(self.mix(latents), scale_factor=2)


class ExactEncoder(nn.Module):
    """Logits log p(patch | code): with uniform codes that do not depend on one another, the exact
    posterior."""

    def __init__(self, tokenizer: TokenizerModule) -> None:
        super().__init__()
        self.owner = [tokenizer]  # in a list, or the encoder would be a part of its own part

    def forward(self, pixels: Tensor) -> Tensor:
        (tokenizer,) = self.owner
        values = ((pixels + 1) * 127.5).round().long()
        logits = []
        for code in range(4):
            parameters = tokenizer.code_parameters(torch.full((len(pixels), 2, 2), code))
            log_prob = tokenizer.likelihood.log_prob(values, parameters).sum(1, keepdim=True)
            logits.append(F.avg_pool2d(log_prob, 2, divisor_override=1))
        return torch.cat(logits, dim=1).float()


def test_every_sample_of_an_exact_posterior_has_the_exact_probability(images):
    pipe = enumerable("gumbel")
    tokenizer = pipe.tokenizer
    parameters = tokenizer.likelihood.parameter_count(3)
    tokenizer.decoder = PatchDecoder(tokenizer.quantizer.output_dim, parameters)
    tokenizer.encoder = ExactEncoder(tokenizer)
    with torch.no_grad():
        for weight in pipe.prior.image_head.parameters():
            weight.zero_()
    ids = pipe.text.encode(CAPTIONS)
    exact = exact_nats(pipe, ids, images)
    for seed in range(5):
        found = image_likelihood(code_model(pipe), ids, images, seed=seed)
        assert found.bound == "elbo"
        torch.testing.assert_close(found.nats, exact, rtol=0, atol=1e-3)


def test_naive_monte_carlo_reaches_the_exact_probability_where_all_codes_are_sampled():
    """An image that one of 256 grids draws. 8,192 samples have that grid repeatedly, 4 mostly do
    not."""
    pipe = enumerable("gumbel", likelihood="l2", likelihood_scale=0.02)
    ids = pipe.text.encode(CAPTIONS[:1])
    image = to_uint8(pipe.tokenizer.decode(GRIDS[100:101]))
    exact = exact_nats(pipe, ids, image)

    def naive(num_samples: int, seed: int = 0) -> Tensor:
        found = image_likelihood(
            code_model(pipe),
            ids,
            image,
            num_samples=num_samples,
            method="naive",
            seed=seed,
            batch_size=4096,
        )
        assert found.bound == "naive" and found.distortion is None and found.rate is None
        return found.nats

    few = torch.stack([naive(4, seed) for seed in range(8)]).mean(0)
    many = naive(8192)
    assert few - exact > 1
    # Some 32 of the samples hit, so the estimate's standard deviation is near 0.2.
    torch.testing.assert_close(many, exact, atol=0.7, rtol=0)


def gaussian_tokenizer(**changes) -> TokenizerModule:
    """One latent dimension per image of 8x8."""
    return tiny_tokenizer(
        image_size=4,
        downsample_factor=2,
        quantizer="gaussian",
        gaussian=GaussianOptions(latents="vector", vector_features=1),
        likelihood="l2",
        likelihood_scale=1.0,
        **changes,
    )


@pytest.mark.parametrize("kind", [None, "mixture"])
def test_bounds_of_a_gaussian_latent_rise_to_the_integral(kind, images):
    tokenizer = gaussian_tokenizer()
    prior = None if kind is None else tiny_latent_prior(kind, latent_features=1)
    model = image_model(tokenizer, prior)
    assert isinstance(model, LatentModel)
    ids = torch.zeros(len(images), 0, dtype=torch.long)
    z = torch.linspace(-9, 9, 1801, dtype=torch.float64)[:, None]
    with torch.inference_mode():
        log_prior = model.prior.log_prob(z.to(model.prior.dtype)).double()
        parameters = tokenizer.latent_parameters(z.float())
        nll = torch.stack(
            [
                tokenizer.likelihood.exact_nll(
                    image.permute(2, 0, 1).expand(len(z), -1, -1, -1), parameters
                )
                for image in images
            ]
        )
    exact = -torch.logsumexp(log_prior - nll + math.log(18 / 1800), dim=1)
    many = image_likelihood(model, ids, images, num_samples=1000, batch_size=4000)
    naive = image_likelihood(model, ids, images, num_samples=4000, method="naive", batch_size=4000)
    elbo = many.distortion + many.rate
    assert many.bound == "importance_weighted"
    assert (elbo > exact + 0.02).all()
    torch.testing.assert_close(many.nats, exact, atol=0.05, rtol=0)
    torch.testing.assert_close(naive.nats, exact, atol=0.05, rtol=0)


@pytest.mark.parametrize("kind", ["gumbel", "binary", "gaussian"])
@pytest.mark.parametrize("method", ["bound", "naive"])
def test_a_result_does_not_depend_on_the_batch(kind, method, images):
    if kind == "gaussian":
        model = LatentModel(gaussian_tokenizer())
        ids = torch.zeros(len(images), 0, dtype=torch.long)
    else:
        pipe = enumerable(kind)
        model = code_model(pipe)
        ids = pipe.text.encode(CAPTIONS)
    options = {"num_samples": 3, "method": method}
    together = image_likelihood(model, ids, images, **options)
    for batch_size in (1, 5):
        split = image_likelihood(model, ids, images, batch_size=batch_size, **options)
        torch.testing.assert_close(split.nats, together.nats, rtol=1e-5, atol=0)
    alone = image_likelihood(model, ids[2:3], images[2:3], **options)
    torch.testing.assert_close(alone.nats, together.nats[2:3], rtol=1e-5, atol=0)
    other = image_likelihood(model, ids, images, seed=1, **options)
    assert not torch.isclose(other.nats, together.nats, rtol=1e-5).any()


def test_samples_of_an_image_differ_and_are_its_own(images):
    seeds = sample_seeds(images, 3, seed=0)
    assert len(set(seeds)) == 12
    assert sample_seeds(images[1:2], 2, seed=0) == seeds[3:5]


def test_codes_are_sampled_by_their_posterior_and_have_its_probability(images):
    """Of 4,000 samples of each image, the shares of the 4 codes are those of the posterior."""
    for kind in STOCHASTIC:
        tokenizer = enumerable(kind).tokenizer
        pixels = to_model_range(images[:1])
        log_q = tokenizer.log_assignment(pixels)
        assert log_q is not None
        torch.testing.assert_close(log_q.exp().sum(-1), torch.ones(1, 2, 2))
        sampled = CodeModel(tokenizer, enumerable(kind).prior).sample_posterior(
            pixels.expand(4000, -1, -1, -1), range(4000)
        )
        shares = F.one_hot(sampled.z, 4).double().mean(0)
        torch.testing.assert_close(shares, log_q[0].exp().double(), atol=0.03, rtol=0)
        by_hand = log_q.expand(4000, -1, -1, -1).gather(-1, sampled.z[..., None]).sum((1, 2, 3))
        torch.testing.assert_close(sampled.log_q, by_hand.double(), rtol=1e-5, atol=0)


def test_a_conditional_prior_of_latents_is_given_its_captions(images):
    tokenizer = gaussian_tokenizer()
    config = LatentPriorConfig(kind="mixture", components=4, context_features=3)
    prior = LatentPriorModule(config, 1, text_vocab_size=4).eval()
    with torch.no_grad():
        for parameter in prior.parameters():  # no layer starts as one that ignores its input
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    model = LatentModel(tokenizer, prior)
    ids = torch.tensor([[1], [2], [1], [1]])
    context = prior.encode_text(ids)
    assert context is not None and not torch.allclose(context[0], context[1])
    found = image_likelihood(model, ids, images)
    seeds = sample_seeds(images, 1, 0)
    posterior = model.sample_posterior(to_model_range(images), seeds)
    log_prior = prior.log_prob(posterior.z, context)
    torch.testing.assert_close(found.rate, posterior.log_q.double() - log_prior)


def test_a_decoder_without_a_probability_says_what_to_train_with(images):
    pipe = tiny_pipeline(image_size=4, likelihood="bernoulli")
    ids = pipe.text.encode(CAPTIONS)
    with pytest.raises(ValueError, match=r"tokenizer\.model\.likelihood: discretized_logistic"):
        image_likelihood(code_model(pipe), ids, images)
    black = torch.zeros_like(images)
    assert image_likelihood(code_model(pipe), ids, black).nats.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples is 0; it must be at least 1"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"method": "elbo"}, "method is 'elbo'; choose bound or naive"),
    ],
)
def test_numbers_below_one_and_unknown_methods_are_refused(options, message, images):
    pipe = enumerable("vq")
    with pytest.raises(ValueError, match=message):
        image_likelihood(code_model(pipe), pipe.text.encode(CAPTIONS), images, **options)


def test_images_of_another_size_are_refused(images):
    pipe = enumerable("vq")
    with pytest.raises(ValueError, match=r"must be torch.uint8 \(batch, 4, 4, 3\)"):
        image_likelihood(code_model(pipe), pipe.text.encode(CAPTIONS), images[:, :2])


def test_a_pair_that_does_not_belong_together_is_refused():
    prior = enumerable("vq").prior
    with pytest.raises(ValueError, match="a prior of codes needs codes"):
        image_model(gaussian_tokenizer(), prior)
    with pytest.raises(ValueError, match="the tokenizer has codes, and the prior is one of Gauss"):
        image_model(enumerable("vq").tokenizer, None)
    with pytest.raises(ValueError, match=r"1 latent dimensions.* with 2 dimensions"):
        image_model(gaussian_tokenizer(), tiny_latent_prior("mixture"))
