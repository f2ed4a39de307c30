"""Estimated memory of training: counted state, activations measured in small steps without a
trace, automatic batch sizes."""

from __future__ import annotations

import json
import logging
import re
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from pipeline.cli.main import main
from pipeline.config.load import load_experiment
from pipeline.config.train import PriorTrainConfig, TrainConfig
from pipeline.runtime.devices import format_bytes
from pipeline.stages.estimate import estimate
from pipeline.training import auto_batch, memory_estimate
from pipeline.training.auto_batch import batch_candidates, choose, resolve_auto_batch
from pipeline.training.batch import tile_rows
from pipeline.training.memory_estimate import (
    LinearMemoryModel,
    LiveTensorTracker,
    Probe,
    estimate_memory,
    fit_memory_model,
    state_bytes,
)
from pipeline.training.optimizers import optimizers_for
from pipeline.training.simulated_tensors import simulate_tensors
from pipeline.training.snapshot import preserve_state
from stage1_tokenizer import (
    ObjectiveConfig,
    TokenizerConfig,
    TokenizerModule,
    TokenizerObjective,
    VectorOptions,
)
from stage2_prior import (
    Level,
    PriorConfig,
    PriorModule,
    PriorObjective,
    PriorObjectiveConfig,
    StreamConfig,
)
from tests.helpers.cli import fails

CPU = torch.device("cpu")
STREAM = StreamConfig(
    text_vocab_size=300, text_length=12, levels=(Level(grid=(8, 8), num_codes=64),), code_dim=4
)
eager = partial(torch.autocast, "cpu", torch.bfloat16, enabled=False)


def prior(**how: object) -> PriorObjective:
    torch.manual_seed(0)
    return PriorObjective(
        PriorModule(PriorConfig(width=32, depth=2, heads=2), STREAM).train(),
        PriorObjectiveConfig(**how),
    )


def probe(objective: PriorObjective | TokenizerObjective, step: int = 9) -> Probe:
    return Probe(objective, step, eager, CPU)


def pairs(count: int) -> dict[str, torch.Tensor]:
    return {
        "text_ids": torch.randint(3, 300, (count, 12)),
        "codes": torch.randint(0, 64, (count, 64)),
    }


def tokenizer(num_codes: int = 16, **vq: object) -> TokenizerObjective:
    torch.manual_seed(0)
    sizes = {
        "image_size": 32,
        "downsample_factor": 8,
        "width": 32,
        "encoder_depth": 1,
        "decoder_depth": 1,
        "code_dim": 4,
    }
    model = TokenizerConfig(num_codes=num_codes, vq=VectorOptions(**vq), **sizes)
    return TokenizerObjective(TokenizerModule(model).train(), ObjectiveConfig())


