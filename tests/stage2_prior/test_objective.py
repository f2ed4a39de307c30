"""The two cross-entropies, their weights and what caption dropout does."""

from __future__ import annotations

import pytest
import torch

from stage2_prior import Level, PriorObjective, PriorObjectiveConfig
from tests.helpers.priors import tiny_prior


def reference(prior, text_ids, codes):
    """Nats per text token and a code, token by token."""
    ids = prior.stream.inputs(text_ids, codes[:, :-1])
    logits = prior(ids, torch.arange(ids.shape[1]))
    text, image = [], []
    targets = prior.stream.text_targets(text_ids)
    for row in range(len(ids)):
        text += [
            -logits.text[row, i].log_softmax(-1)[t]
            for i, t in enumerate(targets[row].tolist())
            if t != -100
        ]
        for i, code in enumerate(codes[row].tolist()):
            first = sum(
                level.num_codes
                for level in prior.stream.config.levels[: prior.stream.level_index()[6 + i] - 1]
            )
            past = (
                first + prior.stream.config.levels[prior.stream.level_index()[6 + i] - 1].num_codes
            )
            image.append(-logits.image[row, i, first:past].log_softmax(-1)[code])
    return torch.stack(text).mean(), torch.stack(image).mean()


@pytest.mark.parametrize(
    "levels", [None, (Level(grid=(1, 1), num_codes=4), Level(grid=(2, 4), num_codes=11))]
)
def test_losses_equal_the_token_by_token_reference(levels, text_ids):
    prior = tiny_prior(levels) if levels else tiny_prior()
    codes = torch.randint(0, 4, (3, 9), generator=torch.Generator().manual_seed(2))
    text, image = reference(prior, text_ids, codes)
    objective = PriorObjective(prior, PriorObjectiveConfig(text_weight=0.25, caption_dropout=0))
    loss = next(objective.losses({"text_ids": text_ids, "codes": codes}, 0))
    torch.testing.assert_close(loss.value, image + 0.25 * text)
    torch.testing.assert_close(loss.metrics["nats_per_code"], image.detach())
    metrics = objective.evaluate(
        [
            {"text_ids": text_ids[:1], "codes": codes[:1]},
            {"text_ids": text_ids[1:], "codes": codes[1:]},
        ]
    )
    assert metrics["nats_per_code"] == pytest.approx(float(image.detach()), rel=1e-5)
    assert metrics["nats_per_text_token"] == pytest.approx(float(text.detach()), rel=1e-5)


def test_without_a_text_loss_no_text_logits_are_computed(prior, text_ids, codes):
    sizes = []
    prior.text_head.register_forward_hook(lambda layer, given, made: sizes.append(made.shape[1]))
    batch = {"text_ids": text_ids, "codes": codes}
    gradients = []
    for weight in (0.0, 1e-12):
        prior.zero_grad()
        objective = PriorObjective(prior, PriorObjectiveConfig(text_weight=weight))
        torch.manual_seed(0)
        loss = next(objective.losses(batch, 0))
        assert ("nats_per_text_token" in loss.metrics) == (weight > 0)
        loss.value.backward()
        gradients.append({name: one.grad for name, one in prior.named_parameters()})
    assert sizes == [0, text_ids.shape[1] - 1]
    for name, gradient in gradients[0].items():  # also of the text's head: DDP needs each
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


def test_label_smoothing_mixes_in_the_uniform_cross_entropy(prior, text_ids, codes):
    batch = {"text_ids": text_ids, "codes": codes}
    ids = prior.stream.inputs(text_ids, codes[:, :-1])
    logits = prior(ids, torch.arange(14)).image
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), codes.flatten(), label_smoothing=0.2
    )
    objective = PriorObjective(
        prior, PriorObjectiveConfig(text_weight=0, caption_dropout=0, label_smoothing=0.2)
    )
    torch.testing.assert_close(next(objective.losses(batch, 0)).value, expected)


