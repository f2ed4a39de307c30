"""Lookup-free and binary spherical quantization: signs, entropies by brute force, the sphere."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from stage1_tokenizer import SignOptions
from stage1_tokenizer.quantizers import SignQuantizer, sign

BOTH = pytest.mark.parametrize("spherical", [False, True], ids=["lfq", "bsq"])


def quantizer(spherical: bool, **options) -> SignQuantizer:
    return SignQuantizer(16, SignOptions(**options), spherical=spherical)


def features(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@BOTH
def test_codes_are_the_signs_and_latents_their_vectors(spherical):
    quantize, x = quantizer(spherical).eval(), features(2, 4, 3, 3)
    result = quantize(x)
    torch.testing.assert_close(result.latents, x.sign() * (0.5 if spherical else 1.0))
    torch.testing.assert_close(result.latents, quantize.embed(result.codes, (3, 3)))
    if spherical:
        torch.testing.assert_close(result.latents.norm(dim=1), torch.ones(2, 3, 3))
    assert float(result.loss) == 0 and not result.metrics and not quantize.counts.any()


@BOTH
def test_gradient_is_straight_through_including_the_sphere(spherical):
    quantize, x, upstream = (
        quantizer(spherical).eval(),
        features(2, 4, 3, 3).requires_grad_(),
        features(2, 4, 3, 3) ** 2,
    )
    (gradient,) = torch.autograd.grad((quantize(x).latents * upstream).sum(), x)
    (expected,) = torch.autograd.grad(
        ((F.normalize(x, dim=1) if spherical else x) * upstream).sum(), x
    )
    torch.testing.assert_close(gradient, expected)


def brute_force(v: torch.Tensor, codebook: torch.Tensor, sharpness: float) -> torch.Tensor:
    """softmax over whole codes of -sharpness |v - c|^2: (N,K)."""
    return (-sharpness * torch.cdist(v, codebook).square()).softmax(1)


def entropy(p: torch.Tensor) -> torch.Tensor:
    return -(p * p.clamp(min=1e-12).log()).sum(-1)


@BOTH
def test_entropies_are_those_of_the_softmax_over_all_codes(spherical):
    quantize = quantizer(spherical, diversity=0.7, inverse_temperature=0.5)
    x = features(2, 4, 3, 3)
    v = x.permute(0, 2, 3, 1).flatten(0, 2)
    p = brute_force(v, quantize.vectors(), 0.5)
    batch = entropy(p.mean(0))
    if spherical:  # a bit at a time
        ones = torch.stack([p[:, quantize.vectors()[:, i] > 0].sum(1).mean() for i in range(4)])
        batch = entropy(torch.stack([ones, 1 - ones], dim=1)).sum()
    torch.testing.assert_close(
        quantize.entropy_penalty(x), entropy(p).mean() - 0.7 * batch, atol=1e-4, rtol=1e-4
    )


@BOTH
def test_the_loss_is_commitment_plus_entropy(spherical):
    quantize, x = (
        quantizer(spherical, commitment=0.5, entropy_weight=0.2).train(),
        features(4, 4, 3, 3),
    )
    result = quantize(x)
    metrics = result.metrics
    torch.testing.assert_close(
        result.loss, 0.5 * metrics["commitment"] + 0.2 * metrics["entropy_penalty"]
    )
    v = F.normalize(x, dim=1) if spherical else x
    torch.testing.assert_close(metrics["commitment"], (v - result.latents.detach()).square().mean())
    torch.testing.assert_close(
        quantize.counts, torch.bincount(result.codes.flatten(), minlength=16).float()
    )


def test_entropy_penalty_spreads_codes_and_sharpens_them():
    """From features that all share their signs, its gradient alone brings all codes into use."""
    quantize = quantizer(False, inverse_temperature=1.0, commitment=0.0)
    x = (0.5 + 0.1 * features(8, 4, 4, 4)).requires_grad_()
    assert quantize.eval()(x).codes.unique().numel() == 1
    optimizer = torch.optim.Adam([x], lr=0.02)
    for _ in range(300):
        quantize.entropy_penalty(x).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert quantize(x).codes.unique().numel() == 16 and float(x.detach().abs().median()) > 0.3


def test_the_entropy_of_many_codes_is_exact():
    p = torch.full((1, 2**18), 2.0**-18)
    assert float(sign.entropy(p)) == pytest.approx(18 * math.log(2), rel=1e-5)
    p[:, :1000] = 0
    assert float(sign.entropy(p / p.sum())) == pytest.approx(math.log(2**18 - 1000), rel=1e-5)