def images(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("objective", [prior, tokenizer])
def test_estimated_state_equals_that_of_training(objective, optimizer):
    made, config = objective(), TrainConfig(optimizer=optimizer)
    group, network = next(iter(made.networks.items()))
    optimizers = optimizers_for(group, network, config)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for one in optimizers.values():
        one.step()
    held = [
        v
        for one in optimizers.values()
        for state in one.state.values()
        for v in state.values()
        if v.numel() > 1
    ]
    counted = state_bytes(made.networks, config)
    # But for moments of single numbers
    assert counted.optimizer == pytest.approx(sum(v.nbytes for v in held), rel=0.01)
    assert counted.parameters == sum(t.nbytes for t in network.state_dict().values())
    assert counted.gradients == counted.average == sum(p.nbytes for p in network.parameters())
    assert counted.entries == sum(p.numel() for p in network.parameters())


def test_meta_device_gives_the_same_estimate():
    with torch.device("meta"):
        weightless = PriorModule(PriorConfig(width=32, depth=2, heads=2), STREAM)
    for config in (PriorTrainConfig(), PriorTrainConfig(optimizer="muon")):
        assert state_bytes({"prior": weightless}, config) == state_bytes(prior().networks, config)


def test_tracker_counts_live_tensors():
    before = torch.zeros(1000)
    with LiveTensorTracker(CPU) as live:
        first = before + 1
        view = first[:10]
        del first
        assert live.now == 4000  # the view keeps it
        del view
        assert live.now == 0
        before.add_(1)  # was there before
    assert live.now == 0 and live.peak == 4000


def test_tracker_counts_a_tensor_at_the_address_of_a_freed_one():
    with LiveTensorTracker(CPU) as live:
        for _ in range(50):
            outside = torch.from_numpy(np.zeros(1000, np.float32))  # no operation makes it
            outside.add_(1)
            del outside
            inside = torch.zeros(1000)
            assert live.now == 4000
            del inside


@pytest.mark.parametrize(("objective", "batch"), [(prior, pairs), (tokenizer, images)])
def test_linear_model_predicts_larger_batches_and_restores_state(objective, batch):
    made = objective()
    network = next(iter(made.networks.values()))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    addresses = [p.data_ptr() for p in network.parameters()]
    grown = fit_memory_model(probe(made), batch, most=64)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert [p.data_ptr() for p in network.parameters()] == addresses and all(
        p.grad is None for p in network.parameters()
    )
    with preserve_state([network]), LiveTensorTracker(CPU) as live:
        for loss in made.losses(batch(32), 9):
            loss.value.backward()
    assert grown.at(32) == pytest.approx(live.peak, rel=0.1)


def test_probe_restores_a_codebook_parameter():
    made = tokenizer(codebook="gradient", dead_code_threshold=0.9, dead_code_check_every=1)
    before = made.tokenizer.quantizer.codebook.detach().clone()
    optimizer_has, address = (
        made.tokenizer.quantizer.codebook,
        made.tokenizer.quantizer.codebook.data_ptr(),
    )
    fit_memory_model(probe(made), images, most=8)
    assert made.tokenizer.quantizer.codebook is optimizer_has and torch.equal(before, optimizer_has)
    assert optimizer_has.data_ptr() == address


def test_probe_retries_with_more_rows():
    """k-means needs a vector per code: 16 of each image for 80 codes."""
    made = tokenizer(num_codes=80, kmeans_iterations=1)
    assert fit_memory_model(probe(made, 0), images, most=8).row > 0
    with pytest.raises(ValueError, match="k-means needs a vector per code"):
        fit_memory_model(probe(made, 0), images, most=4)


RESTARTS = {"dead_code_threshold": 0.9, "dead_code_check_every": 1}


@pytest.mark.parametrize(
    ("objective", "batch"),
    [
        (prior, pairs),
        (tokenizer, images),
        (partial(tokenizer, **RESTARTS), images),
        (partial(tokenizer, codebook="gradient", **RESTARTS), images),
        (partial(tokenizer, kmeans_iterations=2, num_codes=64), images),
    ],
)
def test_simulated_step_holds_as_much_as_a_real_one_and_computes_nothing(objective, batch):
    made = objective()
    network = next(iter(made.networks.values()))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    simulated = replace(probe(made), simulated=True)
    with torch.no_grad():  # a real step would pass the NaN on, or fail
        for parameter in network.parameters():
            parameter.fill_(torch.nan)
    grown = fit_memory_model(simulated, batch, most=64)
    assert all(p.isnan().all() and p.grad is None for p in network.parameters())
    network.load_state_dict(before)
    measured = fit_memory_model(probe(made), batch, most=64)
    assert grown.at(32) == pytest.approx(measured.at(32), rel=0.05)


def test_estimate_runs_no_network(tiny_yaml, monkeypatch):
    simulated = []

    @contextmanager
    def counted():
        with simulate_tensors():
            simulated.append(torch.zeros(1).untyped_storage().device.type)
            yield

    monkeypatch.setattr(memory_estimate, "simulate_tensors", counted)
    assert set(estimate(load_experiment(["--config", str(tiny_yaml)]))) == {"tokenizer", "prior"}
    assert simulated == ["meta"] * 4  # two sizes of each stage


def test_rows_are_repeated_to_fill_a_batch():
    batch = {"codes": torch.tensor([[1], [2]])}
    assert tile_rows(batch, 5)["codes"].flatten().tolist() == [1, 2, 1, 2, 1]


@pytest.mark.parametrize(
    ("given", "rows", "processes", "first", "last"),
    [
        ({"batch_size": "auto"}, 10**6, 1, (1024, 1), (1, 1)),
        ({"batch_size": "auto"}, 100, 2, (64, 1), (2, 1)),
        ({"batch_size": "auto", "gradient_accumulation_steps": 3}, 10**6, 2, (768, 3), (6, 3)),
        ({"batch_size": "auto", "gradient_accumulation_steps": "auto"}, 40, 4, (32, 1), (4, 1)),
        ({"batch_size": 24, "gradient_accumulation_steps": "auto"}, 40, 2, (24, 1), (24, 12)),
    ],
)
def test_batch_candidates_divide_evenly(given, rows, processes, first, last):
    options = batch_candidates(TrainConfig(**given), rows, processes, "prior")
    assert (options[0], options[-1]) == (first, last)
    assert all(size % (parts * processes) == 0 for size, parts in options)


def test_first_fitting_candidate_is_chosen():
    options = batch_candidates(
        TrainConfig(batch_size=24, gradient_accumulation_steps="auto"), 100, 2, "prior"
    )
    assert choose(options, 2, lambda rows: rows <= 5) == (24, 3)
    assert choose(options, 2, lambda rows: False) is None
    with pytest.raises(
        ValueError, match=r"^tokenizer\.train\.batch_size 7 does not split evenly over 2 processes"
    ):
        batch_candidates(
            TrainConfig(batch_size=7, gradient_accumulation_steps="auto"), 100, 2, "tokenizer"
        )


def test_networks_that_are_sharded_need_numbers(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    several = SimpleNamespace(device=torch.device("cpu"), num_processes=2)
    task = SimpleNamespace(objective=prior(), batch=lambda step: pairs(4))
    with pytest.raises(ValueError, match=r"is auto, and FSDP shards the prior.*; give numbers"):
        resolve_auto_batch(
            PriorTrainConfig(batch_size="auto"), task, "fp32", several, rows=1000, label="prior"
        )


def test_less_memory_gives_smaller_batches_and_none_is_an_error(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "pipeline")
    made = prior()
    state = state_bytes(made.networks, TrainConfig())
    grown = fit_memory_model(probe(made), pairs, most=8)
    config = PriorTrainConfig(batch_size="auto", steps=10)
    task = SimpleNamespace(objective=made, batch=lambda step: pairs(4))
    chosen = partial(
        resolve_auto_batch,
        task=task,
        precision="fp32",
        accelerator=Accelerator(cpu=True),
        rows=1000,
        label="prior",
    )
    for rows, expected in ((20, 16), (100, 64)):
        room = state.optimizer + state.average + grown.at(rows)
        monkeypatch.setattr(auto_batch, "free_memory", lambda device, room=room: room / 0.8)
        assert chosen(config).batch_size == expected
        assert (
            chosen(
                replace(config, batch_size=128, gradient_accumulation_steps="auto")
            ).gradient_accumulation_steps
            == 128 // expected
        )
    assert "prior: batch_size 16, gradient_accumulation_steps 1: what" in caplog.text
    monkeypatch.setattr(auto_batch, "free_memory", lambda device: 1000)
    with pytest.raises(
        MemoryError, match=r"prior: not one .* or prior\.train\.activation_checkpointing=true$"
    ):
        chosen(config)
    with pytest.raises(MemoryError, match=r"close other programs, or use a smaller model$"):
        chosen(replace(config, activation_checkpointing=True))
    tokenizer_config = TrainConfig(batch_size="auto", steps=10)
    with pytest.raises(MemoryError, match=r"tokenizer: not one .* or use a smaller model$"):
        chosen(tokenizer_config, label="tokenizer")


def test_out_of_memory_on_a_gpu_tries_a_smaller_batch(monkeypatch):
    """As on CUDA, where a step is tried: what cannot be had is caught, and everything is as it
    was."""
    made, network = prior(), next(iter(prior().networks.values()))
    monkeypatch.setattr(
        Probe, "_peak", lambda *given: (_ for _ in ()).throw(torch.OutOfMemoryError("no"))
    )
    assert not auto_batch._fits(probe(made, 0), pairs(1))
    monkeypatch.setattr(
        Probe, "_peak", lambda *given: (_ for _ in ()).throw(RuntimeError("another"))
    )
    with pytest.raises(RuntimeError, match="another"):
        auto_batch._fits(probe(made, 0), pairs(1))
    assert all(
        torch.equal(a, b)
        for a, b in zip(network.parameters(), made.prior.parameters(), strict=True)
    )


def test_chosen_batch_size_is_saved_and_kept(tiny_yaml, tmp_path, capsys, monkeypatch):
    command = [
        "train-tokenizer",
        "--config",
        str(tiny_yaml),
        "--tokenizer.train.batch_size",
        "auto",
    ]
    monkeypatch.setattr(auto_batch, "LARGEST", 16)
    assert main([*command, "--tokenizer.train.steps", "4"]) == 0
    out = capsys.readouterr().out
    assert "tokenizer: batch_size 16, gradient_accumulation_steps 1" in out
    written = tmp_path / "runs" / "tiny" / "tokenizer" / "settings.json"
    assert json.loads(written.read_text())["settings"]["train"]["batch_size"] == 16
    # On a smaller machine it goes on with the same
    monkeypatch.setattr(auto_batch, "free_memory", lambda device: 0)
    assert main([*command, "--tokenizer.train.steps", "6"]) == 0
    assert "tokenizer: batch_size" not in capsys.readouterr().out
    assert json.loads(written.read_text())["settings"]["train"]["batch_size"] == 16
    assert (
        main(
            [
                "train-tokenizer",
                "--config",
                str(tiny_yaml),
                "--tokenizer.train.batch_size",
                "16",
                "--tokenizer.train.steps",
                "6",
            ]
        )
        == 0
    )
    assert (
        main(["train-tokenizer", "--config", str(tiny_yaml), "--tokenizer.train.steps", "6"]) == 1
    )
    assert "made with other settings (train.batch_size)" in capsys.readouterr().err


def test_unresolved_auto_batch_size_is_refused():
    with pytest.raises(ValueError, match=r"^tokenizer\.train\.batch_size or .* numbers here"):
        TrainConfig(batch_size="auto").resolved_batch("tokenizer")


def test_byte_sizes_are_formatted():
    assert [format_bytes(n) for n in (12, 5000, 2**20 * 3.25, 40 * 2**30, 3 * 2**40)] == [
        "12 B",
        "5 KiB",
        "3.2 MiB",
        "40 GiB",
        "3.0 TiB",
    ]


def test_estimate_includes_process_memory_and_compiling():
    """Nothing of either on a card, where the program lies elsewhere."""
    state = state_bytes(prior().networks, TrainConfig(optimizer="adamw"))
    need = partial(estimate_memory, state, LinearMemoryModel(0.0, 0.0), 4, several=False)
    assert need(CPU, compiled=False, program=1000).other == 1000
    assert need(CPU, compiled=True, program=1000).other > 1000
    assert need(torch.device("cuda"), compiled=True, program=1000).other == 0
    assert need(CPU, compiled=False, program=1000).peak == 1000 + state.kept + max(
        state.gradients, state.gradients + state.muon_workspace
    )


def test_estimate_prints_the_memory_of_each_stage(tiny_yaml, tmp_path, capsys):
    assert main(["estimate", "--config", str(tiny_yaml)]) == 0
    out = capsys.readouterr().out
    assert re.search(
        r"tokenizer: 0\.\dM parameters, about [\d.]+ [MG]iB of memory \(parameters .*, optimizer "
        r".*\)",
        out,
    )
    assert re.search(r"prior: 0\.\dM parameters, about", out)
    assert not (tmp_path / "runs").exists()
    assert main(["estimate", "--config", str(tiny_yaml), "--processes", "2"]) == 0
    shared = capsys.readouterr().out
    assert shared.count("of memory in each process (") == 2 and "in each process" not in out
    fails(
        capsys,
        ["estimate", "--config", tiny_yaml, "--processes", "0"],
        "processes is 0; it must be at least 1",
    )
    assert list(
        estimate(
            replace(load_experiment(["--config", str(tiny_yaml)]), tokenizer=_frozen(tiny_yaml))
        )
    ) == ["prior"]
    fails(
        capsys,
        ["estimate", "--config", tiny_yaml, "--prior.train.batch_size", "auto"],
        "estimate: prior.train.batch_size or prior.train.gradient_accumulation_steps is auto",
    )


def _frozen(path):
    return replace(
        load_experiment(["--config", str(path)]).tokenizer, init_from="anywhere", frozen=True
    )
