"""The dVAE's quantizer against torch's Gumbel-softmax and hand-computed divergences."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from stage1_tokenizer import GumbelOptions
from stage1_tokenizer.quantizers import GumbelQuantizer
from stage1_tokenizer.quantizers.categorical import diversity_loss, gumbel_noise_like, kl_to_uniform
from stage1_tokenizer.quantizers.gumbel import reinmax, relax


def quantizer(num_codes: int = 6, code_dim: int = 4, **options) -> GumbelQuantizer:
    return GumbelQuantizer(num_codes, code_dim, GumbelOptions(**options))


def logits(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def torch_draws_our_noise(monkeypatch):
    """`F.gumbel_softmax` takes exponential variables from their own method; here they are those our
    noise is the -log of."""
    monkeypatch.setattr(
        torch.Tensor, "exponential_", lambda empty: empty.copy_((-gumbel_noise_like(empty)).exp())
    )


@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
@pytest.mark.usefixtures("torch_draws_our_noise")
def test_relaxed_codes_equal_torchs_gumbel_softmax(temperature):
    x = logits(2, 3, 3, 6)
    torch.manual_seed(5)
    expected = F.gumbel_softmax(x, tau=temperature)
    torch.manual_seed(5)
    torch.testing.assert_close(relax(x, gumbel_noise_like(x), temperature), expected)


def test_the_noise_makes_argmax_a_sample_of_the_softmax():
    """Gumbel-max: frequencies of 200,000 argmaxes, within four deviations of a binomial."""
    torch.manual_seed(0)
    x = torch.tensor([1.0, 0.0, -1.0, 0.5]).expand(200_000, -1)
    counts = torch.bincount((x + gumbel_noise_like(x)).argmax(1), minlength=4) / 200_000
    p = x[0].softmax(0)
    assert ((counts - p).abs() < 4 * (p * (1 - p) / 200_000).sqrt()).all()


def test_noise_is_standard_gumbel():
    """Mean and deviation of a million, and the share above 3; each within four of its own
    deviations."""
    torch.manual_seed(0)
    noise = gumbel_noise_like(torch.empty(1_000_000)).double()
    assert float(noise.mean()) == pytest.approx(0.57722, abs=4 * 1.2825e-3)
    assert float(noise.std()) == pytest.approx(math.pi / math.sqrt(6), abs=0.006)
    share = 1 - math.exp(-math.exp(-3))
    assert float((noise > 3).double().mean()) == pytest.approx(
        share, abs=4 * math.sqrt(share * (1 - share) / 1e6)
    )


@pytest.mark.parametrize("drawn", [0.0, 1 - 2**-24])
def test_noise_is_finite(monkeypatch, drawn):
    """Also of the smallest and the largest numbers that are drawn."""
    monkeypatch.setattr(
        torch, "rand", lambda shape, generator, **options: torch.full(shape, drawn, **options)
    )
    assert gumbel_noise_like(torch.empty(3)).isfinite().all()


@pytest.mark.parametrize("gradient", ["relaxed", "straight_through"])
@pytest.mark.usefixtures("torch_draws_our_noise")
def test_latents_and_their_gradient_are_those_of_torchs_gumbel_softmax(gradient):
    gumbel = quantizer(gradient=gradient).train()
    x = logits(2, 6, 3, 3).requires_grad_()
    upstream = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(3)
    result = gumbel(x, 0.7)
    (own,) = torch.autograd.grad((result.latents * upstream).sum(), x)
    torch.manual_seed(3)
    weights = F.gumbel_softmax(x.permute(0, 2, 3, 1), tau=0.7, hard=gradient == "straight_through")
    expected = torch.einsum("bhwk,kd->bdhw", weights, gumbel.codebook)
    torch.testing.assert_close(result.latents, expected)
    (wanted,) = torch.autograd.grad((expected * upstream).sum(), x)
    torch.testing.assert_close(own, wanted)


def jacobian_of_softmax(p: torch.Tensor) -> torch.Tensor:
    return p.diag() - p[:, None] * p


@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_reinmax_follows_its_definition(temperature):
    """Forward: the sample. Backward, with p = softmax(l) and s = (sample + softmax(l / t)) / 2: 2
    J(s) - J(p) / 2 (Liu et al., alg. 2)."""
    x = logits(6).requires_grad_()
    noise = gumbel_noise_like(x.detach())
    weights = reinmax(x, noise, temperature)
    sample = F.one_hot((x + noise).argmax(), 6).float()
    torch.testing.assert_close(weights, sample)
    upstream = torch.arange(6.0)
    (gradient,) = torch.autograd.grad((weights * upstream).sum(), x)
    flat = x.detach()
    middle = (sample + (flat / temperature).softmax(0)) / 2
    expected = upstream @ (
        2 * jacobian_of_softmax(middle) - jacobian_of_softmax(flat.softmax(0)) / 2
    )
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)


def test_reinmax_is_exact_on_average_for_a_quadratic_cost_and_straight_through_is_not():
    """Heun's method is of second order, so the mean gradient of a cost quadratic in the code is
    that of the expected cost. Two codes, 40,000 samples; a deviation of the mean is 0.0004."""
    x = torch.tensor([0.4, -0.3]).expand(40_000, -1).clone().requires_grad_()
    target, p = 0.2, float(torch.tensor(0.7).sigmoid())
    torch.manual_seed(0)
    noise = gumbel_noise_like(x.detach())

    def mean_gradient(weights: torch.Tensor) -> float:
        cost = (weights[:, 0] - target).square().sum()
        return float(torch.autograd.grad(cost, x, retain_graph=True)[0][:, 0].mean())

    exact = p * (1 - p) * ((1 - target) ** 2 - target**2)
    assert mean_gradient(reinmax(x, noise, 1.0)) == pytest.approx(exact, abs=0.004)
    soft = x.softmax(1)
    hard = F.one_hot((x + noise).argmax(1), 2) + soft - soft.detach()
    assert mean_gradient(hard) == pytest.approx(p * (1 - p) * 2 * (p - target), abs=0.004)
    assert abs(mean_gradient(hard) - exact) > 0.05


def test_the_codebook_learns_by_gradient():
    gumbel = quantizer().train()
    gumbel(logits(2, 6, 3, 3), 1.0).latents.square().sum().backward()
    assert gumbel.codebook.grad is not None and (gumbel.codebook.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("training", [False, True])
def test_without_temperature_codes_are_hard_and_deterministic(training):
    gumbel = quantizer().train(training)
    x = logits(2, 6, 3, 3)
    first, second = gumbel(x), gumbel(x)
    assert torch.equal(first.codes, x.argmax(1)) and torch.equal(first.latents, second.latents)
    torch.testing.assert_close(first.latents, gumbel.embed(first.codes, (3, 3)))
    torch.testing.assert_close(first.latents[1, :, 2, 0], gumbel.codebook[first.codes[1, 2, 0]])


def test_relaxed_codes_harden_as_the_temperature_falls():
    x = logits(2, 3, 3, 6)
    noise = gumbel_noise_like(x)
    sharpness = [float(relax(x, noise, t).max(-1).values.mean()) for t in (10.0, 1.0, 0.1, 0.01)]
    assert sharpness == sorted(sharpness) and sharpness[-1] > 0.99


def test_kl_by_hand_in_nats_an_image():
    """Two positions: probabilities (3/4, 1/4, 0, 0) and uniform ones over four codes."""
    x = torch.tensor([[math.log(3), 0.0, -200.0, -200.0], [1.0, 1.0, 1.0, 1.0]]).reshape(1, 1, 2, 4)
    expected = 0.75 * math.log(0.75 * 4) + 0.25 * math.log(0.25 * 4)
    torch.testing.assert_close(kl_to_uniform(x.log_softmax(-1)), torch.tensor([expected]))


def test_kl_is_summed_over_positions_and_averaged_over_the_batch():
    one_hot = 100 * F.one_hot(torch.zeros(3, 2, 5, dtype=torch.long), 6).float()
    torch.testing.assert_close(
        kl_to_uniform(one_hot.log_softmax(-1)), torch.full((3,), 10 * math.log(6))
    )
    mixed = torch.cat([one_hot[:1], torch.zeros(3, 2, 5, 6)])
    result = quantizer().eval()(mixed.permute(0, 3, 1, 2))
    assert (
        float(result.kl)
        == pytest.approx(10 * math.log(6) / 4)
        == pytest.approx(float(result.metrics["kl"]))
    )


def test_kl_gradient_pulls_logits_together():
    x = logits(1, 2, 2, 6, scale=3.0).requires_grad_()
    kl_to_uniform(x.log_softmax(-1)).sum().backward()
    # d KL / d logit_k = p_k (log p_k - sum_j p_j log p_j)
    log_p = x.detach().log_softmax(-1)
    expected = log_p.exp() * (log_p - (log_p.exp() * log_p).sum(-1, keepdim=True))
    torch.testing.assert_close(x.grad, expected)


def test_usage_is_counted_in_training_only():
    gumbel = quantizer()
    x = logits(4, 6, 3, 3)
    gumbel.eval()(x, 0.5)
    assert not gumbel.counts.any()
    result = gumbel.train()(x, 0.5)
    torch.testing.assert_close(
        gumbel.counts, torch.bincount(x.argmax(1).flatten(), minlength=6).float()
    )
    assert {"kl", "codebook_usage", "codebook_perplexity", "dead_codes"} == set(result.metrics)


def test_autocast_leaves_the_quantizer_in_float32():
    gumbel, x = quantizer().eval(), logits(2, 6, 3, 3)
    torch.manual_seed(1)
    expected = gumbel(x, 0.5)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        result = gumbel(x, 0.5)
        low = gumbel(x.bfloat16(), 0.5)
    assert torch.equal(result.latents, expected.latents) and torch.equal(result.kl, expected.kl)
    assert low.latents.dtype == low.kl.dtype == torch.float32


def test_usage_penalty_is_zero_for_uniform_usage():
    sure = 100 * F.one_hot(torch.tensor([0, 0, 1, 2]), 4).float()[None, None]  # four positions
    mean = torch.tensor([0.5, 0.25, 0.25])
    torch.testing.assert_close(
        diversity_loss(sure.log_softmax(-1)), math.log(4) + (mean * mean.log()).sum()
    )
    alike = 100 * torch.eye(4)[None, None]
    assert float(diversity_loss(alike.log_softmax(-1))) == pytest.approx(0.0, abs=1e-6)
    result = quantizer(4, diversity=0.5).train()(sure.permute(0, 3, 1, 2))
    torch.testing.assert_close(result.loss, 0.5 * diversity_loss(sure.log_softmax(-1)))
    assert float(quantizer(4, diversity=0.5).eval()(sure.permute(0, 3, 1, 2)).loss) == 0.0


def test_diversity_is_a_lower_bound_of_the_second_term_of_elbo_surgery():
    """All images of two positions and three codes, enumerated."""
    log_q = logits(5, 1, 2, 3, scale=2.0).log_softmax(-1)
    q = log_q.exp()[:, 0]
    joint = torch.einsum("bi,bj->bij", q[:, 0], q[:, 1])
    mean = joint.mean(0)
    second = (mean * (9 * mean).log()).sum()
    information = (joint * (joint / mean).log()).sum(dim=(1, 2)).mean()
    torch.testing.assert_close(information + second, kl_to_uniform(log_q).mean())
    assert 0 < 2 * float(diversity_loss(log_q)) < float(second)
