"""The losses of stage 1: terms and their units, schedules, validation metrics."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from stage1_tokenizer import (
    BinaryOptions,
    FsqOptions,
    GaussianOptions,
    GumbelOptions,
    ObjectiveConfig,
    ScoreFunctionOptions,
    TokenizerModule,
    TokenizerObjective,
    count_codes,
    distinct_codes,
    statistics_by_level,
    to_model_range,
    to_uint8,
)
from stage1_tokenizer.metrics import peak_signal_to_noise
from stage1_tokenizer.objective import falling_cosine, kl_weight, temperature
from stage1_tokenizer.quantizers.smoothing import Smoothing
from stage1_tokenizer.quantizers.vector import l2_normalize
from tests.helpers.tokenizers import (
    ALL_KINDS,
    EVERY_LATENT_KIND,
    EVERY_TOKENIZER,
    KINDS,
    LATENT_KINDS,
    objective_of,
    tiny_tokenizer,
)

DIMENSIONS = 16 * 16 * 3
COMMON = {
    "psnr",
    "nll",
    "distortion_bits_per_dimension",
    "codebook_usage",
    "codebook_perplexity",
    "dead_codes",
    "distinct_codes",
    "reencode_agreement",
}


def test_schedules_start_and_end_where_they_say_and_stay_there():
    config = ObjectiveConfig(
        kl_weight=2.0,
        kl_ramp_steps=10,
        temperature_start=1.0,
        temperature_end=0.25,
        temperature_steps=20,
    )
    assert [kl_weight(s, config) for s in (0, 5, 10, 99)] == pytest.approx([0, 1, 2, 2])
    assert [temperature(s, config) for s in (0, 10, 20, 99)] == pytest.approx(
        [1, 0.625, 0.25, 0.25]
    )
    falling = [temperature(s, config) for s in range(25)]
    assert falling == sorted(falling, reverse=True)


def test_schedules_do_not_compound():
    config = ObjectiveConfig()
    once = temperature(700, config)
    for _ in range(5):
        temperature(500, config)
    assert temperature(700, config) == once


def test_a_schedule_of_no_steps_is_at_its_end():
    assert falling_cosine(0, 0, 3.0, 1.0) == 1.0


def test_psnr_by_hand():
    """An error of 0.2 in a range of 2: 20 dB; images outside the range are cut first; identical
    ones stay finite."""
    pixels = torch.zeros(2, 3, 4, 4)
    torch.testing.assert_close(peak_signal_to_noise(pixels, pixels + 0.2), torch.full((2,), 20.0))
    torch.testing.assert_close(
        peak_signal_to_noise(pixels + 1, pixels + 7), torch.full((2,), 100 + 10 * math.log10(4))
    )
    mixed = torch.cat([pixels[:1] + 0.2, pixels[:1] + 0.02])
    torch.testing.assert_close(peak_signal_to_noise(pixels, mixed), torch.tensor([20.0, 40.0]))


def test_vq_loss_is_nll_per_dimension_plus_quantizer_losses(images):
    tokenizer = tiny_tokenizer().train()
    (loss,) = TokenizerObjective(tokenizer, ObjectiveConfig()).losses(images, 0)
    commitment = 0.25 * loss.metrics["commitment"]
    torch.testing.assert_close(loss.value.detach(), loss.metrics["nll"] / DIMENSIONS + commitment)
    assert loss.group == "tokenizer" and loss.value.requires_grad
    wanted = {"nll", "psnr", "commitment", "codebook_usage", "codebook_perplexity", "dead_codes"}
    assert set(loss.metrics) == wanted and not any(m.requires_grad for m in loss.metrics.values())


def test_encoding_again_adds_the_codes_nll_and_a_gradient_to_the_encoder_alone(images):
    without, with_it = (
        next(TokenizerObjective(tiny_tokenizer().train(), config).losses(images, 0))
        for config in (ObjectiveConfig(), ObjectiveConfig(reencoding_weight=2.0))
    )
    again = with_it.metrics["reencoding_nll"]
    torch.testing.assert_close(with_it.value, without.value + 2 * again)
    tokenizer = tiny_tokenizer().train()
    output = tokenizer(to_model_range(images), reencode=True)
    assert output.reencoding is not None
    output.reencoding.backward()
    moved = {name for name, p in tokenizer.named_parameters() if p.grad is not None}
    assert moved and all(name.startswith("encoder.") for name in moved)
    # By hand: the decoded image in 8 bits, encoded, and the distances of its vectors to all codes.
    image = to_uint8(tokenizer.likelihood.image(output.parameters)).permute(0, 3, 1, 2) / 127.5 - 1
    vectors = l2_normalize(tokenizer.encoder(image).permute(0, 2, 3, 1).flatten(0, 2))
    table = tokenizer.quantizer.vectors()
    distances = (vectors[:, None] - table).square().sum(2)
    logits = -distances / table.var(0, correction=0).mean()
    log_p = logits.log_softmax(1).gather(1, output.quantized.codes.view(-1, 1))
    torch.testing.assert_close(output.reencoding, -log_p.mean(), rtol=1e-3, atol=1e-4)


def test_a_loss_of_encoding_again_keeps_more_codes():
    """What it is for: after as many steps, more codes survive decoding and encoding."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (32, 16, 16, 3), generator=generator, dtype=torch.uint8)
    agreements = []
    for weight in (0.0, 1.0):
        tokenizer = tiny_tokenizer().train()
        objective = TokenizerObjective(tokenizer, ObjectiveConfig(reencoding_weight=weight))
        optimizer = torch.optim.Adam(tokenizer.parameters(), 3e-3)
        for step in range(60):
            optimizer.zero_grad()
            next(objective.losses(images, step)).value.backward()
            optimizer.step()
        agreements.append(objective.evaluate([images])["reencode_agreement"])
    assert agreements[1] > agreements[0] + 0.05


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"likelihood": "calibrated_l2"},
        {"likelihood": "learned_l2"},
        {"likelihood": "logit_laplace"},
        {"likelihood": "discretized_logistic", "likelihood_mixtures": 2},
    ],
    ids=lambda changes: changes.get("likelihood", "l2"),
)
def test_the_reported_nll_is_the_exact_one_of_the_whole_image(images, changes):
    """The sum over all dimensions of what the table gives for each value, and the side information:
    that of an image decoded from its codes and the file of an entropy coder."""
    tokenizer = tiny_tokenizer(**changes)
    metrics = TokenizerObjective(tokenizer, ObjectiveConfig()).evaluate([images])
    pixels = to_model_range(images)
    values = images.permute(0, 3, 1, 2).long()
    likelihood = tokenizer.likelihood
    with torch.no_grad():
        outputs = tokenizer.eval()(pixels).parameters
    known = likelihood.given(likelihood.side_information(values, outputs))
    table = known.log_probabilities(outputs, values).gather(-1, values.unsqueeze(-1))
    nats = likelihood.side_nats - table.flatten(1).sum(1)
    assert metrics["nll"] == pytest.approx(float(nats.mean()), rel=1e-9)
    assert metrics["distortion_bits_per_dimension"] == pytest.approx(
        float(nats.mean()) / (DIMENSIONS * math.log(2))
    )


