"""The codebook warning: when it appears, for which level, and that its advice names an option of
the quantizer."""

from __future__ import annotations

import re
import typing

import pytest
import torch

from stage1_tokenizer import (
    GaussianOptions,
    ObjectiveConfig,
    TokenizerConfig,
    TokenizerObjective,
    VectorOptions,
)
from stage1_tokenizer.codebook_health import ALARM_AFTER, check
from stage1_tokenizer.options import OWNERS, QuantizerName
from tests.helpers.tokenizers import (
    EVERY_KIND,
    EVERY_LATENT_KIND,
    KINDS,
    LATENT_KINDS,
    objective_of,
    tiny_tokenizer,
)


def test_warning_needs_enough_steps_and_low_usage():
    config = TokenizerConfig()
    assert check(config, {"codebook_usage": 0.1}, ALARM_AFTER - 1) is None
    assert (
        check(config, {"codebook_usage": 0.5}, ALARM_AFTER) is None
        and check(config, {}, ALARM_AFTER) is None
    )
    message = check(config, {"codebook_usage": 0.1, "loss": 0.0}, ALARM_AFTER)
    assert message == (
        "only 10% of the codes are in use at step 300; raise "
        "tokenizer.model.vq.dead_code_threshold (now 0.1, 0.4 is much), lower "
        "tokenizer.train.learning_rate, or have fewer codes (tokenizer.model.num_codes is 1024)"
    )
    off = TokenizerConfig(vq=VectorOptions(dead_code_threshold=0.0))
    assert "set tokenizer.model.vq.dead_code_threshold to 0.1" in str(
        check(off, {"codebook_usage": 0.1}, ALARM_AFTER)
    )


def test_the_worst_level_is_named():
    metrics = {"codebook_usage": 0.6, "codebook_usage_level_1": 0.2, "codebook_usage_level_2": 1.0}
    config = TokenizerConfig(quantizer="hierarchical")
    assert "only 20% of the codes of level 1 are in use" in str(check(config, metrics, 1000))


@pytest.mark.parametrize("quantizer", typing.get_args(QuantizerName))
def test_advice_names_existing_options(quantizer):
    metrics = {"active_dimensions" if quantizer == "gaussian" else "codebook_usage": 0.01}
    message = str(check(TokenizerConfig(quantizer=quantizer), metrics, 1000))
    assert "tokenizer." in message
    for section, name in re.findall(r"tokenizer\.model\.(\w+)\.(\w+)", message):
        assert quantizer in OWNERS[section] and hasattr(getattr(TokenizerConfig(), section), name)


def test_training_with_a_collapsed_codebook_warns(images):
    tokenizer = tiny_tokenizer(num_codes=64, vq=VectorOptions(dead_code_threshold=0.0)).train()
    tokenizer.quantizer.initialized.fill_(True)
    with torch.no_grad():
        tokenizer.quantizer.codebook[1:] = -tokenizer.quantizer.codebook[:1]  # all but one the same
    objective = TokenizerObjective(tokenizer, ObjectiveConfig())
    (loss,) = objective.losses(images, 400)
    assert "of the codes are in use at step 400" in str(
        objective.check_health({k: float(v) for k, v in loss.metrics.items()}, 400)
    )


def test_posterior_collapse_is_reported_with_what_to_change():
    config = TokenizerConfig(quantizer="gaussian", gaussian=GaussianOptions(free_bits=0.05))
    assert check(config, {"active_dimensions": 0.0}, ALARM_AFTER - 1) is None
    assert check(config, {"active_dimensions": 0.1}, ALARM_AFTER) is None
    assert check(config, {"loss": 0.0}, ALARM_AFTER) is None
    assert check(config, {"active_dimensions": 0.02}, ALARM_AFTER) == (
        "only 2% of the latent dimensions are active at step 300 (posterior collapse: the others "
        "are the same for every image); lower tokenizer.objective.kl_weight, raise "
        "tokenizer.objective.kl_ramp_steps, or set tokenizer.model.gaussian.free_bits (now 0.05) "
        "to 0.15, which a learned prior does not allow"
    )


@EVERY_LATENT_KIND
def test_training_with_a_collapsed_posterior_warns(images, kind):
    tokenizer = tiny_tokenizer(**LATENT_KINDS[kind]).train()
    objective = TokenizerObjective(tokenizer, ObjectiveConfig())

    def warning() -> str | None:
        (loss,) = objective.losses(images, 400)
        return objective.check_health({k: float(v) for k, v in loss.metrics.items()}, 400)

    assert warning() is None
    last = [*tokenizer.encoder.parameters()][-2]
    with torch.no_grad():
        last.zero_()  # the bias is left, which is the same for all images
    assert "only 0% of the latent dimensions are active at step 400" in str(warning())
    assert objective.evaluate([images])["active_dimensions"] == 0


@EVERY_KIND
def test_usage_is_reported_per_level(kind, images):
    tokenizer = tiny_tokenizer(**KINDS[kind]).train()
    list(TokenizerObjective(tokenizer, objective_of(kind)).losses(images, 0))
    uses = tokenizer.quantizer.usage()
    assert [len(use) for use in uses] == [level.num_codes for level in tokenizer.layout]
    assert all(float(use.sum()) > 0 for use in uses)
