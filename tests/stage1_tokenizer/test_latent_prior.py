"""A learned prior of Gaussian latents: the bound with it, its own loss, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from stage1_tokenizer import (
    GaussianOptions,
    ObjectiveConfig,
    TokenizerModule,
    TokenizerObjective,
    to_model_range,
)
from tests.helpers.tokenizers import EVERY_LATENT_KIND, LATENT_KINDS, AffinePrior, tiny_tokenizer

DIMENSIONS = 16 * 16 * 3


class StandardNormal(nn.Module):
    def log_prob(self, z: Tensor) -> Tensor:
        return Normal(0.0, 1.0).log_prob(z).sum(1)


def gaussian_tokenizer(kind: str = "gaussian") -> TokenizerModule:
    options = LATENT_KINDS[kind].get("gaussian", GaussianOptions())
    latents = GaussianOptions(latents=options.latents, vector_features=options.vector_features)
    return tiny_tokenizer(quantizer="gaussian", gaussian=latents)


@EVERY_LATENT_KIND
def test_standard_normal_prior_has_the_analytic_kl_in_expectation(images, kind):
    tokenizer = gaussian_tokenizer(kind).train()
    objective = TokenizerObjective(
        tokenizer, ObjectiveConfig(kl_ramp_steps=0), latent_prior=StandardNormal()
    )
    torch.manual_seed(0)
    found = []
    for _ in range(20):
        (loss,) = objective.losses(images.repeat(16, 1, 1, 1), 0)
        found.append(float(loss.metrics["kl"]))
        expected = (loss.metrics["nll"] + loss.metrics["kl"]) / DIMENSIONS
        torch.testing.assert_close(loss.value.detach(), expected)
    estimates = torch.tensor(found)
    analytic = tokenizer.posterior(to_model_range(images)).kl_to_standard().mean()
    standard_error = estimates.std() / len(estimates) ** 0.5
    assert abs(float(estimates.mean() - analytic)) < 4 * float(standard_error)
    assert float(standard_error) < 0.05 * float(analytic)


def test_losses_have_the_gradient_of_the_bound(images):
    """The tokenizer's loss is -log p(x|z) + w (log q(z|x) - log p(z)) per dimension; the prior's is
    -log p(z) per latent dimension. Neither has a gradient in the other's weights."""
    tokenizer = gaussian_tokenizer().train()
    prior = AffinePrior(64)
    config = ObjectiveConfig(kl_weight=0.5, kl_ramp_steps=0)
    objective = TokenizerObjective(tokenizer, config, latent_prior=prior)
    assert list(objective.networks) == ["tokenizer", "latent_prior"]
    torch.manual_seed(1)
    losses = objective.losses(images, 0)
    first = next(losses)
    first.value.backward()
    found = {name: p.grad.clone() for name, p in tokenizer.named_parameters()}
    assert first.group == "tokenizer" and all(p.grad is None for p in prior.parameters())
    second = next(losses)
    second.value.backward()
    assert second.group == "latent_prior" and next(losses, None) is None
    of_prior = [p.grad.clone() for p in prior.parameters()]
    for name, parameter in tokenizer.named_parameters():
        assert torch.equal(parameter.grad, found[name])

    tokenizer.zero_grad()
    prior.zero_grad()
    torch.manual_seed(1)
    output = tokenizer(to_model_range(images), 1.0)
    latents = output.quantized.gaussian
    nll = tokenizer.likelihood.nll(to_model_range(images), output.parameters)
    kl = latents.posterior.log_prob(latents.z) - prior.log_prob(latents.z)
    ((nll + 0.5 * kl).mean() / DIMENSIONS).backward()
    for name, parameter in tokenizer.named_parameters():
        torch.testing.assert_close(parameter.grad, found[name])
    scale = 0.5 * 64 / DIMENSIONS
    for parameter, gradient in zip(prior.parameters(), of_prior, strict=True):
        torch.testing.assert_close(parameter.grad, scale * gradient)
    assert float(second.metrics["prior_nll"]) == pytest.approx(64 * float(second.value.detach()))


