"""Mixtures: densities against torch.distributions, the posteriors that VampPrior and the aggregated
posterior are made of."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from stage2_prior import AggregatedPosterior, GaussianMixture, StandardNormal, VampPrior
from stage2_prior.flows import mixture
from tests.helpers.latent_priors import tiny_encoder, tiny_latent_prior


def reference(weights: torch.Tensor, means: torch.Tensor, stds: torch.Tensor) -> MixtureSameFamily:
    return MixtureSameFamily(Categorical(weights), Independent(Normal(means, stds), 1))


def test_standard_normal_is_torchs():
    latents = torch.randn(7, 3)
    expected = Independent(Normal(torch.zeros(3), torch.ones(3)), 1).log_prob(latents)
    torch.testing.assert_close(StandardNormal(3).log_prob(latents), expected)


def test_gaussian_mixture_is_torchs():
    prior = tiny_latent_prior("mixture")
    assert isinstance(prior, GaussianMixture)
    latents = torch.randn(7, 2, dtype=torch.float64)
    weights = prior.weights.logits.softmax(0)
    expected = reference(weights, prior.means, prior.log_stds.exp()).log_prob(latents)
    torch.testing.assert_close(prior.log_prob(latents), expected)


@pytest.mark.parametrize("elements", [1, 30, 2**22])
def test_aggregated_posterior_is_the_mean_of_the_posteriors(elements, monkeypatch):
    """In chunks of any size."""
    monkeypatch.setattr(mixture, "_CHUNK_ELEMENTS", elements)
    means = torch.randn(11, 3, dtype=torch.float64)
    log_stds = torch.randn(11, 3, dtype=torch.float64)
    latents = torch.randn(5, 3, dtype=torch.float64)
    each = Independent(Normal(means, log_stds.exp()), 1).log_prob(latents[:, None])
    prior = AggregatedPosterior.of(means, log_stds)
    torch.testing.assert_close(prior.log_prob(latents), each.exp().mean(1).log())
    assert not list(prior.parameters())


def test_aggregated_posterior_far_from_all_posteriors_is_finite():
    prior = AggregatedPosterior.of(torch.zeros(3, 2), torch.full((3, 2), -5.0))
    log_p = prior.log_prob(torch.full((1, 2), 30.0))
    assert log_p.isfinite().all() and float(log_p) < -1e6


def test_context_moves_the_weights_alone():
    prior = tiny_latent_prior("mixture", 3)
    assert isinstance(prior, GaussianMixture)
    context = torch.randn(4, 3, dtype=torch.float64)
    latents = torch.randn(4, 2, dtype=torch.float64)
    for row in range(4):
        weights = (prior.weights.logits + prior.weights.from_context.weight @ context[row]).softmax(
            0
        )
        expected = reference(weights, prior.means, prior.log_stds.exp()).log_prob(latents[row])
        torch.testing.assert_close(prior.log_prob(latents, context)[row], expected)


def test_vamp_prior_is_the_mixture_of_its_pseudo_inputs_posteriors():
    encoder = tiny_encoder(2)
    prior = VampPrior(2, (2, 2), components=4).double()
    prior.attach(lambda inputs: encoder(inputs).chunk(2, dim=1))
    means, log_stds = encoder(prior.pseudo_inputs).chunk(2, dim=1)
    latents = torch.randn(6, 2, dtype=torch.float64)
    expected = reference(torch.ones(4), means, log_stds.exp()).log_prob(latents)
    torch.testing.assert_close(prior.log_prob(latents), expected)


def test_gradients_reach_pseudo_inputs_and_encoder_which_is_no_part_of_the_prior():
    encoder = tiny_encoder(2)
    prior = VampPrior(2, (2, 2), components=4).double()

    class Posterior(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return self.encoder(inputs).chunk(2, dim=1)

    prior.attach(Posterior())  # type: ignore[arg-type]
    prior.log_prob(torch.randn(6, 2, dtype=torch.float64)).sum().backward()
    assert (prior.pseudo_inputs.grad.flatten(1).abs().sum(1) > 0).all()
    assert all(p.grad.abs().sum() > 0 for p in encoder.parameters())
    assert set(prior.state_dict()) == {"pseudo_inputs", "weights.logits"}


def test_vamp_prior_starts_at_given_inputs():
    prior = VampPrior(2, (2, 2), components=4)
    inputs = torch.randn(4, 2, 2)
    prior.set_pseudo_inputs(inputs)
    assert prior.pseudo_inputs.equal(inputs) and prior.pseudo_inputs.requires_grad
    with pytest.raises(ValueError, match=r"inputs have shape \(3, 2, 2\) .* \(4, 2, 2\)"):
        prior.set_pseudo_inputs(inputs[:3])


def test_vamp_prior_without_an_encoder_says_how_to_attach_one():
    prior = VampPrior(2, (4,), components=3)
    with pytest.raises(ValueError, match=r"call attach\(posterior\)"):
        prior.sample(2)
    prior.attach(lambda inputs: (inputs, inputs))
    with pytest.raises(ValueError, match=r"gives means \(3, 4\) .* both must be \(3, 2\)"):
        prior.log_prob(torch.zeros(1, 2))


def test_aggregated_posterior_without_posteriors_says_how_to_set_them():
    prior = AggregatedPosterior(2, 3)
    with pytest.raises(ValueError, match=r"call set_posteriors\(means, log_stds\)"):
        prior.log_prob(torch.zeros(1, 2))
    prior.set_posteriors(torch.zeros(3, 2), torch.zeros(3, 2))
    torch.testing.assert_close(
        prior.log_prob(torch.zeros(1, 2)), StandardNormal(2).log_prob(torch.zeros(1, 2))
    )


def test_posteriors_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"means \(4, 2\) and log_stds \(3, 2\); .* \(3, 2\)"):
        AggregatedPosterior(2, 3).set_posteriors(torch.zeros(4, 2), torch.zeros(3, 2))
