"""Likelihoods of codes and captions, and captions sampled from a captioning prior."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from stage2_prior import (
    Level,
    PriorObjective,
    PriorObjectiveConfig,
    SamplingOptions,
    caption_log_likelihood,
    code_log_likelihood,
    sample,
    sample_captions,
    score_codes,
    score_each_code,
)
from stage2_prior.order import seeded_orders
from stage2_prior.scoring import NUM_SCORED_ORDERS
from tests.helpers.priors import any_order_prior, tiny_prior

TWO = (Level(grid=(1, 1), num_codes=4), Level(grid=(2, 4), num_codes=11))


@pytest.fixture(params=["raster", "any order"])
def captioner(request):
    prior = tiny_prior() if request.param == "raster" else any_order_prior()
    prior.config.trained_image_first = True
    return prior


@pytest.mark.parametrize(
    "make", [tiny_prior, any_order_prior, lambda: tiny_prior(TWO), lambda: any_order_prior(TWO)]
)
def test_the_score_of_samples_is_the_sum_of_their_codes_log_probabilities(make, text_ids):
    prior = make()
    drawn = sample(prior, text_ids, [1, 2, 3], SamplingOptions(guidance_scale=2, temperature=0.7))
    scores = code_log_likelihood(prior, text_ids, drawn.codes, drawn.orders)
    torch.testing.assert_close(scores.sum(1), drawn.log_likelihood)
    null = code_log_likelihood(prior, prior.stream.null_caption(3), drawn.codes, drawn.orders)
    torch.testing.assert_close(null.sum(1), drawn.null_log_likelihood)


def test_scores_of_codes_compute_no_logits_of_words(prior, text_ids, codes):
    rows = []
    handle = prior.text_head.register_forward_hook(lambda _, given, __: rows.append(given[0].shape))
    code_log_likelihood(prior, text_ids, codes)
    handle.remove()
    assert [shape[1] for shape in rows] == [0]


def test_scores_are_ordered_by_image_position(text_ids, codes):
    prior = any_order_prior()
    orders = seeded_orders([1, 2, 3], 9)
    scores = code_log_likelihood(prior, text_ids, codes, orders)
    first = orders[:, :1]
    # The first code of the order knows nothing of the others
    changed = codes.scatter(1, orders[:, 1:], 0)
    torch.testing.assert_close(
        code_log_likelihood(prior, text_ids, changed, orders).gather(1, first),
        scores.gather(1, first),
    )
    assert not torch.allclose(scores, code_log_likelihood(prior, text_ids, codes))
    raster = torch.arange(9).expand(3, 9)
    torch.testing.assert_close(
        code_log_likelihood(prior, text_ids, codes),
        code_log_likelihood(prior, text_ids, codes, raster),
    )


def test_the_score_of_random_orders_is_a_lower_bound_of_their_mixture():
    """Over all 27 images of a prior with three codes of three kinds."""
    prior = any_order_prior((Level(grid=(1, 3), num_codes=3),))
    with torch.no_grad():
        for parameter in prior.image_head.parameters():
            parameter.mul_(0.3)  # so that no image has nearly all probability
    caption = torch.tensor([[1, 5, 6, 7, 2, 0]]).expand(27, -1)
    every = torch.tensor(list(itertools.product(range(3), repeat=3)))
    orders = seeded_orders(range(NUM_SCORED_ORDERS), 3)
    assert len({tuple(order) for order in orders.tolist()}) > 1
    mixture = torch.stack(
        [
            code_log_likelihood(prior, caption, every, order.expand(27, -1)).sum(1).exp()
            for order in orders
        ]
    ).mean(0)
    bound = score_codes(prior, caption, every).exp()
    assert float(mixture.sum()) == pytest.approx(1, rel=1e-4)
    assert (bound < mixture).all() and 0.5 < float(bound.sum()) < 1


def test_each_code_has_its_mean_score_over_random_orders(text_ids, codes):
    prior = any_order_prior()
    scores = torch.zeros(3, 9)
    for order in seeded_orders(range(NUM_SCORED_ORDERS), 9):
        scores += code_log_likelihood(prior, text_ids, codes, order.expand(3, -1))
    each = score_each_code(prior, text_ids, codes)
    torch.testing.assert_close(each, scores / NUM_SCORED_ORDERS)


def test_the_score_of_raster_order_is_a_distribution():
    for order in ("raster", "annealed"):
        prior = any_order_prior((Level(grid=(1, 3), num_codes=3),))
        prior.config.trained_order = order
        caption = torch.tensor([[1, 5, 6, 7, 2, 0]]).expand(27, -1)
        every = torch.tensor(list(itertools.product(range(3), repeat=3)))
        scores = score_codes(prior, caption, every)
        assert float(scores.exp().sum()) == pytest.approx(1, rel=1e-4)
        raster = code_log_likelihood(prior, caption, every, torch.arange(3).expand(27, -1)).sum(1)
        torch.testing.assert_close(scores, raster)


def test_a_caption_of_no_words_has_the_likelihood_of_its_end(captioner, codes):
    log_p = whole_pass(captioner, captioner.stream.null_caption(1), codes[:1])
    score = caption_log_likelihood(captioner, captioner.stream.null_caption(1), codes[0])
    torch.testing.assert_close(score[0], log_p[0, 0, 2])


def whole_pass(prior, text_ids, codes):
    """log p of each next text id (P,T-1,V) given one image's codes, uncached."""
    fed = prior.stream.image_first(text_ids, codes.expand(len(text_ids), -1))
    with torch.no_grad():
        return prior(
            fed.ids, fed.position_ids, targets=fed.targets, image_first=True
        ).text.log_softmax(-1)


