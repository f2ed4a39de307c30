"""The training loop on an objective of one small network."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pipeline.config.train import TrainConfig
from pipeline.training.task import Task
from pipeline.training.trainer import fit


class Line:
    """Fits y = w x with noise from torch's generator; `broken_at` yields a loss that is not
    finite."""

    def __init__(self, broken_at: int | None = None) -> None:
        torch.manual_seed(0)
        self.network = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(1)
        )
        self.network(torch.zeros(2, 3, 5, 5))
        self.network.to(memory_format=torch.channels_last)
        self.networks: dict[str, nn.Module] = {"tokenizer": self.network}
        self.broken_at = broken_at
        self.on_step: Callable[[int], object] = lambda step: None

    def losses(self, batch, step, networks=None):
        self.on_step(step)
        noise = torch.randn(len(batch), 1)
        value = (
            (
                (networks or self.networks)["tokenizer"](batch)
                - batch.sum((1, 2, 3))[:, None]
                + 0.1 * noise
            )
            .square()
            .mean()
        )
        if step == self.broken_at:
            value = value * math.nan
        yield type(
            "Loss",
            (),
            {"group": "tokenizer", "value": value, "metrics": {"square": value.detach()}},
        )()

    def evaluate(self, batches):
        self.network.eval()
        with torch.no_grad():
            value = sum(float(self.network(b).square().mean()) for b in batches)
        self.network.train()
        return {"error": value}


CONFIG = {
    "steps": 9,
    "batch_size": 4,
    "log_every": 1,
    "eval_every": 4,
    "save_every": 2,
    "warmup_steps": 2,
    "ema_decay": 0.9,
}


def line_batch(step: int) -> Tensor:
    return torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(step))


def line_task(objective: Line, **more: Any) -> Task:
    """Batches and evaluation for `Line`; `more` are further fields of the task."""
    return Task(objective, line_batch, lambda: [line_batch(10**6)], "error", dict, **more)


def fit_task(
    task: Task,
    config: TrainConfig,
    folder: Path,
    accelerator: Accelerator | None = None,
    *,
    bf16: bool = False,
    label: str = "line",
    progress: bool = False,
) -> dict[str, float]:
    """`fit` with seed 1, nothing compiled."""
    return fit(
        task,
        config,
        accelerator or Accelerator(),
        folder,
        seed=1,
        compile_networks=False,
        bf16=bf16,
        label=label,
        seconds_after=0.0 if progress else None,
    )


def train(
    folder: Path,
    objective: Line | None = None,
    on_step: Callable[[int], object] = lambda step: None,
    **options: object,
) -> tuple[Line, dict[str, float]]:
    """Trains `Line`; `on_step` is called when a step's losses are asked for."""
    objective = objective or Line()
    objective.on_step = on_step
    task = line_task(objective, sample_names=lambda step: [f"row {step}{i}" for i in range(4)])
    config = TrainConfig(**{**CONFIG, **options})  # type: ignore[arg-type]
    return objective, fit_task(task, config, folder)
