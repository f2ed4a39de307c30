"""The score function: unbiased, a baseline that only lowers the variance, no gradient from the
decoder."""

from __future__ import annotations

import pytest
import torch

from stage1_tokenizer import ScoreFunctionOptions
from stage1_tokenizer.quantizers import ScoreFunctionQuantizer
from stage1_tokenizer.quantizers.categorical import diversity_loss, gumbel_noise_like


def quantizer(decay: float = 0.9, credit: str = "image") -> ScoreFunctionQuantizer:
    return ScoreFunctionQuantizer(
        3, 2, ScoreFunctionOptions(baseline_decay=decay, credit_assignment=credit)
    ).train()  # type: ignore[arg-type]


LOGITS = torch.tensor([0.5, -0.2, 0.1])
COSTS = torch.tensor([10.0, 12.0, 15.0])


def gradients(score: ScoreFunctionQuantizer, samples: int) -> torch.Tensor:
    """(samples, 3): each image's own gradient, of one position whose code costs COSTS[code]."""
    x = LOGITS.reshape(1, 3, 1, 1).expand(samples, -1, -1, -1).clone().requires_grad_()
    result = score(x, 1.0)
    score.surrogate(COSTS[result.codes][:, None], result.log_q).backward()
    return x.grad.flatten(1) * samples  # undo the batch's mean


def test_gradient_is_unbiased():
    torch.manual_seed(0)
    x = LOGITS.clone().requires_grad_()
    (x.softmax(0) * COSTS).sum().backward()
    torch.testing.assert_close(gradients(quantizer(), 100_000).mean(0), x.grad, atol=0.03, rtol=0)


def test_the_baseline_lowers_the_variance():
    torch.manual_seed(0)
    without = quantizer()
    without.initialized.fill_(True)  # a baseline of 0
    assert (
        gradients(quantizer(), 20_000).var(0).sum() < 0.1 * gradients(without, 20_000).var(0).sum()
    )


def test_codes_are_sampled_from_the_softmax_and_log_q_is_theirs():
    torch.manual_seed(0)
    x = torch.randn(500, 3, 4, 4)
    score = quantizer()
    torch.manual_seed(1)
    result = score(x, 0.5)
    torch.manual_seed(1)
    assert torch.equal(
        result.codes, (x + gumbel_noise_like(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)).argmax(1)
    )
    by_hand = [x[7].log_softmax(0)[result.codes[7, i, j], i, j] for i in range(4) for j in range(4)]
    torch.testing.assert_close(result.log_q[7].flatten(), torch.stack(by_hand))
    hard = score.eval()(x)
    assert torch.equal(hard.codes, x.argmax(1)) and hard.log_q is None


def test_the_decoders_gradient_does_not_reach_the_logits():
    x = torch.randn(2, 3, 4, 4).requires_grad_()
    result = quantizer()(x, 1.0)
    result.latents.sum().backward()
    assert x.grad is None


def costs(*values: float) -> torch.Tensor:
    """One dimension an image."""
    return torch.tensor(values)[:, None, None, None]


def test_the_baseline_is_a_running_mean_used_before_it_moves():
    score = quantizer(decay=0.75)
    log_q = torch.zeros(2, 1, 1, requires_grad=True)
    first = score.surrogate(costs(4.0, 8.0), log_q)
    assert float(score.baseline) == 6.0 and float(first.detach()) == 0.0
    (gradient,) = torch.autograd.grad(score.surrogate(costs(9.0, 11.0), log_q), log_q)
    # Less the old baseline, 6
    torch.testing.assert_close(gradient.flatten(), torch.tensor([3.0, 5.0]) / 2)
    assert float(score.baseline) == pytest.approx(0.75 * 6 + 0.25 * 10)
    score.eval().surrogate(costs(100.0, 100.0), log_q)
    assert float(score.baseline) == pytest.approx(7.0)


def test_credit_covers_the_image_or_the_neighbourhood():
    cost = torch.zeros(1, 3, 8, 12)
    # At the codes (0,0), (3,5) and (2,2) of 4 x 6
    cost[0, :, 0, 0], cost[0, 0, 7, 11], cost[0, 1, 5, 5] = (1.0, 10.0, 100.0)
    whole, places = quantizer()._credited(cost, 4, 6)
    torch.testing.assert_close(whole, torch.full((1, 4, 6), 113.0))
    assert (places == 1).all()
    near, places = quantizer(credit="neighbourhood")._credited(cost, 4, 6)
    near = near[0]
    assert places[0].tolist() == [4, 6, 6, 6, 6, 4] and places[1].tolist() == [6, 9, 9, 9, 9, 6]
    expected = torch.zeros(4, 6)
    expected[:2, :2] += 3
    expected[2:, 4:] += 10
    expected[1:4, 1:4] += 100
    torch.testing.assert_close(near, expected)


def test_equal_costs_give_no_gradient():
    score = quantizer(credit="neighbourhood")
    log_q = torch.zeros(2, 4, 6, requires_grad=True)
    for _ in range(2):
        (gradient,) = torch.autograd.grad(
            score.surrogate(torch.full((2, 3, 8, 12), 0.5), log_q), log_q
        )
        torch.testing.assert_close(gradient, torch.zeros(2, 4, 6), atol=1e-5, rtol=0)
    assert float(score.baseline) == pytest.approx(0.5 * 3 * 4)


def test_usage_penalty_uses_sharpened_posteriors():
    """Soft posteriors whose likeliest code is always the same are even on average, and sharp ones
    are not."""
    x = torch.tensor([0.1, 0.0, 0.0]).reshape(1, 3, 1, 1).expand(2, 3, 4, 4)
    score = ScoreFunctionQuantizer(
        3, 2, ScoreFunctionOptions(diversity=0.5, inverse_temperature=100.0)
    ).train()
    rows = x.permute(0, 2, 3, 1)
    torch.testing.assert_close(
        score(x, 1.0).loss, 0.5 * diversity_loss((100 * rows).log_softmax(-1))
    )
    assert float(diversity_loss(rows.log_softmax(-1))) < 0.01 and float(score(x, 1.0).loss) > 0.5
    assert float(score.eval()(x).loss) == 0.0


def test_usage_counts_most_likely_not_sampled_codes():
    x = torch.randn(50, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    score = quantizer()
    torch.manual_seed(0)
    assert not torch.equal(score(x, 1.0).codes, x.argmax(1))
    torch.testing.assert_close(
        score.counts, torch.bincount(x.argmax(1).flatten(), minlength=3).float()
    )
