"""Training losses: densities integrate to one and match hand-computed values; the shown image is
their mode."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Laplace as TorchLaplace
from torch.distributions import Normal

from stage1_tokenizer.likelihoods import (
    Bernoulli,
    CalibratedGaussian,
    DiscretizedLogistic,
    Gaussian,
    Laplace,
    LearnedGaussian,
    LogitLaplace,
    bits_per_dimension,
    build_likelihood,
)
from stage1_tokenizer.options import STEP
from stage1_tokenizer.pixels import LAPLACE_MARGIN, dequantized, to_laplace_logits, to_model_range


def grid(low: float, high: float, count: int = 200_001) -> torch.Tensor:
    """Pixel values as a batch of one-dimensional images (N,1,1,1)."""
    return torch.linspace(low, high, count, dtype=torch.float64).reshape(-1, 1, 1, 1)


def parameters(likelihood, *values: float) -> torch.Tensor:
    return torch.tensor(values).reshape(1, likelihood.parameters_per_channel, 1, 1)


def density_bits(likelihood, pixels: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """Bits per dimension (B,) of the density that training sees, per step of 2/255."""
    nats = likelihood.nll(pixels, outputs) / pixels[0].numel()
    return (nats - math.log(STEP)) / math.log(2)


@pytest.mark.parametrize(
    ("likelihood", "values"),
    [
        (Gaussian(0.1), (0.3,)),
        (Laplace(0.1), (-0.4,)),
        (LogitLaplace(0.1), (0.0, -1.0)),
        (LogitLaplace(0.1), (-1.5, -2.5)),
        (LogitLaplace(0.1), (1.2, 0.0)),
    ],
)
def test_the_density_integrates_to_one(likelihood, values):
    # logit-Laplace lives on the whole unit interval, of which pixels are the part within the
    # margin.
    reach = 1 / (1 - 2 * LAPLACE_MARGIN) - 1e-9 if isinstance(likelihood, LogitLaplace) else 4.0
    x = grid(-reach, reach)
    density = (-likelihood.nll(x, parameters(likelihood, *values).expand(len(x), -1, -1, -1))).exp()
    assert torch.trapezoid(density, x.flatten()) == pytest.approx(1.0, abs=2e-4)


def test_logit_laplace_has_mass_beyond_the_pixels():
    """A location at the end of the pixels' range has half of the mass on either side."""
    end = float(to_laplace_logits(torch.tensor(1.0)))
    x = grid(-1, 1)
    said = parameters(LogitLaplace(0.1), end, -3.0).expand(len(x), -1, -1, -1)
    density = (-LogitLaplace(0.1).nll(x, said)).exp()
    assert torch.trapezoid(density, x.flatten()) == pytest.approx(0.5, abs=2e-4)
    assert float(LogitLaplace(0.1).image(torch.tensor([[[[99.0]], [[0.0]]]]))) == pytest.approx(
        1.25
    )


@pytest.mark.parametrize(
    ("likelihood", "reference"), [(Gaussian(0.2), Normal), (Laplace(0.2), TorchLaplace)]
)
def test_nll_is_summed_over_the_dimensions_of_an_image(likelihood, reference):
    generator = torch.Generator().manual_seed(0)
    pixels, means = torch.randn(2, 4, 3, 5, 5, generator=generator).unbind(0)
    expected = -reference(means, 0.2).log_prob(pixels).sum(dim=(1, 2, 3))
    torch.testing.assert_close(likelihood.nll(pixels, means), expected)