def test_bernoulli_has_bits_per_dimension_of_black_and_white_alone(images):
    tokenizer = tiny_tokenizer(likelihood="bernoulli")
    objective = TokenizerObjective(tokenizer, ObjectiveConfig())
    black_and_white = (images > 127).to(torch.uint8) * 255
    exact = objective.evaluate([black_and_white])
    bits = exact["distortion_bits_per_dimension"]
    assert bits == pytest.approx(exact["nll"] / DIMENSIONS / math.log(2))
    grey = objective.evaluate([black_and_white, images])
    assert "distortion_bits_per_dimension" not in grey and math.isfinite(grey["nll"])


@pytest.mark.parametrize(("step", "weight"), [(0, 0.0), (50, 1.5), (100, 3.0), (500, 3.0)])
def test_gumbel_kl_weight_is_ramped(images, step, weight):
    tokenizer = tiny_tokenizer(quantizer="gumbel", gumbel=GumbelOptions(diversity=0.0)).train()
    objective = TokenizerObjective(
        tokenizer, ObjectiveConfig(kl_weight=3.0, kl_ramp_steps=100, temperature_steps=10)
    )
    (loss,) = objective.losses(images, step)
    expected = (loss.metrics["nll"] + weight * loss.metrics["kl"]) / DIMENSIONS
    torch.testing.assert_close(loss.value.detach(), expected)
    assert float(loss.metrics["kl"]) <= 16 * math.log(12)
    assert float(loss.metrics["temperature"]) == pytest.approx(temperature(step, objective.config))


