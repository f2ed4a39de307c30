"""Captions as the context of a prior over latents: what the context depends on, and that a
conditional prior learns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stage2_prior import LatentPriorConfig, LatentPriorModule, LatentPriorObjective
from stage2_prior.flows.context import CaptionContext
from tests.helpers.compiling import traced

PAD, START, END = 0, 1, 2
CAPTIONS = torch.tensor([[START, 5, 6, END, PAD], [START, 7, 6, END, PAD]])
NULL = torch.tensor([START, END, PAD, PAD, PAD])


def conditional_model(**settings: object) -> LatentPriorModule:
    torch.manual_seed(0)
    values = {"kind": "realnvp", "transforms": 2, "width": 16, "context_features": 8} | settings
    config = LatentPriorConfig(**values)  # type: ignore[arg-type]
    return LatentPriorModule(config, 2, text_vocab_size=10, text_pad_id=PAD)


def test_context_is_of_the_ids_without_padding():
    model = conditional_model()
    context = model.encode_text(CAPTIONS)
    assert context is not None and context.shape == (2, 8)
    assert not torch.equal(context[0], context[1])
    short = model.encode_text(CAPTIONS[:1, :4])
    torch.testing.assert_close(short, context[:1])
    with torch.autocast("cpu", torch.bfloat16):
        again = model.encode_text(CAPTIONS)
    assert again is not None and again.dtype == torch.float32 and torch.equal(again, context)
    with torch.no_grad():
        model.caption_context.embedding.weight[PAD] += 1  # type: ignore[union-attr]
    assert torch.equal(model.encode_text(CAPTIONS), context)


def test_an_untrained_context_differs_between_captions_as_much_as_noise_does():
    torch.manual_seed(0)
    context = CaptionContext(vocab_size=200, pad_id=0, context_features=32)
    contexts = context(torch.randint(1, 200, (64, 10)))
    assert contexts.std(0).mean() > 0.5


def test_an_unconditional_prior_ignores_captions():
    model = conditional_model(context_features=0)
    latents = torch.randn(2, 2)
    assert model.encode_text(CAPTIONS) is None and model.encode_text(None) is None
    assert torch.equal(model(latents, CAPTIONS), model.log_prob(latents))
    assert not any("caption" in name for name in model.state_dict())


def test_a_conditional_prior_needs_its_context_and_a_vocabulary():
    with pytest.raises(ValueError, match="this prior is conditional; give a context"):
        conditional_model()(torch.randn(2, 2))
    config = LatentPriorConfig(kind="maf", context_features=3)
    with pytest.raises(ValueError, match="built without a vocabulary; give a context to log_prob"):
        LatentPriorModule(config, 2).encode_text(CAPTIONS)


def test_saving_and_loading_keeps_context_and_what_was_trained(tmp_path):
    model = conditional_model(kind="maf")
    LatentPriorObjective(model, NULL, 0.1).record_training()
    model.save_pretrained(tmp_path)
    again = LatentPriorModule.from_pretrained(tmp_path)
    assert torch.equal(again.encode_text(CAPTIONS), model.encode_text(CAPTIONS))
    assert again.fingerprint == model.fingerprint
    assert again.config.trained_with_caption_dropout
    LatentPriorObjective(model, NULL, 0.0).record_training()
    assert not model.config.trained_with_caption_dropout
    assert model.fingerprint == again.fingerprint


def batch_of(step: int) -> dict[str, Tensor]:
    """Latents around 2 of the first caption, and around -2 of the second."""
    random = torch.Generator().manual_seed(step)
    which = torch.randint(2, (64,), generator=random)
    noise = 0.5 * torch.randn(64, 2, generator=random)
    return {"latents": 2.0 - 4.0 * which[:, None] + noise, "text_ids": CAPTIONS[which]}


def test_a_conditional_prior_learns_the_latents_of_each_caption():
    """And, by caption dropout, those of all captions for the empty one."""
    model = conditional_model()
    objective = LatentPriorObjective(model, NULL, 0.2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    before = objective.evaluate([batch_of(1000)])["prior_nll"]
    for step in range(150):
        (loss,) = objective.losses(batch_of(step), step)
        assert float(loss.metrics["prior_nll"]) == pytest.approx(2 * float(loss.value.detach()))
        loss.value.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert objective.evaluate([batch_of(1000)])["prior_nll"] < before - 2
    of_first = torch.full((1, 2), 2.0)
    first, second, null = (float(model(of_first, ids[None]).detach()) for ids in (*CAPTIONS, NULL))
    assert first > null > second and first > second + 5
    generator = torch.Generator().manual_seed(0)
    context = model.encode_text(CAPTIONS.repeat_interleave(100, dim=0))
    samples = model.sample(200, generator, context).view(2, 100, 2)
    torch.testing.assert_close(samples.mean((1, 2)), torch.tensor([2.0, -2.0]), atol=0.3, rtol=0)


def test_dropped_captions_become_the_empty_one():
    model = conditional_model()
    objective = LatentPriorObjective(model, NULL, 0.5)
    seen = []

    def watch(latents: Tensor, text_ids: Tensor) -> Tensor:
        seen.append(text_ids)
        return model(latents, text_ids)

    list(objective.losses(batch_of(0), 0, {"prior": watch}))  # type: ignore[dict-item]
    dropped = (seen[0] == NULL).all(1)
    assert 10 < int(dropped.sum()) < 54
    assert torch.equal(seen[0][~dropped], batch_of(0)["text_ids"][~dropped])


def test_evaluation_needs_latents():
    with pytest.raises(ValueError, match="there are no held-out images to evaluate on"):
        LatentPriorObjective(conditional_model()).evaluate([])


@pytest.mark.parametrize("kind", ["mixture", "realnvp", "maf"])
def test_compiled_loss_is_the_plain_one(kind, monkeypatch):
    graphs = traced(monkeypatch)
    objective = LatentPriorObjective(conditional_model(kind=kind))
    (plain,) = objective.losses(batch_of(0), 0)
    objective.compile()
    (compiled,) = objective.losses(batch_of(0), 0)
    assert graphs
    torch.testing.assert_close(compiled.value, plain.value)
    objective.evaluate([batch_of(1), {key: rows[:3] for key, rows in batch_of(2).items()}])
    assert len(graphs) == 1  # evaluation compiles nothing
