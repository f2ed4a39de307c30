"""How long the stages after the tokenizer's training take, by a few trial steps of a prior of the
same sizes and a few encoded images. Keeps nothing of what it trains."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from accelerate import Accelerator

from pipeline.config.experiment import Experiment
from pipeline.data.source import Source
from pipeline.runtime.devices import should_compile, uses_bf16
from pipeline.runtime.distributed import make_accelerator
from pipeline.runtime.log import shows_progress
from pipeline.runtime.threads import free_threads
from pipeline.stages.estimate import trial_objective
from pipeline.stages.sources import sources_of
from pipeline.training.auto_batch import has_auto_batch
from pipeline.training.batch import to_device
from pipeline.training.fsdp import fsdp_requested
from pipeline.training.optimizers import optimizers_for
from pipeline.training.train_step import StepContext, backward_all, step_optimizers
from stage1_tokenizer import TokenizerModule, to_model_range

_STEPS = 8
_COMPILED_PACE = 0.6
"""Time of a compiled step of a prior, as a fraction of a plain one's: 0.57 to 0.63 were measured on
the shipped configurations (docs/scaling.md). Trial steps are plain: compiling takes longer."""
_COMPILING = 20.0
"""Seconds of compiling: about 4 with the compiler's cache, 28 to 47 without."""


@dataclass(frozen=True)
class StageSeconds:
    """Estimated seconds of the stages that follow the tokenizer's training; 0 where unknown."""

    encode: float = 0.0
    prior: float = 0.0


@free_threads()
def estimate_seconds(experiment: Experiment) -> StageSeconds:
    """How long encoding and the prior will take, by this job's processes; every process must call.

    Zeros where no bar shows them, or a trial is not possible: the batch size is `auto`, or the
    prior is sharded and need not fit one device. Evaluations are not included.
    """
    if not shows_progress() or has_auto_batch(experiment.prior.train) or fsdp_requested():
        return StageSeconds()
    accelerator = make_accelerator(experiment.folder, [], experiment.process_timeout)
    batch_size, micro_batches = experiment.prior.train.resolved_batch("prior")
    if batch_size % (accelerator.num_processes * micro_batches):  # which the training refuses
        return StageSeconds()
    source, _ = sources_of(experiment.data, experiment.folder, experiment.process_timeout)
    tokenizer = TokenizerModule(experiment.tokenizer.model)
    prior = _prior_seconds(experiment, tokenizer, accelerator)
    return StageSeconds(_encode_seconds(experiment, tokenizer, source, accelerator), prior)


def _prior_seconds(
    experiment: Experiment, tokenizer: TokenizerModule, accelerator: Accelerator
) -> float:
    train = experiment.prior.train
    batch_size, micro_batches = train.resolved_batch("prior")
    objective, batch = trial_objective(
        experiment, tokenizer, batch_size // accelerator.num_processes
    )
    bf16 = uses_bf16(experiment.precision, accelerator.device)
    autocast = partial(torch.autocast, accelerator.device.type, torch.bfloat16, enabled=bf16)
    prior = objective.networks["prior"].to(accelerator.device)
    optimizers = optimizers_for("prior", prior, train)
    context = StepContext(
        objective, objective.networks, accelerator, autocast, train.grad_clip, micro_batches
    )
    times = []
    for step in range(_STEPS):
        gradients = backward_all(context, to_device(batch, accelerator.device), step)
        step_optimizers(optimizers, gradients.groups, 0.0, apply=True)
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter())
    pace = float(np.median(np.diff(times)))
    if not should_compile(train, accelerator.device):
        return train.steps * pace
    return train.steps * pace * _COMPILED_PACE + _COMPILING


@torch.no_grad()
def _encode_seconds(
    experiment: Experiment, tokenizer: TokenizerModule, source: Source, accelerator: Accelerator
) -> float:
    known = [n for n in (experiment.encode.max_images, source.num_images) if n is not None]
    if source.num_images is None or not known:
        return 0.0
    rows = range(min(experiment.encode.batch_size, *known))
    bf16 = uses_bf16(experiment.precision, accelerator.device)
    tokenizer.to(accelerator.device).eval()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        pixels = to_model_range(torch.from_numpy(source.images(rows))).to(accelerator.device)
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=bf16):
            tokenizer.encode(pixels).cpu()
        seconds.append(time.perf_counter() - start)
    images = min(known) * experiment.encode.augmentations_per_image
    return images / accelerator.num_processes * min(seconds) / len(rows)
