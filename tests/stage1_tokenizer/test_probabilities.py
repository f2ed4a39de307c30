"""Exact probabilities of 8-bit values: proper distributions, equal to the density's mass on each
value's step."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stage1_tokenizer.likelihoods import (
    Bernoulli,
    CalibratedGaussian,
    DiscretizedLogistic,
    Gaussian,
    Laplace,
    LearnedGaussian,
    Likelihood,
    LogitLaplace,
    bits_per_dimension,
)
from stage1_tokenizer.likelihoods.gaussian import LEAST
from stage1_tokenizer.likelihoods.logistic import LEAST_SCALE
from stage1_tokenizer.options import STEP
from stage1_tokenizer.pixels import dequantized, to_values, values_to_model_range

INDEPENDENT: dict[str, Likelihood] = {
    "l2": Gaussian(0.1),
    "l2 narrow": Gaussian(0.008),
    "l2 wide": Gaussian(50.0),
    "calibrated_l2": CalibratedGaussian().given(torch.tensor([0, 100, 255])),
    "learned_l2": LearnedGaussian(),
    "l1": Laplace(0.1),
    "l1 narrow": Laplace(0.008),
    "logit_laplace": LogitLaplace(0.1),
    "logit_laplace narrow": LogitLaplace(1e-4),
    "bernoulli": Bernoulli(),
}
"""Likelihoods whose channels do not depend on one another."""
EVERY = INDEPENDENT | {
    "logistic": DiscretizedLogistic(3, 1),
    "logistic, 4 components": DiscretizedLogistic(3, 4),
    "logistic, 2 channels": DiscretizedLogistic(2, 3),
    "logistic, 1 channel": DiscretizedLogistic(1, 2),
}
SCALES = pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 1e4], ids=lambda s: f"outputs of {s:g}")


def channels_of(likelihood: Likelihood) -> int:
    return likelihood.channels if isinstance(likelihood, DiscretizedLogistic) else 3


def random_case(likelihood: Likelihood, scale: float) -> tuple[Tensor, Tensor]:
    """Values (3,C,4,4), with the first and the last among them, and outputs of a decoder."""
    generator = torch.Generator().manual_seed(0)
    channels = channels_of(likelihood)
    values = torch.randint(0, 256, (3, channels, 4, 4), generator=generator)
    if isinstance(likelihood, Bernoulli):
        values = (values > 127) * 255
    values[:, :, 0, 0] = 0
    values[:, :, 1, 1] = 255
    count = likelihood.parameter_count(channels)
    return values, scale * torch.randn(3, count, 4, 4, generator=generator)


@SCALES
@pytest.mark.parametrize("name", EVERY)
def test_probabilities_of_the_256_values_sum_to_one(name, scale):
    values, parameters = random_case(EVERY[name], scale)
    table = EVERY[name].log_probabilities(parameters, values)
    assert table.shape == (*values.shape, 256) and table.dtype == torch.float64
    total = table.exp().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-6, rtol=0)


@SCALES
@pytest.mark.parametrize("name", EVERY)
def test_log_probability_is_finite_and_that_of_the_table(name, scale):
    values, parameters = random_case(EVERY[name], scale)
    nats = EVERY[name].log_prob(values, parameters)
    assert nats.isfinite().all() and nats.dtype == torch.float64
    assert (nats <= 1e-12).all()
    table = EVERY[name].log_probabilities(parameters, values)
    torch.testing.assert_close(table.gather(-1, values.unsqueeze(-1)).squeeze(-1), nats)
    exact = EVERY[name].exact_nll(values, parameters)
    torch.testing.assert_close(exact, -nats.sum(dim=(1, 2, 3)))


@pytest.mark.parametrize("name", EVERY)
def test_unknown_values_change_no_bit_of_a_table(name):
    """An entropy coder knows all values when it encodes, and those of earlier channels when it
    decodes."""
    likelihood = EVERY[name]
    values, parameters = random_case(likelihood, 1.0)
    for channel in range(values.shape[1]):
        decoded = values.clone()
        decoded[:, channel:] = 17
        encoding = likelihood.log_probabilities(parameters, values, channel)
        decoding = likelihood.log_probabilities(parameters, decoded, channel)
        assert torch.equal(encoding, decoding)


@pytest.mark.parametrize("name", EVERY)
def test_tables_of_pieces_are_pieces_of_the_table(name):
    likelihood = EVERY[name]
    values, parameters = random_case(likelihood, 1.0)
    whole = likelihood.log_probabilities(parameters, values)
    for channel in range(values.shape[1]):
        rows = parameters[:, :, 1:3], values[:, :, 1:3]
        piece = likelihood.log_probabilities(*rows, channel)
        torch.testing.assert_close(piece, whole[:, channel : channel + 1, 1:3], rtol=1e-12, atol=0)


def logistic_density(x: Tensor, location: float, scale: float) -> Tensor:
    unit = torch.sigmoid((x - location) / scale)
    return unit * (1 - unit) / scale


def mass_by_integration(
    density: Callable[[Tensor], Tensor], value: int, reach: float = 6.0
) -> float:
    """On the step of a value; the first and the last have what lies beyond, too, as far as
    `reach`."""
    centre = 2 * value / 255 - 1
    low = -reach if value == 0 else centre - 1 / 255
    high = reach if value == 255 else centre + 1 / 255
    x = torch.linspace(low, high, 200_001, dtype=torch.float64)
    return float(torch.trapezoid(density(x.reshape(-1, 1, 1, 1)).flatten(), x))


@pytest.mark.parametrize("value", [0, 1, 100, 254, 255])
@pytest.mark.parametrize(
    ("likelihood", "outputs", "scale"),
    [
        (Gaussian(0.05), (-0.2,), None),
        (Gaussian(0.05), (0.97,), None),
        (Laplace(0.03), (-0.21,), None),
        (Laplace(0.03), (-0.98,), None),
        (LogitLaplace(0.1), (-0.3, -1.5), None),
        (LogitLaplace(0.1), (2.0, -3.0), None),
        (LearnedGaussian(), (-0.2, -3.0), 0.04858735 + LEAST),
        (DiscretizedLogistic(1), (7.0, -0.2, -3.0), 0.04858735 + LEAST_SCALE),
        (DiscretizedLogistic(1), (7.0, 0.99, -3.0), 0.04858735 + LEAST_SCALE),
    ],
)
def test_probability_is_the_mass_of_the_density_on_the_step(likelihood, outputs, scale, value):
    parameters = torch.tensor(outputs, dtype=torch.float64).reshape(1, -1, 1, 1)

    def density(x: Tensor) -> Tensor:
        if isinstance(likelihood, DiscretizedLogistic):
            return logistic_density(x, outputs[1], scale)
        shown = Gaussian(scale) if scale else likelihood
        location = parameters[:, :1] if scale else parameters
        return (-shown.nll_map(x, location.expand(len(x), -1, -1, -1))).exp()

    reach = 1.25 - 1e-9 if isinstance(likelihood, LogitLaplace) else 6.0
    found = float(likelihood.log_prob(torch.full((1, 1, 1, 1), value), parameters).exp())
    expected = mass_by_integration(density, value, reach)
    assert found == pytest.approx(expected, rel=5e-6, abs=1e-12)


def test_grid_point_density_is_no_bound():
    """L1 of scale 0.008 at an exact output: the density claims 1.029 bits, and 1.368 are needed.
    Over all values the density would sum to more than one."""
    likelihood = Laplace(0.008)
    values = torch.full((1, 1, 1, 1), 128)
    pixels = values_to_model_range(values, torch.float32)
    claimed = float(likelihood.nll(pixels, pixels)) - math.log(STEP)
    needed = float(likelihood.exact_nll(values, pixels))
    assert bits_per_dimension(claimed, 1) == pytest.approx(1.029, abs=1e-3)
    assert bits_per_dimension(needed, 1) == pytest.approx(1.368, abs=1e-3)
    every = values_to_model_range(torch.arange(256).reshape(-1, 1, 1, 1), torch.float32)
    total = STEP * (-likelihood.nll(every, pixels.expand(256, -1, -1, -1))).exp().sum()
    assert total > 1.01


@pytest.mark.parametrize("name", ["l2", "l2 narrow", "l1", "l1 narrow", "logit_laplace"])
def test_uniform_dequantization_is_a_bound_below_the_exact_log_probability(name):
    """Jensen: the mean of the log density over a step is at most the log of its mean."""
    likelihood = EVERY[name]
    values, parameters = random_case(likelihood, 1.0)
    parameters[:, :3] = values_to_model_range(values, torch.float32) + 0.02 * parameters[:, :3]
    offsets = (torch.arange(400) + 0.5) / 400 - 0.5
    pixels = values_to_model_range(values, torch.float64)
    log_density = torch.stack(
        [-likelihood.nll_map(pixels + STEP * offset, parameters) for offset in offsets]
    )
    bound = log_density.mean(0) + math.log(STEP)
    exact = likelihood.log_prob(values, parameters)
    assert (bound <= exact + 1e-6).all()
    assert (exact - bound).max() > 1e-3
    drawn = -likelihood.nll_map(dequantized(pixels.expand(3, 3, 4, 4)), parameters)
    assert (drawn + math.log(STEP)).sum() < exact.sum()


def test_far_values_have_the_log_probability_of_the_tail():
    """By mpmath, with 60 digits and more. The probabilities themselves underflow."""
    values = torch.full((1, 1, 1, 1), 10)
    location = torch.full((1, 1, 1, 1), 0.9)
    narrow = torch.cat([location, torch.full_like(location, -100.0)], 1)
    found = {
        "l2": Gaussian(0.01).log_prob(values, location),
        "l1": Laplace(0.001).log_prob(values, location),
        "learned_l2": LearnedGaussian().log_prob(values, narrow),
        "logistic": DiscretizedLogistic(1).log_prob(
            values, torch.cat([torch.zeros_like(location), narrow], 1)
        ),
    }
    expected = {
        "l2": -16525.3254006997,
        "l1": -1818.34057467519,
        "learned_l2": -1718666.3989527,
        "logistic": -3707.99995147515,
    }
    assert {name: float(nats) for name, nats in found.items()} == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", [name for name in EVERY if name != "bernoulli"])
@pytest.mark.parametrize("shown", [-3.0, -1.0, 0.1, 1.0, 3.0])
def test_probability_falls_with_the_distance_from_the_output(name, shown):
    """Between the first and the last value, which have tails. A mixture of equal components."""
    likelihood = EVERY[name]
    channels = channels_of(likelihood)
    parameters = torch.zeros(3, likelihood.parameter_count(channels), 1, 1)
    if isinstance(likelihood, DiscretizedLogistic):
        by_component = parameters.unflatten(1, (likelihood.mixtures, -1))
        by_component[:, :, 1 : 1 + channels] = shown
    else:
        parameters[:, :channels] = shown
    known = torch.zeros(3, channels, 1, 1, dtype=torch.long)
    table = likelihood.log_probabilities(parameters, known)[..., 1:255]
    centre = int(to_values(likelihood.image(parameters).clamp(-1, 1))[0, 0, 0, 0])
    assert (table[..., : max(centre - 1, 1)].diff() >= -1e-9).all()
    assert (table[..., min(centre, 253) :].diff() <= 1e-9).all()


@SCALES
@pytest.mark.parametrize("name", ["learned_l2", "logistic", "logistic, 4 components"])
def test_losses_on_exact_probabilities_have_finite_gradients(name, scale):
    likelihood = EVERY[name]
    values, parameters = random_case(likelihood, scale)
    parameters.requires_grad_()
    pixels = values_to_model_range(values, torch.float32)
    nll = likelihood.nll_map(pixels, parameters)
    assert nll.isfinite().all() and nll.dtype == torch.float32
    nll.sum().backward()
    assert parameters.grad.isfinite().all() and parameters.grad.any()


@pytest.mark.parametrize("name", ["learned_l2", "logistic", "logistic, 4 components"])
def test_losses_on_exact_probabilities_are_the_exact_probabilities(name):
    """To the precision of float32."""
    values, parameters = random_case(EVERY[name], 1.0)
    pixels = values_to_model_range(values, torch.float32)
    loss = EVERY[name].nll(pixels, parameters)
    torch.testing.assert_close(
        loss.double(), EVERY[name].exact_nll(values, parameters), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("likelihood", [LearnedGaussian(), DiscretizedLogistic(1)])
def test_least_scale_can_grow_again(likelihood):
    count = likelihood.parameter_count(1)
    parameters = torch.zeros(1, count, 1, 1)
    parameters[:, -1] = -6.0
    parameters.requires_grad_()
    likelihood.nll(torch.full((1, 1, 1, 1), 0.5), parameters).sum().backward()
    assert float(parameters.grad[0, -1]) < 0


def test_a_certain_pixel_costs_next_to_nothing():
    values = torch.full((1, 1, 1, 1), 77)
    location = values_to_model_range(values, torch.float32)
    certain = torch.cat([location, torch.full_like(location, -100.0)], 1)
    weights = torch.zeros_like(location)
    for likelihood, parameters, most in (
        (LearnedGaussian(), certain, 1e-4),
        (DiscretizedLogistic(1), torch.cat([weights, certain], 1), 1e-3),
    ):
        nats = float(likelihood.exact_nll(values, parameters))
        assert 0 < bits_per_dimension(nats, 1) < most


def test_a_mixture_of_equal_components_is_a_single_one():
    values, parameters = random_case(DiscretizedLogistic(3), 1.0)
    single = DiscretizedLogistic(3).log_prob(values, parameters)
    equal = parameters.repeat(1, 3, 1, 1)
    equal[:, ::10] = torch.tensor([0.3, -1.0, 2.0]).reshape(1, 3, 1, 1)
    torch.testing.assert_close(DiscretizedLogistic(3, 3).log_prob(values, equal), single)
    torch.testing.assert_close(
        DiscretizedLogistic(3, 3).image(equal), DiscretizedLogistic(3).image(parameters)
    )


def test_mixture_by_hand():
    """Two components and two channels: the joint probability is the weighted sum of products, and
    the second location moves with the first value."""
    weights = (0.25, 0.75)
    locations = ((-0.5, 0.1), (0.3, 0.6))
    scales = ((0.2, 0.05), (0.1, 0.3))
    slopes = (0.5, -0.25)
    raw = [[math.log(math.expm1(s - LEAST_SCALE)) for s in pair] for pair in scales]
    numbers = [
        number
        for k in range(2)
        for number in (math.log(weights[k]), *locations[k], *raw[k], slopes[k])
    ]
    red, green = 90, 140
    joint = sum(
        weights[k]
        * mass_by_integration(
            lambda x, k=k: logistic_density(x, locations[k][0], scales[k][0]), red
        )
        * mass_by_integration(
            lambda x, k=k: logistic_density(
                x, locations[k][1] + slopes[k] * (2 * red / 255 - 1), scales[k][1]
            ),
            green,
        )
        for k in range(2)
    )
    values = torch.tensor([red, green]).reshape(1, 2, 1, 1)
    parameters = torch.tensor(numbers).reshape(1, -1, 1, 1)
    nats = DiscretizedLogistic(2, 2).log_prob(values, parameters)
    assert float(nats.sum()) == pytest.approx(math.log(joint), abs=1e-5)


def test_mixture_shows_its_mean():
    mixture = DiscretizedLogistic(2, 2)
    parameters = torch.tensor(
        [math.log(0.25), -0.5, 0.1, 0.0, 0.0, 0.5, math.log(0.75), 0.3, 5.0, 0.0, 0.0, 0.0]
    ).reshape(1, -1, 1, 1)
    shown = mixture.image(parameters).flatten().tolist()
    # 5 lies beyond the pixels, so 1 is shown; 0.1 moves by half of the first channel's -0.5.
    assert shown == pytest.approx([0.25 * -0.5 + 0.75 * 0.3, 0.25 * (0.1 - 0.25) + 0.75 * 1.0])


def test_earlier_channels_are_needed_for_the_table_of_a_logistic():
    parameters = torch.zeros(1, DiscretizedLogistic(3).parameter_count(3), 2, 2)
    with pytest.raises(ValueError, match="depend on the channels before it; give `known`"):
        DiscretizedLogistic(3).log_probabilities(parameters)
    assert DiscretizedLogistic(1).log_probabilities(parameters[:, :3]).shape == (1, 1, 2, 2, 256)


def test_two_part_code_pays_for_the_deviation():
    """Eight bits per image, then the values: the best of the list, by trying all."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(60, 200, (4, 3, 8, 8), generator=generator)
    noise = torch.randn(4, 3, 8, 8, generator=generator)
    spread = torch.tensor([0.0, 0.004, 0.05, 1.0]).reshape(-1, 1, 1, 1)
    shown = values_to_model_range(values, torch.float32) + spread * noise
    likelihood = CalibratedGaussian()
    every = torch.stack(
        [
            likelihood.given(torch.full((4,), index)).log_prob(values, shown).sum(dim=(1, 2, 3))
            for index in range(likelihood.side_choices)
        ]
    )
    side = likelihood.side_information(values, shown)
    assert side.tolist() == every.argmax(0).tolist()
    assert side[0] == 0 and 0 < side[1] < side[2] < side[3] < 255
    bill = likelihood.exact_nll(values, shown)
    torch.testing.assert_close(bill, 8 * math.log(2) - every.amax(0))