def test_caption_scores_are_sums_over_their_words(captioner, text_ids, codes):
    scores = caption_log_likelihood(captioner, text_ids, codes[0])
    log_p = whole_pass(captioner, text_ids, codes[:1])
    # Captions of 3, 1 and 4 words, each with its end token.
    for row, words in enumerate((4, 2, 5)):
        expected = sum(log_p[row, i, text_ids[row, i + 1]] for i in range(words))
        torch.testing.assert_close(scores[row], expected)


def test_sampled_captions_report_their_likelihood(captioner, codes):
    ids, values = sample_captions(captioner, codes, [4, 5, 6])
    assert torch.equal(ids[:, 0], torch.full((3,), 1)) and (ids[:, 1:] != 1).all()
    for row in range(3):
        end = int((ids[row] == 2).nonzero()[0])
        assert (ids[row, end + 1 :] == 0).all() and (ids[row, 1:end] > 2).all()
        log_p = whole_pass(captioner, ids[row : row + 1], codes[row : row + 1])
        torch.testing.assert_close(
            values[row], sum(log_p[0, i, ids[row, i + 1]] for i in range(end))
        )
        torch.testing.assert_close(
            values[row], caption_log_likelihood(captioner, ids[row : row + 1], codes[row])[0]
        )
    alone, value = sample_captions(captioner, codes[1:2], [5])
    assert torch.equal(alone[0], ids[1])
    torch.testing.assert_close(value[0], values[1])


def test_sampled_captions_follow_the_distribution(codes):
    """Chi-square over captions of at most one word: the end token, or one of 17 words and then the
    end."""
    prior = tiny_prior()
    prior.config.trained_image_first = True
    log_p = whole_pass(prior, torch.tensor([[1, 2, 0, 0, 0, 0]]), codes[:1])[0, 0].clone()
    log_p[[0, 1]] = float("-inf")
    expected = log_p.softmax(-1)[2:] * 3000
    ids, _ = sample_captions(prior, codes[:1].expand(3000, -1), list(range(3000)))
    counts = torch.bincount(ids[:, 1], minlength=20)[2:]
    # 17 degrees of freedom: the 99.9% quantile is 40.8.
    assert float(((counts - expected) ** 2 / expected).sum()) < 40.8


def test_captioning_requires_a_captioning_prior(prior, text_ids, codes):
    with pytest.raises(ValueError, match=r"sequence\.captioning_fraction=0\.2"):
        caption_log_likelihood(prior, text_ids, codes[0])
    with pytest.raises(ValueError, match=r"sequence\.captioning_fraction=0\.2"):
        sample_captions(prior, codes, [1, 2, 3])


@pytest.mark.parametrize("share", [0.0, 0.25, 0.4])
def test_captioning_fraction_of_batches_has_codes_first(prior, text_ids, codes, share):
    objective = PriorObjective(prior, PriorObjectiveConfig(), image_first=share)
    kinds = [
        set(next(objective.losses({"text_ids": text_ids, "codes": codes}, step)).metrics)
        for step in range(20)
    ]
    assert sum(kind == {"nats_per_caption_token"} for kind in kinds) == round(20 * share)
    objective.record_training()
    assert prior.config.trained_image_first == (share > 0)


def test_the_caption_loss_is_the_mean_over_words_and_leaves_no_parameter_without_a_gradient(
    text_ids, codes
):
    prior = tiny_prior()
    objective = PriorObjective(prior, PriorObjectiveConfig(), image_first=0.99)
    loss = next(objective.losses({"text_ids": text_ids, "codes": codes}, 2))
    log_p = [whole_pass(prior, text_ids[i : i + 1], codes[i : i + 1])[0] for i in range(3)]
    words = itertools.chain.from_iterable(
        [log_p[i][j, text_ids[i, j + 1]] for j in range(n)] for i, n in enumerate((4, 2, 5))
    )
    torch.testing.assert_close(loss.value.detach(), -torch.stack(list(words)).mean())
    loss.value.backward()
    assert all(p.grad is not None for p in prior.parameters())
    metrics = objective.evaluate([{"text_ids": text_ids, "codes": codes}])
    assert metrics["nats_per_caption_token"] == pytest.approx(float(loss.value.detach()), rel=1e-5)


def test_a_caption_never_sees_what_comes_after_it(captioner, text_ids, codes):
    fed = captioner.stream.image_first(text_ids, codes)
    embedded = F.embedding(fed.ids, captioner.tables().embeddings).detach().requires_grad_()
    captioner.blocks[0].register_forward_pre_hook(lambda _, inputs: (embedded, *inputs[1:]))
    text = captioner(fed.ids, fed.position_ids, targets=fed.targets, image_first=True).text
    for word in range(5):
        (gradient,) = torch.autograd.grad(text[:, word].square().sum(), embedded, retain_graph=True)
        reach = gradient.abs().sum((0, 2)) > 0
        assert reach[: 10 + word].all() and not reach[10 + word :].any()