def test_a_trained_prior_tightens_the_bound(images):
    tokenizer = gaussian_tokenizer().train()
    prior = AffinePrior(64)
    objective = TokenizerObjective(tokenizer, ObjectiveConfig(), latent_prior=prior)
    before = objective.evaluate([images])
    optimizer = torch.optim.Adam(prior.parameters(), lr=0.05)
    for step in range(60):
        *_, loss = objective.losses(images, step)
        loss.value.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = objective.evaluate([images])
    assert after["nll"] == before["nll"] and after["psnr"] == before["psnr"]
    assert after["kl"] < before["kl"] - 1 and after["elbo"] > before["elbo"] + 1
    fixed = TokenizerObjective(tokenizer, ObjectiveConfig()).evaluate([images])
    assert after["kl"] < fixed["kl"]


def test_losses_call_the_wrapped_prior(images):
    """DDP averages gradients of what passes through its own forward only."""

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module
            self.calls = 0

        def forward(self, *args, **kwargs):
            self.calls += 1
            return self.module(*args, **kwargs)

    objective = TokenizerObjective(
        gaussian_tokenizer().train(), ObjectiveConfig(), latent_prior=AffinePrior(64)
    )
    wrapped = {name: Wrapper(network) for name, network in objective.networks.items()}
    list(objective.losses(images, 0, wrapped))
    assert {name: network.calls for name, network in wrapped.items()} == {
        "tokenizer": 1,
        "latent_prior": 1,
    }


def test_a_frozen_prior_is_used_and_not_trained(images):
    prior = AffinePrior(64).requires_grad_(False)
    tokenizer = gaussian_tokenizer().train()
    objective = TokenizerObjective(tokenizer, ObjectiveConfig(), latent_prior=prior)
    assert list(objective.networks) == ["tokenizer"]
    (loss,) = objective.losses(images, 5000)
    loss.value.backward()
    assert not any(p.requires_grad for p in prior.parameters())
    shifted = AffinePrior(64).requires_grad_(False)
    shifted.mean.data += 1
    other = TokenizerObjective(tokenizer, ObjectiveConfig(), latent_prior=shifted)
    assert other.evaluate([images])["kl"] != objective.evaluate([images])["kl"]
    assert not prior.training and tokenizer.training


def test_prior_and_discriminator_have_a_loss_each(images):
    from stage1_tokenizer import DiscriminatorOptions

    discriminator = DiscriminatorOptions(weight=1.0, width=16, layers=1, start=2)
    objective = TokenizerObjective(
        gaussian_tokenizer().train(),
        ObjectiveConfig(discriminator=discriminator),
        latent_prior=AffinePrior(64),
    )
    groups = [[loss.group for loss in objective.losses(images, step)] for step in (0, 2)]
    assert groups == [["tokenizer", "latent_prior"], ["tokenizer", "discriminator", "latent_prior"]]


def test_the_prior_computes_in_fp32_under_autocast(images):
    seen = []

    class Watching(AffinePrior):
        def log_prob(self, z: Tensor) -> Tensor:
            seen.append((z.dtype, torch.is_autocast_enabled("cpu")))
            return super().log_prob(z)

    objective = TokenizerObjective(
        gaussian_tokenizer().train(), ObjectiveConfig(), latent_prior=Watching(64)
    )
    with torch.autocast("cpu", torch.bfloat16):
        losses = list(objective.losses(images, 0))
    assert seen == [(torch.float32, False)] * 2
    assert all(math.isfinite(float(loss.value.detach())) for loss in losses)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {},
            r"^tokenizer\.model\.quantizer is vq and a latent prior is given; it is a prior of "
            r"Gaussian latents, set the quantizer to gaussian$",
        ),
        (
            {"quantizer": "gaussian", "gaussian": GaussianOptions(free_bits=0.1)},
            r"^tokenizer\.model\.gaussian\.free_bits is 0\.1 and a latent prior is given; free "
            r"bits need the analytic KL to N\(0, I\), set them to 0$",
        ),
    ],
)
def test_a_prior_that_cannot_be_used_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TokenizerObjective(
            tiny_tokenizer(**changes), ObjectiveConfig(), latent_prior=StandardNormal()
        )
