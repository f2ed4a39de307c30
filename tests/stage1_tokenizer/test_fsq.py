"""Finite scalar quantization: digits, bounds, the gradient of the bound."""

from __future__ import annotations

import itertools

import pytest
import torch

from stage1_tokenizer import FsqOptions
from stage1_tokenizer.quantizers import FiniteScalarQuantizer

LEVELS = pytest.mark.parametrize("levels", [(3,), (4, 3), (8, 5, 5, 5)])


def quantizer(levels: tuple[int, ...]) -> FiniteScalarQuantizer:
    return FiniteScalarQuantizer(FsqOptions(levels=levels)).eval()


@LEVELS
def test_every_code_is_reached_and_embeds_to_itself(levels):
    """Features far apart reach the outermost values too; and what the decoder sees is the code's
    vector."""
    fsq = quantizer(levels)
    features = torch.cartesian_prod(
        *[torch.linspace(-0.9999, 0.9999, 24).atanh()] * len(levels)
    ).reshape(-1, len(levels))
    result = fsq(features.T.reshape(1, len(levels), 1, -1))
    assert result.codes.unique().numel() == fsq.num_codes and result.codes.min() == 0
    torch.testing.assert_close(result.latents, fsq.embed(result.codes, (1, len(features))))


def test_first_digit_of_a_code_varies_fastest():
    fsq = quantizer((4, 3))
    by_hand = [((a - 2) / 2, (b - 1) / 1) for b, a in itertools.product(range(3), range(4))]
    torch.testing.assert_close(fsq.vectors(), torch.tensor(by_hand))


@LEVELS
def test_the_values_of_a_feature_are_evenly_spaced_in_minus_one_to_one(levels):
    vectors = quantizer(levels).vectors()
    for d, size in enumerate(levels):
        values = vectors[:, d].unique()
        assert len(values) == size and values.min() == -1 and values.max() <= 1
        torch.testing.assert_close(values.diff(), torch.full((size - 1,), 1 / (size // 2)))


def test_gradient_is_straight_through_the_bounding_function():
    fsq = quantizer((5,))
    x = torch.linspace(-2, 2, 9).reshape(1, 1, 1, 9).requires_grad_()
    (gradient,) = torch.autograd.grad(fsq(x).latents.sum(), x)
    torch.testing.assert_close(gradient, (1 - x.detach().tanh() ** 2) * 4 * (1 + 1e-3) / 2 / 2)


def test_usage_is_counted_in_training_only():
    fsq, x = quantizer((4, 3)), torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    assert not fsq(x).metrics and not fsq.counts.any()
    result = fsq.train()(x)
    torch.testing.assert_close(
        fsq.counts, torch.bincount(result.codes.flatten(), minlength=12).float()
    )
    assert (
        set(result.metrics) == {"codebook_usage", "codebook_perplexity", "dead_codes"}
        and float(result.loss) == 0
    )