def test_calibrated_standard_deviation_is_optimal_per_image():
    """Images drawn at 0.2, 0.5 and 1 from their means: no fixed deviation gives any of them fewer
    nats."""
    generator = torch.Generator().manual_seed(0)
    means, noise = torch.randn(2, 3, 3, 16, 16, generator=generator).unbind(0)
    pixels = means + noise * torch.tensor([0.2, 0.5, 1.0])[:, None, None, None]
    calibrated = CalibratedGaussian().nll(pixels, means)
    fixed = torch.stack(
        [Gaussian(scale).nll(pixels, means) for scale in torch.logspace(-2, 1, 200).tolist()]
    ).amin(0)
    assert (calibrated <= fixed + 0.1).all()
    torch.testing.assert_close(calibrated, fixed, atol=0.5, rtol=0)
    alone = torch.cat(
        [CalibratedGaussian().nll(pixels[i : i + 1], means[i : i + 1]) for i in range(3)]
    )
    torch.testing.assert_close(alone, calibrated)


def test_calibrated_gradient_equals_that_of_half_the_log_error():
    generator = torch.Generator().manual_seed(0)
    pixels, means = torch.rand(2, 4, 3, 8, 8, generator=generator).unbind(0)
    means.requires_grad_()
    (gradient,) = torch.autograd.grad(CalibratedGaussian().nll(pixels, means).sum(), means)
    log_error = (pixels - means).square().mean(dim=(1, 2, 3)).add((2 / 255) ** 2 / 12).log()
    (expected,) = torch.autograd.grad((192 / 2 * log_error).sum(), means)
    torch.testing.assert_close(gradient, expected)


def test_calibrated_loss_of_exact_reconstruction_is_that_of_the_8_bit_quantization():
    """The Gaussian of the noise that spreads a pixel over its step: 0.25 bits more than the step's
    own uniform density."""
    pixels = torch.full((2, 3, 8, 8), -1.0)
    bits = density_bits(CalibratedGaussian(), pixels, pixels)
    torch.testing.assert_close(bits, torch.full((2,), 0.5 * math.log2(2 * math.pi * math.e / 12)))


def test_logit_laplace_by_hand():
    """Eq. of DALL-E's appendix at x=0.5, location 0.2, log-scale -1 above a least scale of 0.1, and
    the slope of the map to the unit range."""
    unit = 0.4 * 1.5 + 0.1
    logit = math.log(unit / (1 - unit))
    scale = 0.1 + math.exp(-1.0)
    density = math.exp(-abs(logit - 0.2) / scale) / (2 * scale * unit * (1 - unit)) * 0.4
    nll = LogitLaplace(0.1).nll(
        torch.full((1, 1, 1, 1), 0.5), parameters(LogitLaplace(0.1), 0.2, -1.0)
    )
    assert float(nll) == pytest.approx(-math.log(density), rel=1e-5)


def test_logit_laplace_keeps_the_channels_of_location_and_scale_apart():
    pixels = torch.tensor([-0.5, 0.0, 0.8]).reshape(1, 3, 1, 1)
    sharp = torch.cat([to_laplace_logits(pixels), torch.full((1, 3, 1, 1), -3.0)], 1)
    torch.testing.assert_close(LogitLaplace(0.1).image(sharp), pixels)
    assert LogitLaplace(0.1).nll(pixels, sharp) < LogitLaplace(0.1).nll(pixels.flip(1), sharp)


def test_logit_laplace_stays_bounded_on_flat_images():
    pixels = torch.full((1, 1, 1, 1), -1.0)
    exact = to_laplace_logits(pixels)
    nlls = [
        LogitLaplace(least).nll(pixels, torch.cat([exact, torch.full_like(exact, -100.0)], 1))
        for least in (0.05, 0.1)
    ]
    torch.testing.assert_close(nlls[1] - nlls[0], torch.tensor([math.log(2)]))


def test_minimal_scale_can_grow_again():
    said = parameters(LogitLaplace(0.1), 0.0, -4.0).requires_grad_()
    LogitLaplace(0.1).nll(torch.full((1, 1, 1, 1), 0.9), said).sum().backward()
    assert float(said.grad[0, 1]) < 0


@pytest.mark.parametrize("likelihood", [Gaussian(0.1), Laplace(0.1)])
def test_shown_image_is_the_mode_of_the_density(likelihood):
    x = grid(-1, 1, 2001)
    nll = likelihood.nll(x, parameters(likelihood, 0.25).expand(len(x), -1, -1, -1))
    assert float(x.flatten()[nll.argmin()]) == pytest.approx(
        float(likelihood.image(parameters(likelihood, 0.25))), abs=1e-3
    )


