"""Training on a GPU: the losses of the CPU, checkpoints that change device, memory, transfers,
FSDP."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.config.train import PriorTrainConfig, TrainConfig
from pipeline.training import auto_batch
from pipeline.training.auto_batch import resolve_auto_batch
from pipeline.training.batch import to_device
from pipeline.training.ema import EMA
from pipeline.training.fsdp import FSDPModelState, ModelState, Steppers
from pipeline.training.memory_estimate import Probe, estimate_training_memory
from pipeline.training.optimizers import optimizers_for
from pipeline.training.prefetch import BatchPrefetcher
from pipeline.training.task import Task
from stage1_tokenizer import (
    DiscriminatorOptions,
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
from tests.helpers.devices import accelerator_on
from tests.helpers.training import fit_task

pytestmark = pytest.mark.gpu
CPU = torch.device("cpu")
BF16_TOLERANCE = 0.02
"""Relative difference of a loss in bf16 from that in fp32: bf16 keeps 8 bits, and a loss averages
many rounded numbers."""
STREAM = StreamConfig(
    text_vocab_size=300, text_length=12, levels=(Level(grid=(8, 8), num_codes=64),)
)
STAGES = ["tokenizer", "tokenizer with a discriminator", "prior"]


def objective(stage: str, **model: object) -> TokenizerObjective | PriorObjective:
    """The same weights each time: a small tokenizer, or a small prior."""
    torch.manual_seed(0)
    if stage == "prior":
        prior = PriorModule(PriorConfig(**{"width": 64, "depth": 2, "heads": 2, **model}), STREAM)  # type: ignore[arg-type]
        with torch.no_grad():  # heads start at zero, where every loss is log K
            for parameter in prior.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=parameter.shape[1] ** -0.5)
        return PriorObjective(prior.train(), PriorObjectiveConfig(caption_dropout=0.0))
    options = (
        DiscriminatorOptions(weight=1.0, width=16, start=0)
        if "discriminator" in stage
        else DiscriminatorOptions()
    )
    sizes = {
        "image_size": 32,
        "downsample_factor": 8,
        "num_codes": 32,
        "width": 32,
        "encoder_depth": 1,
        "decoder_depth": 1,
        "code_dim": 4,
    }
    tokenizer = TokenizerModule(TokenizerConfig(**sizes, vq=VectorOptions(dead_code_check_every=2)))  # type: ignore[arg-type]
    return TokenizerObjective(tokenizer.train(), ObjectiveConfig(discriminator=options))


def batch_of(stage: str, step: int, rows: int = 16) -> Tensor | dict[str, Tensor]:
    """This step's batch, on the CPU."""
    draws = torch.Generator().manual_seed(step)
    if stage == "prior":
        text, codes = ((rows, 12), 300), ((rows, 64), 64)
        return {
            "text_ids": torch.randint(3, text[1], text[0], generator=draws),
            "codes": torch.randint(codes[1], codes[0], generator=draws),
        }
    return torch.randint(256, (rows, 32, 32, 3), dtype=torch.uint8, generator=draws)


def losses_of(stage: str, device: torch.device, *, bf16: bool) -> list[float]:
    """Every loss of one training step."""
    made = objective(stage)
    for network in made.networks.values():
        network.to(device)
    values = []
    for loss_of_part in _each_loss(
        made,
        to_device(batch_of(stage, 0), device),
        partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16),
    ):
        values.append(float(loss_of_part.detach()))
    return values


def _each_loss(made, batch, autocast):
    losses = made.losses(batch, 1)
    while True:
        with autocast():
            loss = next(losses, None)
        if loss is None:
            return
        loss.value.backward()
        for name, parameter in made.networks[loss.group].named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), name
        yield loss.value


@pytest.mark.parametrize("stage", STAGES)
def test_losses_equal_those_of_the_cpu(stage, device):
    expected = losses_of(stage, CPU, bf16=False)
    assert losses_of(stage, device, bf16=False) == pytest.approx(expected, rel=1e-4)
    assert losses_of(stage, device, bf16=True) == pytest.approx(expected, rel=BF16_TOLERANCE)


def trained(folder: Path, stage: str, device: torch.device, **options: object) -> nn.Module:
    """The network after `fit`, on the CPU."""
    made = objective(stage)
    task = Task(
        made,
        lambda step: batch_of(stage, step),
        lambda: [to_device(batch_of(stage, 10**6), device)],
        _BEST[stage],
        dict,
    )
    config = TrainConfig(
        **{
            "steps": 8,
            "batch_size": 16,
            "save_every": 2,
            "eval_every": 4,
            "warmup_steps": 2,
            "learning_rate": 1e-3,
            "ema_decay": 0.9,
            "compile": "off",
            **options,
        }
    )  # type: ignore[arg-type]
    fit_task(task, config, folder, accelerator_on(device), label="gpu")
    return next(iter(made.networks.values())).cpu()


