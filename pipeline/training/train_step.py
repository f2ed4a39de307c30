"""One training step: the gradients of every loss, over the micro-batches of a batch. Knows no data,
no files and no optimizer's kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pipeline.training.batch import Batch, split_batch
from pipeline.training.fsdp import full_tensor
from pipeline.training.task import Autocast, Loss, Objective


def step_seed(seed: int, step: int, process: int) -> int:
    """One seed for torch's generators; distinct for each step and process."""
    return (seed * 1_000_003 + step) * 4096 + process


@dataclass(frozen=True)
class StepContext:
    """What every step of a training needs and none changes."""

    objective: Objective
    networks: Mapping[str, nn.Module]
    """What losses call, by group: wrapped for several processes, or compiled."""
    accelerator: Accelerator
    autocast: Autocast
    grad_clip: float
    micro_batches: int


@dataclass(frozen=True)
class Gradients:
    """What `backward_all` leaves: the parameters hold the gradients."""

    groups: list[str]
    """Those whose optimizers step."""
    scalars: dict[str, Tensor]
    """Metrics of the step, still on the device."""


def backward_all(context: StepContext, batch: Batch, step: int) -> Gradients:
    """The clipped gradient of every loss, in the order in which the objective yields them.

    Each micro-batch goes as far as its next loss, and that loss's gradient is taken, before the
    next micro-batch starts.
    """
    parts = split_batch(batch, context.micro_batches)
    pending = [context.objective.losses(part, step, context.networks) for part in parts]
    groups: list[str] = []
    scalars: dict[str, Tensor] = {}
    while metrics := [
        found
        for losses in pending
        if (found := _backward_next(context, losses, len(parts))) is not None
    ]:
        group = metrics[0].group
        mean = _mean([part.scalars for part in metrics])
        norm = context.accelerator.clip_grad_norm_(
            context.networks[group].parameters(), context.grad_clip
        )
        prefix = "" if group in ("tokenizer", "prior") else f"{group}_"
        groups.append(group)
        scalars |= {f"{prefix}loss": mean.pop("loss"), f"{prefix}grad_norm": full_tensor(norm)}
        scalars |= mean
    return Gradients(groups, scalars)


@dataclass(frozen=True)
class _LossMetrics:
    group: str
    scalars: dict[str, Tensor]


def _backward_next(
    context: StepContext, losses: Iterator[Loss], micro_batches: int
) -> _LossMetrics | None:
    """Takes the gradient of a micro-batch's next loss; None where it has no more. Its graph ends
    with this call."""
    with context.autocast():
        loss = next(losses, None)
    if loss is None:
        return None
    context.accelerator.backward(loss.value / micro_batches)
    return _LossMetrics(loss.group, {"loss": loss.value.detach(), **loss.metrics})


def _mean(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Each metric's mean over the micro-batches."""
    return {
        name: torch.stack([torch.as_tensor(part[name]) for part in parts]).float().mean()
        for name in parts[0]
    }


def step_optimizers(
    optimizers: Mapping[str, torch.optim.Optimizer], groups: list[str], rate: float, *, apply: bool
) -> None:
    """Steps the optimizers of some groups at a learning rate and clears their gradients; without
    `apply`, clears them alone."""
    for name, optimizer in optimizers.items():
        if name.split("/")[0] not in groups:
            continue
        for options in optimizer.param_groups:
            options["lr"] = rate
        if apply:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
