"""Bernoulli latents: codes are the bits, the KL by hand, what the decoder sees."""

from __future__ import annotations

import math
import typing

import pytest
import torch

from stage1_tokenizer import BinaryOptions
from stage1_tokenizer.quantizers import BinaryQuantizer
from stage1_tokenizer.quantizers.binary import kl_to_fair_bits
from stage1_tokenizer.quantizers.bits import pack, unpack
from stage1_tokenizer.quantizers.smoothing import Smoothing, inverse


def quantizer(smoothing: str = "power_pair") -> BinaryQuantizer:
    return BinaryQuantizer(16, BinaryOptions(smoothing=smoothing))  # type: ignore[arg-type]


def logits(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", [1, 4, 18])
def test_integers_and_bits_round_trip(bits):
    codes = torch.randint(0, 2**bits, (2, 3, 5), generator=torch.Generator().manual_seed(0))
    codes[0, 0, 0], codes[0, 0, 1] = 0, 2**bits - 1
    signs = unpack(codes, bits)
    assert signs.shape == (2, 3, 5, bits) and set(signs.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(pack(signs.permute(0, 3, 1, 2) > 0), codes)


def test_the_highest_bit_comes_first():
    assert unpack(torch.tensor(6), 4).tolist() == [-1, 1, 1, -1]


def test_without_temperature_bits_are_the_most_likely():
    x = logits(2, 4, 3, 3)
    result = quantizer().eval()(x)
    torch.testing.assert_close(result.latents, x.sign())
    assert torch.equal(result.codes, sum((x[:, i] > 0).long() * 2 ** (3 - i) for i in range(4)))


@pytest.mark.parametrize("smoothing", typing.get_args(Smoothing))
def test_with_a_temperature_bits_are_smoothed_at_its_inverse(smoothing):
    x = logits(2, 4, 3, 3).requires_grad_()
    torch.manual_seed(3)
    result = quantizer(smoothing).train()(x, 0.2)
    torch.manual_seed(3)
    expected = 2 * inverse(torch.rand_like(x), x.detach().sigmoid(), 5.0, smoothing) - 1  # type: ignore[arg-type]
    torch.testing.assert_close(result.latents.detach(), expected)
    (gradient,) = torch.autograd.grad(result.latents.sum(), x)
    # A likelier one is a greater s
    assert gradient.isfinite().all() and (gradient >= 0).all() and gradient.any()


def test_kl_by_hand_in_nats_an_image():
    """Two positions of two bits: probabilities 3/4, 1/2, 1 and 1/2."""
    # (1, bits, 1, positions)
    x = torch.tensor([[math.log(3), 0.0], [200.0, 0.0]]).reshape(2, 1, 2).permute(2, 1, 0)[None]
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5) + math.log(2)
    torch.testing.assert_close(kl_to_fair_bits(x), torch.tensor([expected]))
    result = quantizer().eval()(torch.cat([logits(1, 4, 3, 3, scale=1e4), torch.zeros(1, 4, 3, 3)]))
    assert float(result.kl) == pytest.approx(4 * 9 * math.log(2) / 2)


def test_use_is_counted_while_training_only():
    binary, x = quantizer(), logits(4, 4, 3, 3)
    binary.eval()(x, 0.5)
    assert not binary.counts.any()
    result = binary.train()(x, 0.5)
    torch.testing.assert_close(
        binary.counts, torch.bincount(result.codes.flatten(), minlength=16).float()
    )
    assert set(result.metrics) == {"kl", "codebook_usage", "codebook_perplexity", "dead_codes"}


def test_code_logits_are_sums_of_bit_logits():
    binary, x = quantizer(), logits(1, 4, 1, 2)
    p = binary.of_codes(x).softmax(-1)
    q = x.sigmoid()
    for code in (0, 5, 15):
        bits = [(code >> (3 - i)) & 1 for i in range(4)]
        by_hand = torch.stack([q[0, i] if bit else 1 - q[0, i] for i, bit in enumerate(bits)]).prod(
            0
        )
        torch.testing.assert_close(p[0, ..., code], by_hand)


def test_usage_penalty_is_the_divergence_of_the_mean_posterior():
    certain = torch.tensor([[[[50.0]], [[50.0]], [[50.0]], [[50.0]]]])
    binary = BinaryQuantizer(16, BinaryOptions(diversity=0.5)).train()
    assert float(binary(certain).loss) == pytest.approx(0.5 * math.log(16))
    both = torch.cat([certain, -certain])
    assert float(binary(both).loss) == pytest.approx(0.5 * math.log(8))
    assert float(binary(torch.zeros(1, 4, 2, 2)).loss) == pytest.approx(0.0, abs=1e-6)


def test_the_probability_of_a_code_is_that_of_its_bits():
    x = logits(2, 4, 3, 3)
    log_q = quantizer().log_assignment(x)
    assert log_q.shape == (2, 3, 3, 16)
    torch.testing.assert_close(log_q.exp().sum(-1), torch.ones(2, 3, 3))
    for code in (0, 6, 15):
        of_bits = torch.nn.functional.logsigmoid(x * unpack(torch.tensor(code), 4)[:, None, None])
        torch.testing.assert_close(log_q[..., code], of_bits.sum(1))