def test_caption_dropout_trains_the_null_caption_at_its_rate(prior, codes):
    seen = []
    prior.forward = lambda ids, positions, forward=prior.forward, **told: (
        seen.append(ids),
        forward(ids, positions, **told),
    )[1]
    objective = PriorObjective(prior, PriorObjectiveConfig(caption_dropout=0.3))
    text_ids = torch.tensor([[1, 5, 6, 7, 2, 0]]).repeat(1000, 1)
    torch.manual_seed(0)
    next(objective.losses({"text_ids": text_ids, "codes": codes[:1].repeat(1000, 1)}, 0))
    share = (seen[0][:, :6] == prior.stream.null_caption(1)).all(1).float().mean()
    assert 0.25 < share < 0.35
    # The caller's captions are not erased
    assert torch.equal(text_ids[:, 1], torch.full((1000,), 5))


def test_corruption_replaces_codes_that_are_read_and_none_that_is_predicted(text_ids):
    prior = tiny_prior((Level(grid=(1, 1), num_codes=4), Level(grid=(2, 4), num_codes=11)))
    passes = []
    prior.forward = lambda ids, positions, forward=prior.forward, **told: (
        passes.append((ids, forward(ids, positions, **told).image)),
        forward(ids, positions, **told),
    )[1]
    codes = torch.full((3000, 9), 3)
    batch = {"text_ids": text_ids[:1].repeat(3000, 1), "codes": codes}
    config = PriorObjectiveConfig(caption_dropout=0, text_weight=0, code_corruption=0.2)
    objective = PriorObjective(prior, config)
    torch.manual_seed(0)
    loss = next(objective.losses(batch, 0)).value
    ids, logits = passes[0]
    clean = prior.stream.inputs(batch["text_ids"], codes[:, :-1])
    assert torch.equal(ids[:, :6], clean[:, :6])
    changed = (ids != clean)[:, 6:].float()
    # Of 4 or 11 random codes one is the same again.
    assert changed[:, 0].mean() == pytest.approx(0.2 * 3 / 4, abs=0.02)
    assert changed[:, 1:].mean() == pytest.approx(0.2 * 10 / 11, abs=0.01)
    # Rates from 0 to 0.4: some images stay whole, others lose much.
    rates = changed.mean(1)
    assert (rates == 0).float().mean() > 0.27 and (rates > 0.4).float().mean() > 0.055
    first, past = prior.stream.level_edges + prior.stream.text_vocab_size
    assert (ids[:, 6:] >= first[:-1]).all() and (ids[:, 6:] < past[:-1]).all()
    expected = torch.nn.functional.cross_entropy(
        *(part.flatten(0, 1) for part in prior.stream.in_order(logits, codes, None))
    )
    torch.testing.assert_close(loss, expected)
    plain = PriorObjective(prior, PriorObjectiveConfig(caption_dropout=0, text_weight=0))
    assert objective.evaluate([batch]) == plain.evaluate([batch])


def test_a_batch_of_null_captions_has_no_text_loss(prior, codes):
    objective = PriorObjective(prior, PriorObjectiveConfig(caption_dropout=0))
    loss = next(objective.losses({"text_ids": prior.stream.null_caption(3), "codes": codes}, 0))
    assert loss.metrics["nats_per_text_token"] == 0 and loss.value.isfinite()


def test_saved_prior_records_caption_dropout(prior):
    PriorObjective(prior, PriorObjectiveConfig(caption_dropout=0)).record_training()
    assert not prior.config.trained_with_caption_dropout
    PriorObjective(prior, PriorObjectiveConfig(caption_dropout=0.1))
    assert not prior.config.trained_with_caption_dropout, (
        "a loss must not change the model that it is made of"
    )
    PriorObjective(prior, PriorObjectiveConfig(caption_dropout=0.1)).record_training()
    assert prior.config.trained_with_caption_dropout


def test_empty_evaluation_is_refused(prior):
    with pytest.raises(ValueError, match="no held-out images"):
        PriorObjective(prior, PriorObjectiveConfig()).evaluate([])
