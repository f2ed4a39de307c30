"""`batch_size: auto` and `gradient_accumulation_steps: auto`: the numbers that fit the memory.
Knows bytes and processes; knows no stage.

An explicit batch with `gradient_accumulation_steps: auto` stays what it is: it is split into as few
micro-batches as fit, so that the training is the same on every machine. `batch_size: auto` is
another training on another machine, and is for filling one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from pipeline.config.train import TrainConfig
from pipeline.runtime.devices import (
    USABLE_MEMORY_FRACTION,
    format_bytes,
    free_memory,
    is_out_of_memory,
    should_compile,
    uses_bf16,
)
from pipeline.runtime.log import on_main_process
from pipeline.training.memory_estimate import (
    Losses,
    estimate_memory,
    fit_memory_model,
    peak_of_step,
    state_bytes,
    tile_rows,
    to_device,
)
from pipeline.training.snapshot import preserve_state

_log = logging.getLogger(__name__)
_log.addFilter(on_main_process)

LARGEST = 1024
"""Images per step that `batch_size: auto` does not go beyond, since more of them teach little
more."""


def has_auto_batch(config: TrainConfig) -> bool:
    """Whether there is something left to choose."""
    return "auto" in (config.batch_size, config.gradient_accumulation_steps)


def batch_candidates(
    config: TrainConfig, rows: int | None, processes: int
) -> list[tuple[int, int]]:
    """The (batch_size, gradient_accumulation_steps) that may be chosen, in the order in which they
    are wanted.

    Args:
        rows: training images there are; None where a stream does not know.

    Raises:
        ValueError: the batch does not split over the processes.
    """
    if config.batch_size == "auto":
        gradient_accumulation_steps = (
            1
            if config.gradient_accumulation_steps == "auto"
            else config.gradient_accumulation_steps
        )
        unit = processes * gradient_accumulation_steps
        powers = [
            unit * 2**i
            for i in range(LARGEST.bit_length())
            if unit * 2**i <= min(LARGEST, rows or LARGEST)
        ]
        return [(size, gradient_accumulation_steps) for size in reversed(powers or [unit])]
    if config.batch_size % processes:
        raise ValueError(
            f"train.batch_size {config.batch_size} does not split evenly over {processes} "
            "processes; choose a multiple"
        )
    each = config.batch_size // processes
    return [(config.batch_size, parts) for parts in range(1, each + 1) if each % parts == 0]


def choose(
    options: list[tuple[int, int]], processes: int, fits: Callable[[int], bool]
) -> tuple[int, int] | None:
    """The first (batch_size, gradient_accumulation_steps) of which so many rows at a time fit; None
    where none does."""
    return next(
        ((size, parts) for size, parts in options if fits(size // processes // parts)), None
    )


def resolve_auto_batch(
    config: Any,
    task: Any,
    precision: str,
    accelerator: Accelerator,
    *,
    rows: int | None,
    label: str,
) -> Any:
    """The configuration with numbers in place of `auto`, the same on every process; says which.

    Args:
        task: what is to be trained; its networks, neither compiled nor wrapped, are taken to the
            device.
        precision: that of the experiment.
        rows: training images there are; None where a stream does not know.

    Raises:
        MemoryError: not even one image fits.
    """
    objective = task.objective
    for network in objective.networks.values():
        network.to(accelerator.device).train()
    example = partial(tile_rows, to_device(task.batch(0), accelerator.device))
    autocast = partial(
        torch.autocast,
        accelerator.device.type,
        torch.bfloat16,
        enabled=uses_bf16(precision, accelerator.device),
    )
    compiled = should_compile(config, accelerator.device)
    options, device, processes = (
        batch_candidates(config, rows, accelerator.num_processes),
        accelerator.device,
        accelerator.num_processes,
    )
    most = max(size // processes // parts for size, parts in options)
    state = state_bytes(objective.networks, config)
    grown = fit_memory_model(objective, example, config.steps - 1, autocast, device, most=most)
    # Processes of one machine share its memory; each of its cards is one process's alone.
    sharing = 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    least = min(gather_object([free_memory(device)]))  # all must choose the same
    usable = USABLE_MEMORY_FRACTION * least / sharing

    def to_come(count: int) -> float:
        """What will be taken that is not taken yet."""
        need = estimate_memory(
            state, grown, count, device, compiled=compiled, several=processes > 1
        )
        return need.peak - state.parameters

    def fits(count: int) -> bool:
        if to_come(count) > usable:
            return False
        # Beside others no process may leave the common work, as one that runs out of memory would:
        # there the measure above decides.
        return (
            device.type != "cuda"
            or processes > 1
            or _fits(objective, example(count), config.steps - 1, autocast, device)
        )

    chosen = choose(options, processes, fits)
    if chosen is None:
        raise MemoryError(
            f"{label}: not one image at a time fits: it takes {format_bytes(to_come(1))} beside "
            f"the weights, and {format_bytes(usable)} "
            f"of {device} may be used; close other programs, use a smaller model, or "
            "prior.train.activation_checkpointing=true"
        )
    size, parts = chosen
    _log.info(
        f"{label}: batch_size {size}, gradient_accumulation_steps {parts}: what "
        f"{format_bytes(usable)} of memory allow"
    )
    return replace(config, batch_size=size, gradient_accumulation_steps=parts)


def _fits(
    objective: Losses, batch: Any, step: int, autocast: Callable[[], Any], device: torch.device
) -> bool:
    """Whether the gradient of a batch can be taken."""
    try:
        with preserve_state(objective.networks.values()):
            peak_of_step(objective, batch, step, autocast, device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        torch.cuda.empty_cache()
        return False
    return True
