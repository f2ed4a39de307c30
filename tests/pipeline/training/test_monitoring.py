"""Steps that are not finite: stopped before they do harm, or rolled back and counted. Gradient
jumps. Data wait."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from pipeline.config.train import TrainConfig
from pipeline.training import monitoring
from pipeline.training.monitoring import (
    GradNormMonitor,
    ThroughputMeter,
    all_reduce_flags,
    nonfinite_message,
)
from pipeline.training.task import Task
from stage1_tokenizer import ObjectiveConfig, TokenizerConfig, TokenizerModule, TokenizerObjective
from tests.helpers.training import Line, fit_task, line_task, train


def state(objective: Line) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in objective.network.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint but the count of steps."""
    files = ("weights", "ema", "optimizer")
    return {
        f"{file}/{key}": value
        for file in files
        for key, value in load_file(checkpoint / f"{file}.safetensors").items()
    }


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_nonfinite_step_stops_before_weights_change(tmp_path, broken):
    objective, before = Line(broken_at=5 if broken == "loss" else None), []

    def on_step(step: int) -> None:
        if step == 5:
            before.append([p.detach().clone() for p in objective.network.parameters()])
            if broken == "gradient":
                next(objective.network.parameters()).register_hook(
                    lambda gradient: gradient * math.inf
                )

    with pytest.raises(
        FloatingPointError,
        match=r"grad_norm is not finite at step 5 \(row 50, row 51, row 52, row 53\); the last "
        r"good",
    ):
        train(tmp_path, objective, on_step, log_every=100)
    assert all(
        torch.equal(a, b) for a, b in zip(before[0], objective.network.parameters(), strict=True)
    )


def test_a_skipped_step_changes_nothing_and_is_counted(tmp_path, caplog):
    objective = Line(broken_at=5)
    states: dict[int, dict[str, torch.Tensor]] = {}
    train(
        tmp_path,
        objective,
        lambda step: states.update({step: state(objective)}),
        max_nonfinite_steps=1,
        save_every=1,
        save_total_limit=9,
    )
    assert (
        same(states[5], states[6])
        and not same(states[4], states[5])
        and not same(states[6], states[7])
    )
    steps = {n: tmp_path / "checkpoints" / f"step-{n}" for n in (5, 6, 7)}
    assert same(tensors(steps[5]), tensors(steps[6])) and not same(
        tensors(steps[6]), tensors(steps[7])
    )
    assert [
        json.loads((path / "state.json").read_text())["skipped"] for path in steps.values()
    ] == [0, 1, 1]
    said = (
        "line: loss, grad_norm is not finite at step 5 (row 50, row 51, row 52, row 53); "
        "skipped, 1 of 1"
    )
    assert said in caplog.messages


def test_skip_counter_survives_resume(tmp_path):
    train(tmp_path, Line(broken_at=3), max_nonfinite_steps=2, steps=5)
    train(tmp_path, Line(broken_at=5), max_nonfinite_steps=2, steps=7)
    with pytest.raises(
        FloatingPointError, match=r"not finite at step 8 .*; 2 such steps were skipped before"
    ):
        train(tmp_path, Line(broken_at=8), max_nonfinite_steps=2)


def test_skipped_steps_and_data_wait_are_logged_and_summarised(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "pipeline")
    logged: list[dict[str, float]] = []
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: logged.append(values))
    config = TrainConfig(steps=4, batch_size=4, log_every=1, max_nonfinite_steps=1)
    fit_task(line_task(Line(broken_at=0)), config, tmp_path, progress=True)
    scalars = [values for values in logged if "line/data_wait_fraction" in values]
    assert [values["line/skipped_steps"] for values in scalars] == [1] * 4 and all(
        0 < v["line/data_wait_fraction"] <= 1 for v in scalars
    )
    assert "line/loss" not in scalars[0] and math.isfinite(scalars[1]["line/loss"])
    assert caplog.messages[-1].endswith("of it waiting for data; steps skipped as not finite: 1")


QUANTIZERS: dict[str, dict] = {
    "vq": {},
    "vq by gradient": {
        "vq": {"codebook": "gradient", "dead_code_threshold": 0.2, "dead_code_check_every": 1}
    },
    "vq from k-means": {"vq": {"kmeans_iterations": 2}},
    "residual": {"quantizer": "residual"},
    "hierarchical": {"quantizer": "hierarchical"},
    "score function": {"quantizer": "score_function"},
    "gumbel": {"quantizer": "gumbel"},
    "lfq": {"quantizer": "lfq"},
}


