"""A prior whose text encoder reads the caption in both directions."""

from __future__ import annotations

import pytest
import torch

from stage2_prior import (
    PriorModule,
    PriorObjective,
    PriorObjectiveConfig,
    SamplingOptions,
    code_log_likelihood,
    sample,
)
from tests.helpers.priors import any_order_prior, tiny_prior

SEEDS = [7, 8, 9]


@pytest.fixture
def encoding_prior() -> PriorModule:
    return tiny_prior(text_depth=2)


def text_logits(prior: PriorModule, text_ids: torch.Tensor) -> torch.Tensor:
    fed = prior.stream.text_first(text_ids, torch.zeros(len(text_ids), 9, dtype=torch.long))
    with torch.no_grad():
        return prior(fed.ids, fed.position_ids, targets=fed.targets).text


def test_a_word_changes_what_is_read_of_those_before_it(encoding_prior, text_ids):
    other = text_ids.clone()
    other[:, 4] = 17
    for prior, changes in ((encoding_prior, True), (tiny_prior(), False)):
        first = (text_logits(prior, text_ids)[:, 0], text_logits(prior, other)[:, 0])
        assert torch.equal(*first) is not changes


def test_codes_know_no_later_code(encoding_prior, text_ids, codes):
    other = codes.clone()
    other[:, 5] = (codes[:, 5] + 1) % 11
    log_p = [code_log_likelihood(encoding_prior, text_ids, one) for one in (codes, other)]
    assert torch.equal(log_p[0][:, :5], log_p[1][:, :5])
    assert not torch.equal(log_p[0][:, 6:], log_p[1][:, 6:])


@pytest.mark.parametrize("steps", [None, 4])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_cached_sampling_equals_uncached_passes(text_ids, scale, steps):
    prior = any_order_prior(text_depth=1)
    options = SamplingOptions(guidance_scale=scale, num_inference_steps=steps)
    drawn = sample(prior, text_ids, SEEDS, options)
    log_p = code_log_likelihood(prior, text_ids, drawn.codes, drawn.orders).sum(1)
    torch.testing.assert_close(drawn.log_likelihood, log_p)
    if scale != 1:
        null = prior.stream.null_caption(3)
        log_p = code_log_likelihood(prior, null, drawn.codes, drawn.orders).sum(1)
        torch.testing.assert_close(drawn.null_log_likelihood, log_p)


def test_an_encoder_that_is_added_changes_nothing_at_first(text_ids, codes):
    prior = tiny_prior()
    torch.manual_seed(3)
    config = tiny_prior(text_depth=2).model_config
    added = PriorModule(config, prior.stream.config).eval()
    added.load_pretrained(prior)
    expected = code_log_likelihood(prior, text_ids, codes)
    torch.testing.assert_close(code_log_likelihood(added, text_ids, codes), expected)
    with pytest.raises(ValueError, match=r"another architecture .*text_encoder"):
        prior.load_pretrained(added)


def test_it_is_saved_trained_and_sharded_with_the_blocks(encoding_prior, text_ids, codes, tmp_path):
    encoding_prior.save_pretrained(tmp_path)
    loaded = PriorModule.from_pretrained(tmp_path)
    expected = code_log_likelihood(encoding_prior, text_ids, codes)
    assert torch.equal(code_log_likelihood(loaded, text_ids, codes), expected)
    matrices = {id(matrix) for matrix in encoding_prior.hidden_matrices()}
    assert {id(block.feed_forward.down.weight) for block in encoding_prior.text_encoder} < matrices
    assert encoding_prior.shard_units()[:2] == list(encoding_prior.text_encoder)
    objective = PriorObjective(encoding_prior, PriorObjectiveConfig(text_weight=0))
    batch = {"text_ids": text_ids, "codes": codes}
    assert objective.evaluate([batch]).keys() == {"nats_per_code"}
    next(iter(objective.losses(batch, 0))).value.backward()
    gradient = encoding_prior.text_encoder[0].attention.query_key_value.weight.grad
    assert gradient is not None and gradient.abs().sum() > 0


def test_text_alone_in_part_or_after_the_codes_is_refused(encoding_prior, text_ids, codes):
    stream = encoding_prior.stream
    ids = stream.inputs(text_ids, codes[:, :-1])
    positions = torch.arange(ids.shape[1])
    with pytest.raises(ValueError, match="reads a caption as a whole and before the codes"):
        encoding_prior(ids[:, :3], positions[:3], encoding_prior.new_cache(3))
    with pytest.raises(ValueError, match="reads a caption as a whole and before the codes"):
        encoding_prior(ids, positions, image_first=True)
    for config, image_first in (
        (PriorObjectiveConfig(), 0.0),
        (PriorObjectiveConfig(text_weight=0), 0.2),
    ):
        with pytest.raises(ValueError, match="a prior with a text encoder models no text"):
            PriorObjective(encoding_prior, config, image_first=image_first)