@pytest.mark.parametrize(("step", "weight"), [(0, 0.0), (50, 1.5), (100, 3.0), (500, 3.0)])
def test_gaussian_kl_weight_warms_up(images, step, weight):
    tokenizer = tiny_tokenizer(quantizer="gaussian").train()
    objective = TokenizerObjective(tokenizer, ObjectiveConfig(kl_weight=3.0, kl_ramp_steps=100))
    (loss,) = objective.losses(images, step)
    expected = (loss.metrics["nll"] + weight * loss.metrics["kl"]) / DIMENSIONS
    torch.testing.assert_close(loss.value.detach(), expected)
    assert set(loss.metrics) == {"nll", "psnr", "kl", "active_dimensions"}
    analytic = tokenizer.posterior(to_model_range(images)).kl_to_standard().mean()
    torch.testing.assert_close(loss.metrics["kl"], analytic)


def test_gaussian_latents_are_sampled_in_training_and_the_mean_otherwise(images):
    tokenizer = tiny_tokenizer(quantizer="gaussian").train()
    pixels = to_model_range(images)
    objective = TokenizerObjective(tokenizer, ObjectiveConfig())
    nll = []
    for _ in range(2):
        torch.manual_seed(3)
        (loss,) = objective.losses(images, 0)
        nll.append(float(loss.metrics["nll"]))
    assert nll[0] == nll[1]
    torch.manual_seed(4)
    (loss,) = objective.losses(images, 0)
    assert float(loss.metrics["nll"]) != nll[0]
    assert torch.equal(tokenizer(pixels).parameters, tokenizer(pixels).parameters)


def test_score_function_adds_gradient_but_no_loss(images):
    tokenizer = tiny_tokenizer(
        quantizer="score_function",
        score_function=ScoreFunctionOptions(diversity=0.0, credit_assignment="image"),
    ).train()
    objective = TokenizerObjective(tokenizer, ObjectiveConfig(kl_weight=0.0))
    (loss,) = objective.losses(images, 0)
    torch.testing.assert_close(loss.value.detach(), loss.metrics["nll"] / DIMENSIONS)
    assert float(tokenizer.quantizer.baseline) == pytest.approx(float(loss.metrics["nll"]))
    loss.value.backward()
    assert all(p.grad.any() for p in tokenizer.encoder.parameters())


def test_metrics_are_named_per_level(images):
    tokenizer = tiny_tokenizer(**KINDS["hierarchical"])
    objective = TokenizerObjective(tokenizer, ObjectiveConfig())
    metrics = objective.evaluate([images])
    codes = tokenizer.encode(to_model_range(images))
    used = [codes[:, :4].unique().numel(), codes[:, 4:].unique().numel()]
    assert [metrics["codebook_usage_level_1"], metrics["codebook_usage_level_2"]] == pytest.approx(
        [used[0] / 12, used[1] / 12]
    )
    assert metrics["codebook_usage"] == pytest.approx(sum(used) / 24) and metrics[
        "dead_codes"
    ] == 24 - sum(used)
    (loss,) = TokenizerObjective(tokenizer.train(), ObjectiveConfig()).losses(images, 0)
    levels = [float(loss.metrics[f"commitment_level_{i}"]) for i in (1, 2)]
    assert float(loss.metrics["commitment"]) == pytest.approx(sum(levels) / 2)