_BEST = {"prior": "nats_per_code", "tokenizer": "nll"}


def weights(folder: Path, step: int, file: str) -> dict[str, Tensor]:
    return load_file(folder / "checkpoints" / f"step-{step}" / f"{file}.safetensors")


def vector(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten().double() for tensor in tensors.values()])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("stage", ["tokenizer", "prior"])
def test_training_resumes_on_another_device(stage, optimizer, device, tmp_path):
    """Weights, moments, EMA and codebook statistics of a checkpoint go to the other device and
    back. The ends differ by a tenth of what the second half of the training moves at most: where a
    gradient is next to 0, AdamW steps by the learning rate whatever its sign."""
    options = {
        "optimizer": optimizer,
        "save_total_limit": 9,
        "schedule": "wsd",
        "min_lr_ratio": 1.0,
    }
    trained(tmp_path / "cpu", stage, CPU, **options)
    for name, first, then in (("to", CPU, device), ("back", device, CPU)):
        trained(tmp_path / name, stage, first, **options, steps=4)
        trained(tmp_path / name, stage, then, **options)
        for file in ("weights", "ema", "optimizer"):
            middle, expected, found = (
                weights(tmp_path / who, step, file)
                for who, step in (("cpu", 4), ("cpu", 8), (name, 8))
            )
            assert expected.keys() == found.keys()
            moved = (vector(expected) - vector(middle)).norm()
            assert (vector(found) - vector(expected)).norm() < 0.1 * moved, file


def test_resumed_checkpoint_is_bit_identical(device, tmp_path):
    trained(tmp_path, "tokenizer", device, steps=4, save_total_limit=9)
    before = weights(tmp_path, 4, "weights")
    network = trained(tmp_path, "tokenizer", device, steps=4, save_total_limit=9)
    average = weights(tmp_path, 4, "ema")
    for (name, parameter), value in zip(network.named_parameters(), average.values(), strict=True):
        assert torch.equal(parameter, value), name
    buffers = dict(network.named_buffers())
    assert all(
        torch.equal(value, buffers[key.removeprefix("tokenizer.")])
        for key, value in before.items()
        if key.removeprefix("tokenizer.") in buffers
    )


def test_the_ema_of_weights_equals_that_of_the_cpu(device):
    networks = {
        name: objective("prior").networks["prior"].to(where)
        for name, where in (("cpu", CPU), ("device", device))
    }
    averages = {name: EMA({"prior": network}) for name, network in networks.items()}
    for step in range(5):
        change = [
            torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            for p in networks["cpu"].parameters()
        ]
        for name, network in networks.items():
            with torch.no_grad():
                for parameter, delta in zip(network.parameters(), change, strict=True):
                    parameter += delta.to(parameter.device)
            averages[name].update(0.9)
    for expected, found in zip(averages["cpu"].shadow, averages["device"].shadow, strict=True):
        torch.testing.assert_close(found.cpu(), expected)


def test_batches_are_pinned_and_arrive_intact(cuda):
    """They are sent without waiting, and the next ones take the place of those that were sent."""
    with BatchPrefetcher(
        lambda step: {"codes": torch.full((2**20,), step)}, 20, pin_memory=True
    ) as batches:
        for step in range(20):
            batch = batches.get(step)
            assert batch["codes"].is_pinned()
            sent = to_device(batch, cuda)["codes"]
            del batch
            assert int(sent.min()) == int(sent.max()) == step


def test_peak_memory_of_training_matches_the_estimate(cuda, tmp_path):
    """Within a quarter, for a prior whose activations outweigh its weights and one the other way
    round."""
    for rows, width in ((256, 64), (16, 512)):
        made, config = (
            objective("prior", width=width, depth=4, heads=width // 32),
            PriorTrainConfig(steps=4, batch_size=rows, warmup_steps=1),
        )
        network = made.networks["prior"].to(cuda)
        accelerator, batch = accelerator_on(cuda), to_device(batch_of("prior", 0, rows), cuda)
        autocast = partial(torch.autocast, "cuda", torch.bfloat16, enabled=True)
        probe = Probe(made, config.steps - 1, autocast, cuda)
        need = estimate_training_memory(probe, config, batch, rows, compiled=False)
        del batch
        task = Task(
            made,
            lambda step, rows=rows: batch_of("prior", step, rows),
            lambda: [],
            "nats_per_code",
            dict,
        )
        made.evaluate = lambda batches: {}  # type: ignore[method-assign,assignment]
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated() - sum(
            t.nbytes for t in network.state_dict().values()
        )
        torch.cuda.reset_peak_memory_stats()
        fit_task(task, config, tmp_path / str(width), accelerator, bf16=True, label="gpu")
        assert need.peak == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.25)
        del made, network, task


