"""One training step: the gradients of every loss, over the parts of a batch, then the optimizers. Knows no data and no files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from pipeline.config.train import TrainConfig
from pipeline.training.fsdp import whole
from pipeline.training.optimizers import learning_rate
from pipeline.training.task import Objective


def step_seed(seed: int, step: int, process: int) -> int:
    """One seed for torch's generators; distinct for each step and process."""
    return (seed * 1_000_003 + step) * 4096 + process


def _step(
    objective: Objective,
    optimizers: dict[str, Any],
    accelerator: Accelerator,
    autocast: Callable[[], Any],
    batch: Any,
    step: int,
    config: TrainConfig,
    finite: Callable[[dict[str, Tensor]], bool],
) -> dict[str, Tensor]:
    """The gradients of every group in the order in which the objective yields its losses; then, where `finite` says so of their scalars,
    a step of all optimizers. Returns the scalars, still on the device; none of a step that was skipped and changed nothing."""
    scalars: dict[str, Tensor] = {}
    rate = learning_rate(step, config)
    # Each part of the batch goes as far as its next loss, and that loss's gradient is taken, before the next part begins.
    parts = [objective.losses(part, step) for part in _parts(batch, config.numbers()[1])]
    stepped: list[Any] = []
    while True:
        of_parts: list[dict[str, Tensor]] = []
        for losses in parts:
            with autocast():
                loss = next(losses, None)
            if loss is None:
                break
            accelerator.backward(loss.value / len(parts))
            of_parts.append({"loss": loss.value.detach(), **loss.metrics})
            group = loss.group
            del loss  # or its graph would stay while the next part's is built
        if not of_parts:
            break
        mean = {name: torch.stack([torch.as_tensor(part[name]) for part in of_parts]).float().mean() for name in of_parts[0]}
        norm = whole(accelerator.clip_grad_norm_(objective.networks[group].parameters(), config.grad_clip))
        stepped += [optimizer for name, optimizer in optimizers.items() if name.startswith(f"{group}/")]
        prefix = "" if group in ("tokenizer", "prior") else f"{group}_"
        scalars |= {f"{prefix}loss": mean.pop("loss"), f"{prefix}gradient_norm": norm, "learning_rate": torch.tensor(rate)}
        scalars |= mean
    goes = finite(scalars)
    for optimizer in stepped:
        for options in optimizer.param_groups:
            options["lr"] = rate
        if goes:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return scalars if goes else {}


def _parts(batch: Any, count: int) -> list[Any]:
    """A batch, or a mapping of batches, in equal parts."""
    if isinstance(batch, Mapping):
        split = {key: value.chunk(count) for key, value in batch.items()}
        return [{key: value[i] for key, value in split.items()} for i in range(count)]
    return list(batch.chunk(count))