@pytest.mark.parametrize(
    "likelihood", [Gaussian(0.1), CalibratedGaussian(), Laplace(0.1), LogitLaplace(0.1)]
)
def test_low_precision_outputs_are_scored_in_float32(likelihood):
    out = torch.zeros(2, likelihood.parameters_per_channel, 2, 2, dtype=torch.bfloat16)
    assert (
        likelihood.nll(torch.zeros(2, 1, 2, 2), out).dtype
        == likelihood.image(out).dtype
        == torch.float32
    )


def test_bits_of_a_uniform_probability_are_eight():
    assert bits_per_dimension(12 * math.log(256), 12) == pytest.approx(8.0)


def test_likelihood_is_built_from_its_name():
    kinds = {
        "l2": Gaussian,
        "calibrated_l2": CalibratedGaussian,
        "learned_l2": LearnedGaussian,
        "l1": Laplace,
        "logit_laplace": LogitLaplace,
        "discretized_logistic": DiscretizedLogistic,
        "bernoulli": Bernoulli,
    }
    assert all(type(build_likelihood(name, 0.1)) is kind for name, kind in kinds.items())  # type: ignore[arg-type]
    mixture = build_likelihood("discretized_logistic", 0.1, channels=1, mixtures=4)
    assert isinstance(mixture, DiscretizedLogistic)
    assert (mixture.channels, mixture.mixtures) == (1, 4)


def test_bernoulli_by_hand_and_by_counting():
    """Three coins; the probabilities of all eight images of black and white add up to one."""
    logits = torch.tensor([0.0, math.log(3), -1.0]).reshape(1, 3, 1, 1)
    white = torch.tensor([1.0, 1.0, -1.0]).reshape(1, 3, 1, 1)
    by_hand = -(math.log(0.5) + math.log(0.75) + math.log(1 - 1 / (1 + math.e)))
    torch.testing.assert_close(Bernoulli().nll(white, logits), torch.tensor([by_hand]))
    every = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3).reshape(8, 3, 1, 1)
    total = (-Bernoulli().nll(every, logits.expand(8, -1, -1, -1))).exp().sum()
    torch.testing.assert_close(total, torch.tensor(1.0))
    grey = Bernoulli().nll(torch.zeros(1, 3, 1, 1), logits)
    torch.testing.assert_close(
        grey, (Bernoulli().nll(every, logits.expand(8, -1, -1, -1))).mean()[None]
    )


def test_dequantization_stays_within_one_8_bit_step():
    pixels = to_model_range(
        torch.arange(256, dtype=torch.uint8)
        .reshape(1, 16, 16, 1)
        .expand(-1, -1, -1, 3)
        .contiguous()
    )
    torch.manual_seed(0)
    spread = torch.cat([dequantized(pixels) for _ in range(200)])
    assert (spread - pixels).abs().max() <= 1 / 255 + 1e-6
    assert (spread - pixels).mean().abs() < 1e-5 and (spread - pixels).std() == pytest.approx(
        2 / 255 / 12**0.5, rel=0.01
    )
    again = [dequantized(pixels, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*again)


def test_with_dequantization_no_scale_is_better_than_uniform_on_a_step():
    """Without, a scale that shrinks onto 8-bit values is rewarded without end: fewer than 0 bits a
    dimension."""
    pixels = torch.full((64, 3, 8, 8), -1.0)
    exact = to_laplace_logits(pixels)
    sharp, likelihood = torch.cat([exact, torch.full_like(exact, -5.0)], 1), LogitLaplace(1e-6)
    bits = [float(density_bits(likelihood, x, sharp).mean()) for x in (pixels, dequantized(pixels))]
    assert bits[0] < 0 < bits[1]
    assert LogitLaplace.learns_scale and not Gaussian.learns_scale
