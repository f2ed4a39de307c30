"""The Gaussian quantizer: bounds, free bits, active dimensions, latents of a grid and of one
vector."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from stage1_tokenizer import GaussianOptions
from stage1_tokenizer.quantizers.gaussian import LOG_STD_BOUND, GaussianQuantizer, active_dimensions

GRID = (2, 3)


def quantizer(**options: object) -> GaussianQuantizer:
    """2 features per position of a grid of 2x3."""
    torch.manual_seed(0)
    return GaussianQuantizer(2, GRID, GaussianOptions(**options))  # type: ignore[arg-type]


def features(images: int, channels: int = 4) -> Tensor:
    return torch.randn(images, channels, *GRID, generator=torch.Generator().manual_seed(1))


def test_first_half_of_the_features_is_the_mean_and_the_rest_the_deviation():
    inputs = features(3)
    posterior = quantizer().posterior(inputs)
    torch.testing.assert_close(posterior.mean, inputs[:, :2].flatten(1))
    bounded = LOG_STD_BOUND * (inputs[:, 2:].flatten(1) / LOG_STD_BOUND).tanh()
    torch.testing.assert_close(posterior.log_std, bounded)


@pytest.mark.parametrize("size", [1e4, -1e4, 1e30])
def test_no_deviation_overflows(size):
    inputs = torch.full((2, 4, *GRID), size)
    inputs[:, :2] = 1.0
    found = quantizer()(inputs.requires_grad_(), 1.0)
    assert found.kl is not None and found.kl.isfinite() and found.latents.isfinite().all()
    (gradient,) = torch.autograd.grad(found.kl + found.latents.sum(), inputs)
    assert gradient.isfinite().all()


def test_small_log_deviations_are_hardly_bounded():
    inputs = torch.full((1, 4, *GRID), 0.1)
    assert float(quantizer().posterior(inputs).log_std.mean()) == pytest.approx(0.1, rel=1e-3)


def test_training_samples_and_otherwise_the_mean_is_taken():
    module = quantizer()
    inputs = features(400)
    mean = module(inputs).latents
    assert torch.equal(mean, inputs[:, :2]) and torch.equal(module(inputs).latents, mean)
    torch.manual_seed(2)
    std = module.posterior(inputs).log_std.exp().reshape(mean.shape)
    noise = (module(inputs, 1.0).latents - mean) / std
    assert abs(float(noise.mean())) < 4 / 4800**0.5
    assert float(noise.std()) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 7.0])
def test_the_temperatures_value_is_not_used(temperature):
    module = quantizer()
    torch.manual_seed(3)
    expected = module(features(2), 1.0).latents
    torch.manual_seed(3)
    assert torch.equal(module(features(2), temperature).latents, expected)


def test_free_bits_by_hand():
    """Dimensions with a mean KL of 0.5, 0.02 and 0.08 nats over the batch, and 0.1 nats free: the
    loss counts 0.5 + 0.1 + 0.1 and pushes the first one alone. The metric is the KL itself."""
    module = GaussianQuantizer(3, (1, 1), GaussianOptions(free_bits=0.1)).train()
    squares = torch.tensor([[2.0, 0.0, 0.16], [0.0, 0.08, 0.16]])  # KL: half of the squared mean
    mean = squares.sqrt().requires_grad_()
    inputs = torch.cat([mean, torch.zeros(2, 3)], dim=1)[:, :, None, None]
    found = module(inputs, 1.0)
    assert found.kl is not None
    assert float(found.kl.detach()) == pytest.approx(0.5 + 0.1 + 0.1)
    assert float(found.metrics["kl"]) == pytest.approx(0.5 + 0.02 + 0.08)
    (gradient,) = torch.autograd.grad(found.kl, mean)
    torch.testing.assert_close(gradient, torch.tensor([[2**0.5 / 2, 0, 0], [0, 0, 0]]))
    without = module.eval()(inputs, 1.0).kl
    assert without is not None and float(without.detach()) == pytest.approx(0.6)


def test_without_free_bits_the_kl_is_that_of_the_posterior():
    module = quantizer().train()
    inputs = features(5)
    found = module(inputs, 1.0)
    torch.testing.assert_close(found.kl, module.posterior(inputs).kl_to_standard().mean())
    torch.testing.assert_close(found.kl, found.metrics["kl"])


def test_active_dimensions_have_means_that_vary():
    """A variance of 0.02, of 0.005, and of 0 far from the prior's mean: one of three is active."""
    spread = torch.tensor([0.02, 0.005, 0.0]).sqrt()
    means = torch.stack([spread, -spread]) / 2**0.5 + torch.tensor([0.0, 0.0, 9.0])
    assert float(active_dimensions(means)) == pytest.approx(1 / 3)


def test_active_dimensions_need_two_images():
    module = quantizer().train()
    assert "active_dimensions" not in module(features(1), 1.0).metrics
    assert "active_dimensions" in module(features(2), 1.0).metrics


def test_one_vector_sees_the_whole_grid_and_reaches_all_of_it():
    module = quantizer(latents="vector", vector_features=5)
    assert module.latent_dim == 5 and module.input_dim == module.output_dim == 2
    inputs = features(2, channels=2)
    found = module(inputs)
    assert found.gaussian is not None and found.gaussian.z.shape == (2, 5)
    assert found.latents.shape == (2, 2, *GRID)
    jacobian = torch.autograd.functional.jacobian(lambda x: module(x).latents, inputs)
    assert (jacobian[0, :, :, :, 0] != 0).all() and (jacobian[0, :, :, :, 1] == 0).all()


def test_a_grid_has_latents_at_each_position():
    module = quantizer()
    assert module.latent_dim == 12 and module.input_dim == 4
    other = torch.zeros(1, 4, 5, 1)
    assert module(other).latents.shape == (1, 2, 5, 1)  # any grid


def test_codes_are_refused():
    module = quantizer()
    codes = torch.zeros(1, *GRID, dtype=torch.long)
    for use in (
        lambda: module.encode(features(1)),
        lambda: module.embed(codes, GRID),
        module.vectors,
    ):
        with pytest.raises(
            ValueError,
            match=r"^this tokenizer has Gaussian latents and no codes; train one with "
            r"tokenizer\.model\.quantizer=vq, or use its latents \(in Python: posterior and "
            r"decode_latents\)$",
        ):
            use()
    assert module.layout(GRID) == () and module.usage() == []


def test_kl_is_in_nats_per_image():
    """Twelve dimensions of mean 1 and deviation 1: half a nat each, whatever the batch."""
    inputs = torch.cat([torch.ones(7, 2, *GRID), torch.zeros(7, 2, *GRID)], dim=1)
    assert float(quantizer()(inputs).metrics["kl"]) == pytest.approx(6.0)
    assert math.isclose(float(quantizer()(inputs[:1]).metrics["kl"]), 6.0)