def test_automatic_batch_size_fits(device, monkeypatch):
    made = objective("prior")
    task = SimpleNamespace(objective=made, batch=lambda step: batch_of("prior", step, 4))
    config = PriorTrainConfig(batch_size="auto", steps=10)
    monkeypatch.setattr(auto_batch, "LARGEST", 64)
    chosen = resolve_auto_batch(
        config,
        task,
        "bf16" if device.type == "cuda" else "fp32",
        accelerator_on(device),
        rows=1000,
        label="prior",
    )
    assert chosen.resolved_batch("prior") == (64, 1)
    assert all(p.grad is None for p in made.prior.parameters())


def test_automatic_batch_size_shrinks_when_memory_runs_out(cuda, monkeypatch):
    """The estimate says that all fits; trying it out runs out of memory, which is caught and costs
    nothing later."""
    made = objective("prior", width=512, depth=4, heads=16)
    task = SimpleNamespace(objective=made, batch=lambda step: batch_of("prior", step, 4))
    monkeypatch.setattr(auto_batch, "free_memory", lambda device: 2**50)
    monkeypatch.setattr(auto_batch, "LARGEST", 4096)
    try:
        torch.cuda.set_per_process_memory_fraction(
            3 * 2**30 / torch.cuda.get_device_properties(cuda).total_memory
        )
        chosen = resolve_auto_batch(
            PriorTrainConfig(batch_size="auto", steps=10),
            task,
            "bf16",
            accelerator_on(cuda),
            rows=10**6,
            label="prior",
        )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 1 < chosen.resolved_batch("prior")[0] < 4096


def test_fsdp_on_one_process_equals_training_without(device, tmp_path):
    """Weights, moments and EMA of sharded networks, gathered, are those of whole ones."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        accelerator = SimpleNamespace(device=device, num_processes=1, is_main_process=True)
        config = TrainConfig(learning_rate=1e-3)

        def built(networks):
            return Steppers(optimizers_for("prior", networks["prior"], config), EMA(networks))

        ends = []
        for sharded in (False, True):
            made = objective("prior")
            plain = dict(made.networks)
            if not sharded:
                plain["prior"].to(device)
            state = (
                FSDPModelState(plain, built(plain), accelerator, built)
                if sharded
                else ModelState(plain, built(plain), accelerator)
            )
            made.networks["prior"] = state.networks["prior"]
            for step in range(3):
                loss = next(made.losses(to_device(batch_of("prior", step), device), step))
                loss.value.backward()
                for optimizer in state.optimizers.values():
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                state.ema.update(0.9)
            saved = state.checkpoint_state()
            ends.append(
                (
                    {k: v.cpu() for k, v in saved.networks["prior"].items()},
                    [s.cpu() for s in saved.ema],
                )
            )
        (expected, shadow), (found, found_shadow) = ends
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-4)
        for own, other in zip(shadow, found_shadow, strict=True):
            torch.testing.assert_close(other, own, atol=1e-5, rtol=1e-4)
    finally:
        dist.destroy_process_group()


def test_a_compiled_step_has_the_loss_of_a_plain_one(device):
    """Both stages as `fit` compiles them."""
    for stage in ("tokenizer", "prior"):
        values = []
        for compiled in (False, True):
            made = objective(stage)
            for network in made.networks.values():
                network.to(device)
            if compiled:
                made.compile()
            loss = next(iter(made.losses(to_device(batch_of(stage, 0), device), 1)))
            loss.value.backward()
            values.append(float(loss.value.detach()))
        assert values[1] == pytest.approx(values[0], rel=1e-4)


def test_skipped_step_restores_device_state(device, tmp_path):
    """A step whose loss is not finite is undone: statistics of the codebook too."""
    made = objective("tokenizer")
    losses = made.losses

    def broken(batch, step, networks=None):
        for loss in losses(batch, step, networks):
            yield replace(loss, value=loss.value * float("nan")) if step == 1 else loss

    made.losses = broken  # type: ignore[method-assign]
    states: list[dict[str, Tensor]] = []

    def batch(step: int) -> Tensor:
        return batch_of("tokenizer", step)  # type: ignore[return-value]

    task = Task(made, batch, lambda: [], "nll", dict)
    made.evaluate = lambda batches: (
        states.append({k: v.cpu().clone() for k, v in made.tokenizer.state_dict().items()}) or {}
    )  # type: ignore[method-assign,assignment,func-returns-value]
    config = TrainConfig(
        steps=2, batch_size=16, eval_every=1, max_nonfinite_steps=1, ema_decay=0.0, compile="off"
    )
    fit_task(task, config, tmp_path, accelerator_on(device), label="gpu")
    assert all(torch.equal(states[0][key], value) for key, value in states[1].items())