@pytest.mark.parametrize("kind", ["vq", "residual", "hierarchical", "hierarchical of three"])
def test_training_and_evaluation_agree_on_the_use_of_the_same_codes(images, kind):
    tokenizer = tiny_tokenizer(**KINDS[kind]).train()
    trained = tokenizer(to_model_range(images)).quantized
    counts = count_codes(trained.codes, tokenizer.layout)
    found = statistics_by_level(counts, tokenizer.layout)
    assert len(found) == {"vq": 1, "residual": 4, "hierarchical": 3}.get(kind, 4)
    for name, statistics in found.items():
        assert float(trained.metrics[f"codebook_usage{name}"]) == pytest.approx(statistics.usage)
        assert float(trained.metrics[f"codebook_perplexity{name}"]) == pytest.approx(
            statistics.perplexity
        )
        assert int(trained.metrics[f"dead_codes{name}"]) == statistics.dead


@EVERY_TOKENIZER
def test_losses_call_the_wrapped_networks(images, kind):
    """DDP averages gradients of what passes through its own forward only."""

    class Wrapper(torch.nn.Module):
        def __init__(self, module: TokenizerModule) -> None:
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, *args, **kwargs):
            self.calls += 1
            return self.module(*args, **kwargs)

    tokenizer = tiny_tokenizer(**ALL_KINDS[kind]).train()
    objective = TokenizerObjective(tokenizer, objective_of(kind))
    objective.networks["tokenizer"] = wrapper = Wrapper(tokenizer)
    list(objective.losses(images, 0))
    assert wrapper.calls == 1


@pytest.mark.parametrize("quantizer", ["vq", "gumbel"])
def test_validation_metrics_are_complete_and_independent_of_batches(images, quantizer):
    tokenizer = tiny_tokenizer(quantizer=quantizer)
    objective = TokenizerObjective(tokenizer, ObjectiveConfig())
    before = tokenizer.fingerprint
    metrics = objective.evaluate([images])
    assert set(metrics) == COMMON | (
        {"relaxed_psnr", "relaxed_gap"} if quantizer == "gumbel" else set()
    )
    assert all(type(v) is float and math.isfinite(v) for v in metrics.values())
    assert tokenizer.fingerprint == before
    parts = objective.evaluate([images[:2], images[2:3], images[3:]])
    assert {k: parts[k] for k in COMMON} == pytest.approx({k: metrics[k] for k in COMMON}, rel=1e-5)


def test_validation_code_usage_is_exact(tokenizer, images):
    metrics = TokenizerObjective(tokenizer, ObjectiveConfig()).evaluate([images])
    used = tokenizer.encode(to_model_range(images)).unique().numel()
    assert (
        metrics["codebook_usage"] == pytest.approx(used / 12) and metrics["dead_codes"] == 12 - used
    )


@pytest.mark.parametrize("kind", ["vq", "gumbel", "residual"])
def test_validation_counts_distinct_codes_and_codes_that_an_image_keeps(images, kind):
    tokenizer = tiny_tokenizer(**KINDS[kind])
    metrics = TokenizerObjective(tokenizer, objective_of(kind)).evaluate([images[:4], images[4:]])
    codes = tokenizer.encode(to_model_range(images))
    kept = tokenizer.to_codes(tokenizer.to_images(codes)) == codes
    assert 0 < metrics["reencode_agreement"] < 1
    assert metrics["reencode_agreement"] == pytest.approx(float(kept.float().mean()))
    distinct = distinct_codes(tokenizer, count_codes(codes, tokenizer.layout))
    for level, number in distinct.items():
        assert metrics[f"distinct_codes{level}"] == number
        assert f"reencode_agreement{level}" in metrics


