"""The training loop on an objective of one weight: schedules, EMA, checkpoints, resume, and what
stops it."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from pipeline.config.train import TrainConfig
from pipeline.data.readers.images import random_shift
from pipeline.data.sampler import BatchSampler
from pipeline.runtime.atomic_io import atomic_write_dir
from pipeline.training.checkpoint import (
    CheckpointState,
    State,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from pipeline.training.ema import EMA, ema_decay
from pipeline.training.optimizers import learning_rate, optimizers_for
from pipeline.training.task import Task
from pipeline.training.train_step import step_seed
from stage1_tokenizer import ObjectiveConfig, TokenizerObjective
from tests.helpers.tokenizers import AffinePrior, tiny_tokenizer
from tests.helpers.training import CONFIG, Line, fit_task, line_task, train


def _saved(
    networks: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer] | None = None
) -> CheckpointState:
    return CheckpointState(
        {group: network.state_dict() for group, network in networks.items()},
        {name: one.state_dict()["state"] for name, one in (optimizers or {}).items()},
        [],
    )


def test_an_interrupted_run_ends_with_the_same_weights(tmp_path):
    whole, metrics = train(tmp_path / "whole")
    with pytest.raises(FloatingPointError):
        train(tmp_path / "cut", Line(broken_at=5))
    assert newest_checkpoint(tmp_path / "cut" / "checkpoints").name == "step-4"
    again, metrics_again = train(tmp_path / "cut")
    for key, value in whole.network.state_dict().items():
        assert torch.equal(value, again.network.state_dict()[key]), key
    assert metrics == metrics_again


@pytest.mark.parametrize(
    "later, line",
    [(1, None), (2, "line: 2 CPU threads and 1 before; the weights differ by rounding")],
)
def test_resuming_with_another_number_of_threads_is_said(tmp_path, caplog, later, line):
    caplog.set_level(logging.INFO)
    before = torch.get_num_threads()
    with pytest.raises(FloatingPointError):
        train(tmp_path, Line(broken_at=5), threads=1)
    assert not [text for text in caplog.messages if "threads" in text]
    train(tmp_path, threads=later)
    assert [text for text in caplog.messages if "threads" in text] == ([line] if line else [])
    state = json.loads((tmp_path / "checkpoints" / "step-9" / "state.json").read_text())
    assert state["threads"] == later and torch.get_num_threads() == before


def test_a_finished_run_is_not_trained_again(tmp_path):
    first, metrics = train(tmp_path)
    second, again = train(tmp_path)
    assert all(
        torch.equal(v, second.network.state_dict()[k])
        for k, v in first.network.state_dict().items()
    )
    assert again == pytest.approx(metrics)


def test_a_loss_that_is_not_finite_stops_and_names_step_and_checkpoint(tmp_path):
    message = (
        r"line: loss, grad_norm is not finite at step 5 \(row 50, row 51, row 52, row "
        r"53\); the last good checkpoint is .*step-4"
    )
    with pytest.raises(FloatingPointError, match=message):
        train(tmp_path, Line(broken_at=5))
    with pytest.raises(FloatingPointError, match="there is no checkpoint yet"):
        train(tmp_path / "other", Line(broken_at=0))


def test_health_warning_is_repeated_only_when_it_returns(tmp_path, caplog):
    caplog.set_level(logging.INFO, "pipeline")
    said = {2: "codes are wasted", 3: "codes are wasted", 7: "codes are wasted again"}
    task = line_task(Line(), check_health=lambda scalars, step: said.get(step))
    fit_task(task, TrainConfig(**CONFIG), tmp_path, progress=True)  # type: ignore[arg-type]
    lines = [line for line in caplog.messages if line.startswith("line:")]
    assert [line for line in lines if "codes" in line] == [
        "line: codes are wasted",
        "line: codes are wasted again",
    ]
    assert re.fullmatch(
        r"line: 0\.0 minutes, [\d,]+ images/s, \d+\.\d% of it waiting for data", lines[-1]
    )


def test_nonfinite_gradient_stops_even_with_a_finite_loss(tmp_path):
    objective = Line()
    next(objective.network.parameters()).register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(FloatingPointError, match="grad_norm is not finite at step 0"):
        train(tmp_path, objective)
    assert newest_checkpoint(tmp_path / "checkpoints") is None


def test_nonfinite_step_is_never_saved(tmp_path):
    with pytest.raises(FloatingPointError):
        train(tmp_path, Line(broken_at=5), log_every=100)
    assert newest_checkpoint(tmp_path / "checkpoints").name == "step-4"


def test_save_best_exports_the_best_weights(tmp_path):
    _, last = train(tmp_path / "last", steps=12, eval_every=2, learning_rate=0.3)
    _, best = train(tmp_path / "best", steps=12, eval_every=2, learning_rate=0.3, save_best=True)
    assert best["error"] <= last["error"]
    assert newest_checkpoint(tmp_path / "best" / "best") is not None


def test_failing_evaluation_restores_the_trained_weights(tmp_path):
    """Not the EMA's, which are swapped in to be evaluated."""
    evaluated: list[torch.Tensor] = []
    objective = Line()

    def fails(batches):
        evaluated.append(objective.network[0].weight.detach().clone())
        raise RuntimeError("no")

    objective.evaluate = fails  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="no"):
        train(tmp_path / "fails", objective)  # at step 4
    train(tmp_path / "whole", save_every=4, save_total_limit=9)
    trained = load_file(tmp_path / "whole" / "checkpoints" / "step-4" / "weights.safetensors")[
        "tokenizer.0.weight"
    ]
    assert torch.equal(objective.network[0].weight, trained) and not torch.equal(
        evaluated[0], trained
    )
    assert objective.networks == {"tokenizer": objective.network}


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    train(tmp_path, save_total_limit=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-8", "step-9"]
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.pkl"))


def test_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    network = nn.Linear(2, 2)
    save_checkpoint(tmp_path, State(1), _saved({"a": network}), keep=1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.training.checkpoint.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, State(2), _saved({"a": network}), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
    assert load_checkpoint(tmp_path / "step-1", {"a": network}, {}, []).step == 1


def test_partial_checkpoint_is_ignored(tmp_path):
    save_checkpoint(tmp_path, State(1), _saved({"a": nn.Linear(2, 2)}), keep=1)
    (tmp_path / ".step-2.writing").mkdir()
    (tmp_path / "step-3").mkdir()
    assert newest_checkpoint(tmp_path).name == "step-1"


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "bundle"
    atomic_write_dir(target, lambda f: (f / "a").write_text("1"))
    with pytest.raises(RuntimeError):
        atomic_write_dir(
            target, lambda f: ((f / "b").write_text("2"), (_ for _ in ()).throw(RuntimeError))[0]
        )
    assert [p.name for p in target.iterdir()] == ["a"] and [p.name for p in tmp_path.iterdir()] == [
        "bundle"
    ]
    atomic_write_dir(target, lambda f: (f / "b").write_text("2"))
    assert [p.name for p in target.iterdir()] == ["b"] and [p.name for p in tmp_path.iterdir()] == [
        "bundle"
    ]


def test_corrupted_checkpoints_are_named(tmp_path):
    save_checkpoint(tmp_path, State(1), _saved({"a": nn.Linear(2, 2)}), keep=1)
    with pytest.raises(
        ValueError, match=r"of another configuration \(first keys that differ: \['weight'\]"
    ):
        load_checkpoint(tmp_path / "step-1", {"a": nn.Linear(3, 2)}, {}, [])
    cut = tmp_path / "step-1" / "weights.safetensors"
    cut.write_bytes(cut.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"weights\.safetensors has 156 of 160 bytes"):
        load_checkpoint(tmp_path / "step-1", {"a": nn.Linear(2, 2)}, {}, [])


def test_optimizer_moments_keep_their_parameters_memory_order(tmp_path):
    network = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    optimizer = optimizers_for("a", network, TrainConfig())["a/adamw"]
    network(torch.randn(1, 3, 5, 5)).sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path, State(1), _saved({"a": network}, {"a": optimizer}), keep=1)
    fresh = optimizers_for("a", network, TrainConfig())["a/adamw"]
    load_checkpoint(tmp_path / "step-1", {"a": network}, {"a": fresh}, [])
    moment = fresh.state[network.weight]["exp_avg"]
    assert moment.stride() == network.weight.stride() and torch.equal(
        moment, optimizer.state[network.weight]["exp_avg"]
    )


def test_ema_matches_its_formula_and_swaps_weights():
    network = nn.Linear(1, 1, bias=False)
    average = EMA({"a": network})
    start = float(network.weight.detach())
    with torch.no_grad():
        network.weight += 1
    average.update(0.75)
    assert float(average.shadow[0]) == pytest.approx(0.75 * start + 0.25 * (start + 1))
    average.swap()
    assert float(network.weight.detach()) == pytest.approx(start + 0.25) and float(
        average.shadow[0]
    ) == pytest.approx(start + 1)


def test_ema_excluded_parameters_are_copied():
    class Jumping(nn.Linear):
        def ema_excluded_parameters(self):
            return [self.weight]

    network = nn.Sequential(nn.Linear(1, 1), Jumping(1, 1))
    average = EMA({"a": network})
    start = [float(p.detach()) for p in network.parameters()]
    with torch.no_grad():
        for p in network.parameters():
            p += 1
    average.update(0.75)
    assert [float(p) for p in average.shadow] == pytest.approx(
        [s + d for s, d in zip(start, [0.25, 0.25, 1, 0.25], strict=True)]
    )


def test_learning_rate_matches_hand_computation():
    config = TrainConfig(
        steps=110, warmup_steps=10, learning_rate=1.0, min_lr_ratio=0.1, ema_decay=0.99
    )
    assert [learning_rate(s, config) for s in (0, 9, 10, 60, 110, 999)] == pytest.approx(
        [0.1, 1, 1, 0.55, 0.1, 0.1]
    )
    assert [ema_decay(s, config) for s in (0, 10, 10**6)] == pytest.approx([0.1, 0.55, 0.99])
    seeds = {step_seed(s, step, p) for s in range(3) for step in range(50) for p in range(4)}
    assert len(seeds) == 600


def test_stable_schedule_decays_over_the_last_fraction():
    config = TrainConfig(
        steps=110,
        learning_rate=1.0,
        warmup_steps=10,
        min_lr_ratio=0.1,
        schedule="wsd",
        decay_ratio=0.2,
    )
    rates = [learning_rate(step, config) for step in (0, 9, 10, 50, 87, 98, 109, 110)]
    assert rates == pytest.approx([0.1, 1, 1, 1, 1, 0.55, 0.1, 0.1])
    longer = replace(config, steps=220)
    assert [learning_rate(step, longer) for step in range(88)] == [
        learning_rate(step, config) for step in range(88)
    ]


@pytest.mark.parametrize("steps", [1, 3, 15, 110, 4300])
@pytest.mark.parametrize("decay_ratio", [0.01, 0.2, 1.0])
def test_stable_schedule_ends_at_the_least_rate_and_never_rises(steps, decay_ratio):
    config = TrainConfig(
        steps=steps,
        learning_rate=2.0,
        warmup_steps=0,
        min_lr_ratio=0.05,
        schedule="wsd",
        decay_ratio=decay_ratio,
    )
    rates = [learning_rate(step, config) for step in range(steps)]
    assert rates[-1] == 2.0 * 0.05
    assert rates == sorted(rates, reverse=True)
    decaying = sum(rate < 2.0 for rate in rates)
    assert decaying == max(round(decay_ratio * steps), 1)


class Plain(Line):
    """Without noise and without batch statistics: what parts of a batch add up to is the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 1))
        self.networks = {"tokenizer": self.network}
        self.sizes: list[int] = []

    def losses(self, batch, step, networks=None):
        self.sizes.append(len(batch))
        value = (
            ((networks or self.networks)["tokenizer"](batch) - batch.sum((1, 2, 3))[:, None])
            .square()
            .mean()
        )
        yield type(
            "Loss",
            (),
            {"group": "tokenizer", "value": value, "metrics": {"square": value.detach()}},
        )()


@pytest.mark.parametrize("parts", [2, 4])
def test_gradient_accumulation_equals_the_full_batch(tmp_path, parts, monkeypatch):
    clip, norms = Accelerator.clip_grad_norm_, []
    monkeypatch.setattr(
        Accelerator, "clip_grad_norm_", lambda *given: (norms.append(clip(*given)), norms[-1])[1]
    )
    torch.manual_seed(3)
    whole, _ = train(tmp_path / "whole", Plain())
    torch.manual_seed(3)
    accumulated, _ = train(tmp_path / "parts", Plain(), gradient_accumulation_steps=parts)
    torch.testing.assert_close(torch.stack(norms[:9]), torch.stack(norms[9:]), rtol=1e-4, atol=1e-6)
    assert whole.sizes == [4] * 9 and accumulated.sizes == [4 // parts] * 9 * parts
    for a, b in zip(whole.network.parameters(), accumulated.network.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_accumulation_steps_must_divide_the_batch(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"train\.batch_size is 4; it must be a multiple of "
        r"train\.gradient_accumulation_steps 3",
    ):
        train(tmp_path, gradient_accumulation_steps=3)
    with pytest.raises(ValueError, match=r"train\.decay_ratio is 0"):
        train(tmp_path, decay_ratio=0)


def test_weight_decay_excludes_gains_and_biases():
    groups = optimizers_for("a", nn.Linear(2, 3), TrainConfig(weight_decay=0.5))[
        "a/adamw"
    ].param_groups
    assert [(g["weight_decay"], [p.ndim for p in g["params"]]) for g in groups] == [
        (0.5, [2]),
        (0.0, [1]),
    ]


def test_epochs_show_every_row_once_across_processes():
    order = BatchSampler(10, 4, seed=3)
    seen = [int(r) for step in range(5) for r in order.rows(step)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]
    assert BatchSampler(10, 4, seed=3).rows(3).tolist() == order.rows(3).tolist()
    assert [r for p in range(2) for r in order.share(2, p, 2)] == order.rows(2).tolist()
    with pytest.raises(ValueError, match="no images to train on"):
        BatchSampler(0, 4, seed=3)


def test_batch_must_divide_by_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda _: 3))
    with pytest.raises(
        ValueError, match=r"^line\.train\.batch_size 4 does not split evenly over 3 processes"
    ):
        train(tmp_path)


def test_augmentations_are_repeatable_shifts():
    import numpy as np

    images = np.arange(2 * 6 * 6 * 3, dtype=np.uint8).reshape(2, 6, 6, 3)
    moved = random_shift(images, [4, 5], 1, 2, seed=0)
    assert (
        np.array_equal(moved, random_shift(images, [4, 5], 1, 2, seed=0))
        and moved.shape == images.shape
    )
    assert np.array_equal(moved[1], random_shift(images[1:], [5], 1, 2, seed=0)[0])
    flipped = random_shift(np.repeat(images[:1], 40, 0), list(range(40)), 1, 0, seed=0, flip=True)
    mirrored = [np.array_equal(one, images[0, :, ::-1]) for one in flipped]
    assert 10 < sum(mirrored) < 30 and all(
        m or np.array_equal(one, images[0]) for m, one in zip(mirrored, flipped, strict=True)
    )
    padded = np.pad(images[0], ((2, 2), (2, 2), (0, 0)), mode="edge")
    assert any(
        np.array_equal(moved[0], padded[y : y + 6, x : x + 6]) for y in range(5) for x in range(5)
    )


def test_muon_gets_inner_matrices_and_adamw_the_rest(tmp_path):
    from stage2_prior import Level, PriorConfig, PriorModule, StreamConfig

    stream = StreamConfig(
        text_vocab_size=9, text_length=4, levels=(Level(grid=(2, 2), num_codes=5),)
    )
    prior = PriorModule(PriorConfig(width=16, depth=2, heads=2), stream)
    optimizers = optimizers_for("prior", prior, TrainConfig(optimizer="muon"))
    inside = {id(p) for o in optimizers["prior/muon"].param_groups for p in o["params"]}
    rest = {id(p) for o in optimizers["prior/adamw"].param_groups for p in o["params"]}
    assert inside == {
        id(p) for n, p in prior.named_parameters() if n.startswith("blocks") and p.ndim == 2
    }
    assert not inside & rest and inside | rest == {id(p) for p in prior.parameters()}
    for parameter in prior.parameters():
        parameter.grad = torch.randn_like(parameter)
    for optimizer in optimizers.values():
        optimizer.step()
    save_checkpoint(tmp_path, State(1), _saved({"prior": prior}, optimizers), keep=1)
    fresh = optimizers_for("prior", prior, TrainConfig(optimizer="muon"))
    load_checkpoint(tmp_path / "step-1", {"prior": prior}, fresh, [])
    matrix = prior.blocks[0].attention.output.weight
    moment = fresh["prior/muon"].state[matrix]["momentum"]
    assert torch.equal(moment, optimizers["prior/muon"].state[matrix]["momentum"])


def test_muon_gets_kernels_but_no_codebook():
    from stage1_tokenizer import TokenizerConfig, TokenizerModule, VectorOptions

    tokenizer = TokenizerModule(
        TokenizerConfig(image_size=32, width=32, num_codes=8, vq=VectorOptions(codebook="gradient"))
    )
    optimizers = optimizers_for("tokenizer", tokenizer, TrainConfig(optimizer="muon"))
    stepped = {id(p) for o in optimizers["tokenizer/muon"].param_groups for p in o["params"]}
    kernels = {id(m.weight) for m in tokenizer.modules() if isinstance(m, torch.nn.Conv2d)}
    assert stepped == kernels and id(tokenizer.quantizer.codebook) not in stepped


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_learned_latent_prior_is_trained_and_resumed(tmp_path, optimizer):
    """With the tokenizer, by an optimizer of its own; a resumed training ends with the same
    bits."""
    prior = AffinePrior(64)
    start = prior.mean.detach().clone()
    config = TrainConfig(**{**CONFIG, "optimizer": optimizer, "steps": 4})
    fit_task(latent_prior_task(prior), config, tmp_path / "whole")
    assert not torch.equal(prior.mean, start)
    again = AffinePrior(64)
    fit_task(latent_prior_task(again), replace(config, steps=2), tmp_path / "parts")
    fit_task(latent_prior_task(AffinePrior(64)), config, tmp_path / "parts")
    whole, parts = (
        load_file(tmp_path / name / "checkpoints" / "step-4" / "weights.safetensors")
        for name in ("whole", "parts")
    )
    assert "latent_prior.prior.mean" in whole and "tokenizer.encoder.layers.1.weight" in whole
    assert whole.keys() == parts.keys()
    assert all(torch.equal(parts[name], value) for name, value in whole.items())


def latent_prior_task(prior: nn.Module) -> Task:
    """A tokenizer of Gaussian latents and its learned prior."""
    tokenizer = tiny_tokenizer(quantizer="gaussian")
    objective = TokenizerObjective(tokenizer, ObjectiveConfig(), latent_prior=prior)

    def batch(step: int) -> torch.Tensor:
        draws = torch.Generator().manual_seed(step)
        return torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8, generator=draws)

    return Task(objective, batch, lambda: [batch(99)], objective.best_metric, dict)
