"""Gaussian posteriors: against torch.distributions, by Monte Carlo and by finite differences."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from stage1_tokenizer import GaussianPosterior


@pytest.fixture
def posterior() -> GaussianPosterior:
    """Of 3 images with 5 dimensions, in double precision."""
    generator = torch.Generator().manual_seed(0)
    mean, log_std = torch.randn(2, 3, 5, dtype=torch.float64, generator=generator)
    return GaussianPosterior(mean, log_std)


def test_kl_equals_that_of_torch(posterior):
    q = Normal(posterior.mean, posterior.log_std.exp())
    expected = kl_divergence(q, Normal(torch.zeros(5).double(), 1.0))
    torch.testing.assert_close(posterior.kl_by_dimension(), expected)
    torch.testing.assert_close(posterior.kl_to_standard(), expected.sum(1))


def test_kl_by_hand():
    """0 of N(0, 1); half of the squared mean; (s^2 - 1) / 2 - log s."""
    posterior = GaussianPosterior(torch.tensor([[0.0, 2.0, 0.0]]), torch.tensor([[0.0, 0.0, 1.0]]))
    expected = torch.tensor([[0.0, 2.0, (torch.e**2 - 1) / 2 - 1]])
    torch.testing.assert_close(posterior.kl_by_dimension(), expected)


def test_kl_equals_the_mean_of_many_samples(posterior):
    count = 40_000
    many = GaussianPosterior(posterior.mean.repeat(count, 1), posterior.log_std.repeat(count, 1))
    torch.manual_seed(1)
    z = many.sample()
    standard = Normal(torch.zeros(5).double(), 1.0)
    terms = (many.log_prob(z) - standard.log_prob(z).sum(1)).view(count, 3)
    standard_error = terms.std(0) / count**0.5
    assert ((terms.mean(0) - posterior.kl_to_standard()).abs() < 4 * standard_error).all()


def test_log_prob_equals_that_of_torch(posterior):
    z = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = Normal(posterior.mean, posterior.log_std.exp()).log_prob(z).sum(1)
    torch.testing.assert_close(posterior.log_prob(z), expected)


def test_reparameterised_gradient_equals_finite_differences(posterior):
    def cost(mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
        z = GaussianPosterior(mean, log_std).sample(torch.Generator().manual_seed(3))
        return (z.sin() * z).sum()

    inputs = [posterior.mean.requires_grad_(), posterior.log_std.requires_grad_()]
    assert torch.autograd.gradcheck(cost, inputs)
    gradients = torch.autograd.grad(cost(*inputs), inputs)
    assert all((gradient != 0).all() for gradient in gradients)


def test_seeded_samples_do_not_depend_on_the_batch(posterior):
    whole = posterior.sample(torch.Generator().manual_seed(4))
    generator = torch.Generator().manual_seed(4)
    parts = [
        GaussianPosterior(posterior.mean[rows], posterior.log_std[rows]).sample(generator)
        for rows in (slice(0, 2), slice(2, 3))
    ]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(posterior.sample(generator), whole)