@pytest.mark.parametrize("where", ["features", "discriminator"])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_skipped_step_restores_buffers(tmp_path, quantizer, where):
    """Of codebooks, baselines and the discriminator, at the first step and later; and where the
    discriminator's loss alone is not finite, the tokenizer keeps still as well."""
    from pipeline.config.load import from_dict

    torch.manual_seed(0)
    small = {
        "image_size": 16,
        "downsample_factor": 4,
        "num_codes": 8,
        "code_dim": 4,
        "width": 16,
        "encoder_depth": 1,
        "decoder_depth": 1,
    }
    tokenizer = TokenizerModule(from_dict(TokenizerConfig, {**small, **QUANTIZERS[quantizer]}))
    discriminator = {"weight": 1.0, "width": 16, "layers": 1, "lecam": 0.1, "start": 0}
    objective = TokenizerObjective(
        tokenizer, from_dict(ObjectiveConfig, {"discriminator": discriminator})
    )
    step_now = [0]
    if where == "features":

        def spoil(module, given):
            return (given[0] * math.nan if step_now[0] in (0, 4) else given[0], *given[1:])

        tokenizer.quantizer.register_forward_pre_hook(spoil)
    else:

        def spoil_real_and_fake(module, given, out):
            return out * math.nan if step_now[0] in (0, 4) and len(given[0]) == 8 else out

        # Its own pass sees true and drawn images, twice as many
        objective.discriminator.register_forward_hook(spoil_real_and_fake)

    class Counted:
        networks = objective.networks
        evaluate = staticmethod(objective.evaluate)

        def losses(self, batch, step, networks=None):
            step_now[0] = step
            return objective.losses(batch, step)

    def batch(step):
        draws = torch.Generator().manual_seed(step)
        return torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8, generator=draws)

    task = Task(Counted(), batch, lambda: [batch(99)], "nll", dict)
    config = TrainConfig(
        steps=6,
        batch_size=4,
        save_every=1,
        save_total_limit=9,
        warmup_steps=0,
        max_nonfinite_steps=2,
    )
    start = {key: value.clone() for key, value in tokenizer.state_dict().items()}
    fit_task(task, config, tmp_path, label="t")
    steps = {n: tensors(tmp_path / "checkpoints" / f"step-{n}") for n in range(1, 7)}
    first = {
        key.removeprefix("weights/tokenizer."): value
        for key, value in steps[1].items()
        if key.startswith("weights/tokenizer.")
    }
    changed = [key for key in start if not torch.equal(start[key], first[key])]
    assert not changed, changed
    assert (
        same(steps[4], steps[5]) and not same(steps[3], steps[4]) and not same(steps[5], steps[6])
    )
    assert all(value.isfinite().all() for value in steps[6].values() if value.is_floating_point())


def test_nonfinite_message_names_its_sources():
    assert nonfinite_message(["loss"], [], 3) == "loss is not finite at step 3"
    assert nonfinite_message(["loss"], [f"row {i}" for i in range(10)], 3).endswith(
        "(row 0, row 1, row 2, row 3, row 4, row 5, row 6, row 7 and 2 more)"
    )


def test_only_losses_and_gradient_norms_decide_finiteness():
    device = torch.device("cpu")
    fine = {
        "loss": torch.tensor(1.0),
        "grad_norm": torch.tensor(2.0),
        "psnr": torch.tensor(math.inf),
    }
    assert all_reduce_flags(fine, 0, device, False) == (False, 0) and all_reduce_flags(
        {}, 15, device, False
    ) == (False, 15)
    for name in ("loss", "grad_norm", "discriminator_loss"):
        assert all_reduce_flags(fine | {name: torch.tensor(math.nan)}, 0, device, False) == (
            True,
            0,
        )


def test_gradient_norm_far_above_its_median_is_reported():
    alarm = GradNormMonitor().check
    norms = [1.0, 30.0, 2.0, 1.0, 3.0, 21.0, 19.0, 2.0, 100.0]
    said = [
        alarm({"discriminator_grad_norm": norm, "loss": 5.0}, step)
        for step, norm in enumerate(norms)
    ]
    # Not the second, before the usual is known; not the seventh, 9.5 times the median of six.
    assert [step for step, line in enumerate(said) if line] == [5, 8]
    assert said[5].startswith(
        "discriminator gradient norm is 21 at step 5, and 2 in the median of the last 5 logs; "
    )
    alarm = GradNormMonitor().check
    # Growth that is slow enough is none
    assert not any([alarm({"grad_norm": 1.05**step}, step) for step in range(200)])


def test_training_warns_of_a_gradient_jump(tmp_path, caplog):
    objective, factor = Line(), [1.0]
    next(objective.network.parameters()).register_hook(lambda gradient: gradient * factor[0])
    objective.on_step = lambda step: factor.__setitem__(0, 1e4 if step in (7, 8) else 1.0)
    config = TrainConfig(steps=10, batch_size=4, log_every=1)
    fit_task(line_task(objective), config, tmp_path)
    lines = [line for line in caplog.messages if "gradient norm" in line]
    assert (
        len(lines) == 1
        and lines[0].startswith("line: gradient norm is ")
        and "at step 8" in lines[0]
    )


def test_throughput_and_data_wait_fraction(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(monitoring.time, "perf_counter", lambda: now[0])
    pace = ThroughputMeter(batch_size=32)
    for waited in (6.0, 0.0, 3.0):
        now[0] += 30
        pace.step(waited)
    assert pace.metrics() == {"images_per_second": 96 / 90, "data_wait_fraction": 0.1}
    assert pace.line() == "1.5 minutes, 1 images/s, 10.0% of it waiting for data"
    pace.restart()
    now[0] += 1
    assert pace.metrics() == {"images_per_second": 0, "data_wait_fraction": 0}