def test_two_part_code_costs_hardly_more_than_the_best_deviation():
    """The list is fine enough: a deviation between two of its entries loses under 1e-3 bits per
    dimension."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(60, 200, (1, 3, 32, 32), generator=generator)
    shown = values_to_model_range(values, torch.float32)
    shown = shown + 0.05 * torch.randn(shown.shape, generator=generator)
    best = min(
        float(Gaussian(scale).exact_nll(values, shown))
        for scale in torch.linspace(0.045, 0.055, 101).tolist()
    )
    bill = float(CalibratedGaussian().exact_nll(values, shown)) - 8 * math.log(2)
    assert 0 <= bits_per_dimension(bill - best, values.numel()) < 1e-3


def test_calibrated_probabilities_need_the_deviation():
    values, shown = random_case(Gaussian(0.1), 0.1)
    for call in (
        CalibratedGaussian().log_prob,
        lambda v, p: CalibratedGaussian().log_probabilities(p),
    ):
        with pytest.raises(ValueError, match=r"call likelihood\.given\(.*\) first, or exact_nll"):
            call(values, shown)


def test_others_have_no_side_information():
    values, shown = random_case(Gaussian(0.1), 0.1)
    likelihood = Gaussian(0.1)
    assert likelihood.side_nats == 0
    side = likelihood.side_information(values, shown)
    assert side.tolist() == [0, 0, 0] and likelihood.given(side) is likelihood


def test_bernoulli_has_no_probability_of_grey():
    values, logits = random_case(Bernoulli(), 1.0)
    expected = torch.where(values == 255, logits.double().sigmoid(), (-logits.double()).sigmoid())
    torch.testing.assert_close(Bernoulli().log_prob(values, logits), expected.log())
    assert Bernoulli().covers(values)
    values[0, 0, 0, 0] = 128
    assert not Bernoulli().covers(values)
    with pytest.raises(
        ValueError, match=r"alone, and .*; train .* with likelihood discretized_log"
    ):
        Bernoulli().log_prob(values, logits)
    with pytest.raises(ValueError, match="bernoulli has a probability of the values 0 and 255"):
        Bernoulli().exact_nll(values, logits)


def test_values_and_pixels_are_inverses():
    values = torch.arange(256).reshape(1, 1, 16, 16)
    assert torch.equal(to_values(values_to_model_range(values, torch.float32)), values)
    assert to_values(torch.tensor([-1.3, 1.3])).tolist() == [0, 255]
