"""Schedules and permutations by hand, and the properties of an any-order prior."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from stage2_prior import Level, OrderSchedule, PriorObjective, PriorObjectiveConfig
from stage2_prior.order import cosine_step_sizes, kept_first, seeded_orders, training_orders
from tests.helpers.priors import any_order_prior, tiny_prior

TWO = (Level(grid=(1, 1), num_codes=4), Level(grid=(2, 4), num_codes=11))


def test_annealed_orders_are_random_then_fewer_then_none():
    schedule = OrderSchedule(order="annealed", first=10, last=20)
    assert [schedule.random_share(step) for step in (0, 10, 15, 20, 99)] == [1, 1, 0.5, 0, 0]
    assert (
        OrderSchedule().random_share(0) == 0 and OrderSchedule(order="random").random_share(99) == 1
    )


def test_given_fraction_of_training_orders_is_random():
    orders = training_orders(4000, 9, 0.25, torch.device("cpu"))
    assert torch.equal(orders.sort(1).values, torch.arange(9).expand(4000, 9))
    assert 0.2 < (orders != torch.arange(9)).any(1).float().mean() < 0.3
    assert torch.equal(
        training_orders(2, 9, 0.0, torch.device("cpu")), torch.arange(9).expand(2, 9)
    )


def test_seeded_orders_depend_on_each_seed_alone():
    both = seeded_orders([3, 4], 9)
    assert torch.equal(both[1], seeded_orders([4], 9)[0]) and not torch.equal(both[0], both[1])


def test_known_codes_come_first_in_their_own_order():
    orders = torch.tensor([[4, 2, 0, 3, 1], [0, 1, 2, 3, 4]])
    known = torch.tensor([False, True, False, False, True])
    assert kept_first(orders, known).tolist() == [[4, 1, 2, 0, 3], [1, 4, 0, 2, 3]]
    rows = torch.stack([known, ~known])
    assert kept_first(orders, rows).tolist() == [[4, 1, 2, 0, 3], [0, 2, 3, 1, 4]]


@pytest.mark.parametrize(
    ("count", "steps"), [(64, 16), (64, 1), (64, 63), (9, 4), (1, 1), (5, 5), (576, 64)]
)
def test_cosine_schedule_covers_all_codes_with_few_at_first(count, steps):
    counts = cosine_step_sizes(count, steps)
    assert sum(counts) == count and len(counts) == steps and min(counts) >= 1
    assert counts[0] <= counts[-1]


def test_the_counts_of_a_small_cosine_by_hand():
    # 9 cos(pi/2 t/4) = 8.3, 6.4, 3.4, 0 are left after each step.
    assert cosine_step_sizes(9, 4) == [1, 2, 3, 3]


def test_steps_beyond_the_codes_are_refused():
    with pytest.raises(
        ValueError, match="steps is 10; it must be at least 1 and at most the 9 codes"
    ):
        cosine_step_sizes(9, 10)
    assert cosine_step_sizes(9, None) == [1] * 9


@pytest.mark.parametrize("levels", [None, TWO])
def test_logits_depend_on_no_token_that_comes_later_in_a_random_order(levels, text_ids):
    prior = any_order_prior(levels) if levels else any_order_prior()
    codes = torch.randint(0, 4, (3, 9), generator=torch.Generator().manual_seed(2))
    fed = prior.stream.text_first(text_ids, codes, seeded_orders([1, 2, 3], 9))
    embedded = F.embedding(fed.ids, prior.tables().embeddings).detach().requires_grad_()
    prior.blocks[0].register_forward_pre_hook(lambda _, inputs: (embedded, *inputs[1:]))
    logits = prior(fed.ids, fed.position_ids, targets=fed.targets)
    for place in (0, 4, 5, 9, 13):
        part = logits.text[:, place] if place < 5 else logits.image[:, place - 5]
        (gradient,) = torch.autograd.grad(part.square().sum(), embedded, retain_graph=True)
        reach = gradient.abs().sum(2) > 0
        assert reach[:, : place + 1].all() and not reach[:, place + 1 :].any()


def test_any_order_prior_requires_target_positions(text_ids, codes):
    prior = any_order_prior()
    with pytest.raises(ValueError, match="give targets"):
        prior(prior.stream.inputs(text_ids, codes[:, :-1]), torch.arange(14))


def test_logits_depend_on_the_target_position(text_ids, codes):
    prior = any_order_prior()
    fed = prior.stream.text_first(text_ids, codes, seeded_orders([1, 2, 3], 9))
    other = fed.targets.clone()
    other[:, -1] = (other[:, -1] - 6 + 1) % 9 + 6
    a, b = (
        prior(fed.ids, fed.position_ids, targets=targets).image for targets in (fed.targets, other)
    )
    torch.testing.assert_close(a[:, :-1], b[:, :-1])
    assert not torch.allclose(a[:, -1], b[:, -1])


def test_loss_in_any_order_equals_token_by_token(text_ids, codes, monkeypatch):
    prior = any_order_prior()
    orders = seeded_orders([1, 2, 3], 9)
    monkeypatch.setattr("stage2_prior.objective.training_orders", lambda *_: orders)
    objective = PriorObjective(
        prior, PriorObjectiveConfig(text_weight=0, caption_dropout=0), OrderSchedule(order="random")
    )
    value = next(objective.losses({"text_ids": text_ids, "codes": codes}, 0)).value
    fed = prior.stream.text_first(text_ids, codes, orders)
    nats = []
    for i in range(9):
        cut = slice(0, 6 + i)
        logits = prior(
            fed.ids[:, cut], fed.position_ids[:, cut], targets=fed.targets[:, cut]
        ).image[:, -1]
        nats.append(-logits.log_softmax(-1)[torch.arange(3), codes[torch.arange(3), orders[:, i]]])
    torch.testing.assert_close(value, torch.stack(nats).mean())


def test_annealing_sets_the_fraction_of_random_orders(text_ids, codes, monkeypatch):
    shares = []
    monkeypatch.setattr(
        "stage2_prior.objective.training_orders",
        lambda b, n, share, d: (shares.append(share), seeded_orders(range(b), n))[1],
    )
    objective = PriorObjective(
        any_order_prior(), PriorObjectiveConfig(), OrderSchedule(order="annealed", first=2, last=4)
    )
    for step in range(5):
        next(objective.losses({"text_ids": text_ids, "codes": codes}, step))
    assert shares == [1, 1, 1, 0.5, 0]


def test_random_orders_require_target_positions():
    with pytest.raises(
        ValueError, match="order random needs a prior whose stream has any_order=True"
    ):
        PriorObjective(tiny_prior(), PriorObjectiveConfig(), OrderSchedule(order="random"))


def test_evaluation_takes_the_same_random_orders_each_time(text_ids, codes):
    objective = PriorObjective(
        any_order_prior(), PriorObjectiveConfig(), OrderSchedule(order="random")
    )
    batches = [{"text_ids": text_ids, "codes": codes}]
    first = objective.evaluate(batches)
    assert first == objective.evaluate(batches)
    in_parts = objective.evaluate(
        [{"text_ids": text_ids[i : i + 1], "codes": codes[i : i + 1]} for i in range(3)]
    )
    assert in_parts["nats_per_code"] == pytest.approx(first["nats_per_code"], rel=1e-5)
    raster = PriorObjective(
        any_order_prior(), PriorObjectiveConfig(), OrderSchedule(order="annealed", last=1)
    ).evaluate(batches)
    assert raster["nats_per_code"] != pytest.approx(first["nats_per_code"], rel=1e-5)