@EVERY_LATENT_KIND
def test_validation_of_gaussian_latents_is_the_elbo_at_one_sample(images, kind):
    tokenizer = tiny_tokenizer(**LATENT_KINDS[kind])
    objective = TokenizerObjective(tokenizer, ObjectiveConfig(kl_weight=2.0))
    metrics = objective.evaluate([images])
    assert set(metrics) == {
        "psnr",
        "nll",
        "kl",
        "elbo",
        "bits_per_dimension",
        "distortion_bits_per_dimension",
        "rate_bits_per_dimension",
        "loss",
        "active_dimensions",
    }
    assert all(type(v) is float and math.isfinite(v) for v in metrics.values())
    assert metrics["elbo"] == -(metrics["nll"] + metrics["kl"])
    assert metrics["bits_per_dimension"] == pytest.approx(
        -metrics["elbo"] / DIMENSIONS / math.log(2)
    )
    for part, nats in (("distortion", "nll"), ("rate", "kl")):
        bits = metrics[f"{part}_bits_per_dimension"]
        assert bits == pytest.approx(metrics[nats] / DIMENSIONS / math.log(2))
    assert metrics["loss"] == pytest.approx((metrics["nll"] + 2 * metrics["kl"]) / DIMENSIONS)
    pixels = to_model_range(images)
    posterior = tokenizer.posterior(pixels)
    assert metrics["kl"] == pytest.approx(float(posterior.kl_to_standard().mean()))
    z = posterior.sample(torch.Generator().manual_seed(0))
    values = images.permute(0, 3, 1, 2)
    nll = tokenizer.likelihood.exact_nll(values, tokenizer.latent_parameters(z)).mean()
    assert metrics["nll"] == pytest.approx(float(nll.detach()), rel=1e-5)
    psnr = peak_signal_to_noise(pixels, tokenizer.reconstruct(pixels)).mean()
    assert metrics["psnr"] == pytest.approx(float(psnr), rel=1e-5)


@pytest.mark.parametrize("likelihood", ["l2", "logit_laplace"])
@EVERY_LATENT_KIND
def test_validation_of_gaussian_latents_does_not_depend_on_batches(images, kind, likelihood):
    tokenizer = tiny_tokenizer(**LATENT_KINDS[kind], likelihood=likelihood)
    objective = TokenizerObjective(tokenizer, ObjectiveConfig())
    whole = objective.evaluate([images])
    assert tokenizer.training
    assert objective.evaluate([images[:2], images[2:3], images[3:]]) == pytest.approx(
        whole, rel=1e-5
    )
    one = objective.evaluate([images[:1]])
    assert "active_dimensions" not in one and one["kl"] > 0


def test_empty_validation_of_gaussian_latents_is_refused():
    with pytest.raises(ValueError, match=r"no held-out images to evaluate on; raise data"):
        TokenizerObjective(tiny_tokenizer(quantizer="gaussian"), ObjectiveConfig()).evaluate([])


def test_the_best_weights_are_chosen_with_the_kl():
    """During the warm-up, latents without noise have the best likelihood."""
    names = {
        quantizer: TokenizerObjective(
            tiny_tokenizer(quantizer=quantizer), ObjectiveConfig()
        ).best_metric
        for quantizer in ("vq", "gaussian")
    }
    assert names == {"vq": "nll", "gaussian": "loss"}


def test_gumbel_gap_is_relaxed_minus_hard(images):
    tokenizer = tiny_tokenizer(quantizer="gumbel")
    metrics = TokenizerObjective(tokenizer, ObjectiveConfig(temperature_end=5.0)).evaluate([images])
    assert (
        metrics["relaxed_gap"] == pytest.approx(metrics["relaxed_psnr"] - metrics["psnr"])
        and metrics["relaxed_gap"] != 0
    )


def test_evaluation_keeps_no_graph_and_training_continues(images):
    tokenizer = tiny_tokenizer().train()
    objective = TokenizerObjective(tokenizer, ObjectiveConfig())
    counts = tokenizer.quantizer.counts.clone()
    objective.evaluate([images])
    assert tokenizer.training and torch.equal(tokenizer.quantizer.counts, counts)
    assert all(p.grad is None for p in tokenizer.parameters())


