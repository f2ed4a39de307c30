"""How long training steps and later stages take, by a few trial steps. Keeps nothing of what it
trains."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from pipeline.config.experiment import Experiment
from pipeline.config.train import TrainConfig
from pipeline.data.source import Source
from pipeline.runtime.devices import should_compile, uses_bf16
from pipeline.runtime.distributed import make_accelerator
from pipeline.stages.encode import sources_of
from pipeline.stages.estimate import trial_objective
from pipeline.training.auto_batch import has_auto_batch
from pipeline.training.fsdp import fsdp_requested
from pipeline.training.task import Task
from pipeline.training.trainer import fit
from stage1_tokenizer import ImageTokenizer, to_model_range

_PRIOR_STEPS = 8
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


def time_steps(
    task: Task, train: TrainConfig, accelerator: Accelerator, steps: int, precision: str, label: str
) -> tuple[float, float]:
    """Seconds before the first step, and seconds per step (the median of the later half).

    Args:
        label: the stage of these settings, for messages.
    """
    times: list[float] = []

    def timed(step: int) -> object:
        times.append(time.perf_counter())
        return task.batch(step)

    with tempfile.TemporaryDirectory() as scratch:
        start = time.perf_counter()
        fit(
            replace(task, batch=timed, sample_images=dict),
            replace(train, steps=steps, eval_every=steps, save_every=steps, save_best=False),
            accelerator,
            Path(scratch),
            seed=0,
            bf16=uses_bf16(precision, accelerator.device),
            compile_networks=should_compile(train, accelerator.device),
            label=label,
            seconds_after=None,
        )
    pace = float(np.median(np.diff(times)[steps // 2 :]))
    return times[steps // 2] - start - pace * steps / 2, pace


def estimate_seconds(experiment: Experiment) -> StageSeconds:
    """How long encoding and the prior will take, by this job's processes; every process must call.

    Zeros where a trial is not possible: the batch size is `auto`, or the prior is sharded and need
    not fit one device. Evaluations are not included.
    """
    if has_auto_batch(experiment.prior.train) or fsdp_requested():
        return StageSeconds()
    accelerator = make_accelerator(experiment.folder, [], experiment.process_timeout)
    source, _ = sources_of(experiment.data, experiment.folder, experiment.process_timeout)
    tokenizer = ImageTokenizer(experiment.tokenizer.model)
    prior = _prior_seconds(experiment, tokenizer, accelerator)
    return StageSeconds(_encode_seconds(experiment, tokenizer, source, accelerator), prior)


def _prior_seconds(
    experiment: Experiment, tokenizer: ImageTokenizer, accelerator: Accelerator
) -> float:
    train = experiment.prior.train
    rows = train.resolved_batch("prior")[0] // accelerator.num_processes
    objective, batch = trial_objective(experiment, tokenizer, rows)
    task = Task(objective, lambda step: batch, lambda: [batch], "nats_per_code", dict)
    plain = replace(train, compile="off")
    _, pace = time_steps(task, plain, accelerator, _PRIOR_STEPS, experiment.precision, "prior")
    if not should_compile(train, accelerator.device):
        return train.steps * pace
    return train.steps * pace * _COMPILED_PACE + _COMPILING


@torch.no_grad()
def _encode_seconds(
    experiment: Experiment, tokenizer: ImageTokenizer, source: Source, accelerator: Accelerator
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
