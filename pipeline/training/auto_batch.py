"""`batch_size: auto` and `gradient_accumulation_steps: auto`: the numbers that fit the memory.
Knows bytes and processes; knows no stage.

An explicit batch with `gradient_accumulation_steps: auto` is split into as few micro-batches as
fit: the training is the same on every machine. `batch_size: auto` fills the machine: the training
differs between machines.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from pipeline.config.train import PriorTrainConfig, TrainConfig
from pipeline.runtime.devices import (
    USABLE_MEMORY_FRACTION,
    format_bytes,
    free_memory,
    is_out_of_memory,
    should_compile,
    uses_bf16,
)
from pipeline.runtime.log import on_main_process
from pipeline.training.batch import Batch, tile_rows, to_device
from pipeline.training.fsdp import can_shard
from pipeline.training.memory_estimate import Probe, estimate_memory, fit_memory_model, state_bytes
from pipeline.training.task import Task

_Config = TypeVar("_Config", bound=TrainConfig)
_log = logging.getLogger(__name__)
_log.addFilter(on_main_process)

LARGEST = 1024
"""Most images per step that `batch_size: auto` chooses, since more of them teach little more."""


def has_auto_batch(config: TrainConfig) -> bool:
    """Whether a number is left to choose."""
    return "auto" in (config.batch_size, config.gradient_accumulation_steps)


def batch_candidates(
    config: TrainConfig, rows: int | None, processes: int, label: str
) -> list[tuple[int, int]]:
    """The (batch_size, gradient_accumulation_steps) that may be chosen, the preferred first.

    Args:
        rows: number of training images; None where a stream does not know.
        label: the stage of these settings, for the message.

    Raises:
        ValueError: the batch does not split over the processes.
    """
    if config.batch_size == "auto":
        parts = config.gradient_accumulation_steps
        parts = 1 if parts == "auto" else parts
        unit = processes * parts
        powers = [
            unit * 2**i
            for i in range(LARGEST.bit_length())
            if unit * 2**i <= min(LARGEST, rows or LARGEST)
        ]
        return [(size, parts) for size in reversed(powers or [unit])]
    if config.batch_size % processes:
        raise ValueError(
            f"{label}.train.batch_size {config.batch_size} does not split evenly over "
            f"{processes} processes; choose a multiple"
        )
    each = config.batch_size // processes
    return [(config.batch_size, parts) for parts in range(1, each + 1) if each % parts == 0]


def choose(
    options: list[tuple[int, int]], processes: int, fits: Callable[[int], bool]
) -> tuple[int, int] | None:
    """The first (batch_size, gradient_accumulation_steps) whose rows per micro-batch fit; None
    where there is none."""
    return next(
        ((size, parts) for size, parts in options if fits(size // processes // parts)), None
    )


def resolve_auto_batch(
    config: _Config,
    task: Task,
    precision: str,
    accelerator: Accelerator,
    *,
    rows: int | None,
    label: str,
) -> _Config:
    """The configuration with numbers in place of `auto`, the same on every process; logs them.

    Args:
        task: what will be trained. Its networks, neither compiled nor wrapped, are moved to the
            device.
        precision: that of the experiment.
        rows: number of training images; None where a stream does not know.

    Raises:
        MemoryError: not even one image fits.
        ValueError: the networks are to be sharded.
    """
    device = accelerator.device
    processes = accelerator.num_processes
    networks = task.objective.networks
    if can_shard(networks, accelerator):
        raise ValueError(
            f"{label}.train.batch_size or gradient_accumulation_steps is auto, and FSDP shards the "
            f"{label}, which is too large to be measured whole; give numbers (`minidalle estimate` "
            "says what fits)"
        )
    for network in networks.values():
        network.to(device).train()
    autocast = partial(
        torch.autocast, device.type, torch.bfloat16, enabled=uses_bf16(precision, device)
    )
    probe = Probe(task.objective, config.steps - 1, autocast, device)
    example = partial(tile_rows, to_device(task.batch(0), device))
    compiled = should_compile(config, device)
    options = batch_candidates(config, rows, processes, label)
    state = state_bytes(networks, config)
    most = max(size // processes // parts for size, parts in options)
    model = fit_memory_model(probe, example, most=most)
    usable = _usable_memory(device)

    def to_come(count: int) -> float:
        """Bytes that training will take beyond those taken already."""
        need = estimate_memory(
            state, model, count, device, compiled=compiled, several=processes > 1
        )
        return need.peak - state.parameters

    def fits(count: int) -> bool:
        if to_come(count) > usable:
            return False
        # With several processes the estimate decides: one that runs out of memory would leave the
        # others waiting.
        return device.type != "cuda" or processes > 1 or _fits(probe, example(count))

    chosen = choose(options, processes, fits)
    if chosen is None:
        advice = "close other programs, or use a smaller model"
        if isinstance(config, PriorTrainConfig) and not config.activation_checkpointing:
            advice += f", or {label}.train.activation_checkpointing=true"
        raise MemoryError(
            f"{label}: not one image at a time fits: it takes {format_bytes(to_come(1))} in "
            f"addition to the weights, and {format_bytes(usable)} of {device} may be used; {advice}"
        )
    size, parts = chosen
    _log.info(
        f"{label}: batch_size {size}, gradient_accumulation_steps {parts}: what "
        f"{format_bytes(usable)} of memory allow"
    )
    return replace(config, batch_size=size, gradient_accumulation_steps=parts)


def _usable_memory(device: torch.device) -> float:
    """Bytes that each process may take, the same on all, since all must choose the same."""
    # Processes of one machine share its memory; each has a GPU of its own.
    sharing = 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    least: int = min(gather_object([free_memory(device)]))
    return USABLE_MEMORY_FRACTION * least / sharing


def _fits(probe: Probe, batch: Batch) -> bool:
    """Whether the gradient of a batch can be taken."""
    try:
        probe.peak(batch)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        torch.cuda.empty_cache()
        return False
    return True