def test_empty_validation_is_refused(tokenizer):
    with pytest.raises(
        ValueError, match=r"no held-out images to evaluate on; raise data\.val_fraction"
    ):
        TokenizerObjective(tokenizer, ObjectiveConfig()).evaluate([])


def blobs(count: int, generator: torch.Generator) -> torch.Tensor:
    """uint8 (N,16,16,3): a flat square on a flat ground."""
    images = (
        torch.randint(0, 256, (count, 1, 1, 3), generator=generator).expand(-1, 16, 16, -1).clone()
    )
    for image in images:
        row, column = torch.randint(0, 9, (2,), generator=generator).tolist()
        image[row : row + 8, column : column + 8] = torch.randint(0, 256, (3,), generator=generator)
    return images.to(torch.uint8)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("changes", "gain"),
    [
        ({}, 4.0),
        ({"likelihood": "calibrated_l2"}, 4.0),
        ({"likelihood": "l1"}, 4.0),
        ({"likelihood": "logit_laplace"}, 3.0),
        ({"likelihood": "learned_l2"}, 3.0),
        ({"likelihood": "discretized_logistic", "likelihood_mixtures": 3}, 3.0),
        ({"quantizer": "gumbel"}, 2.0),
        ({"quantizer": "residual"}, 4.0),
        ({"quantizer": "hierarchical"}, 3.0),
        ({"quantizer": "lfq"}, 3.0),
        ({"quantizer": "bsq"}, 3.0),
        ({"quantizer": "fsq", "fsq": FsqOptions(levels=(4, 4, 4))}, 4.0),
        ({"quantizer": "binary"}, 3.0),
        ({"quantizer": "gaussian"}, 4.0),
        ({"quantizer": "gaussian", "gaussian": GaussianOptions(latents="vector")}, 3.0),
    ],
    ids=[
        "vq l2",
        "vq calibrated l2",
        "vq l1",
        "vq logit_laplace",
        "vq learned l2",
        "vq discretized logistic",
        "gumbel",
        "residual",
        "hierarchical",
        "lfq",
        "bsq",
        "fsq",
        "binary",
        "gaussian",
        "gaussian vector",
    ],
)
def test_a_short_training_raises_the_held_out_psnr(changes, gain, bf16):
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(num_codes=64, **changes).train()
    objective = TokenizerObjective(
        tokenizer,
        ObjectiveConfig(
            temperature_start=0.5, temperature_steps=60, kl_ramp_steps=60, kl_weight=0.1
        ),
    )
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    held_out = [blobs(32, generator)]
    before = objective.evaluate(held_out)["psnr"]
    for step in range(60):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            (loss,) = objective.losses(blobs(16, generator), step)
        assert loss.value.isfinite() and loss.value.dtype == torch.float32
        loss.value.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert objective.evaluate(held_out)["psnr"] > before + gain


@pytest.mark.parametrize("smoothing", get_args(Smoothing))
def test_a_few_steps_with_every_smoothing_raise_the_psnr(smoothing):
    """Without KL and diversity, the encoder's gradient is that of the smoothing alone."""
    options = BinaryOptions(smoothing=smoothing, diversity=0)
    tokenizer = tiny_tokenizer(num_codes=64, quantizer="binary", binary=options).train()
    objective = TokenizerObjective(
        tokenizer,
        ObjectiveConfig(
            kl_weight=0, temperature_start=0.2, temperature_end=0.1, temperature_steps=10
        ),
    )
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=2e-3)
    batch = blobs(8, torch.Generator().manual_seed(0))
    psnr = []
    for step in range(8):
        (loss,) = objective.losses(batch, step)
        optimizer.zero_grad()
        loss.value.backward()
        gradients = [p.grad for p in tokenizer.encoder.parameters()]
        assert all(g is not None and g.isfinite().all() and g.any() for g in gradients)
        optimizer.step()
        psnr.append(float(loss.metrics["psnr"]))
    assert psnr[-1] > psnr[0] + 1
