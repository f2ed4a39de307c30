"""How many steps of a training stage fit into a time, by the pace of a few trial steps. Keeps
nothing of what it trains."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from pipeline.config.experiment import Experiment
from pipeline.config.inheritance import Stage
from pipeline.config.train import TrainConfig
from pipeline.runtime.devices import should_compile, uses_bf16
from pipeline.runtime.distributed import make_accelerator
from pipeline.stages.prior import new_prior_training
from pipeline.stages.sources import sources_of
from pipeline.stages.tokenizer import TokenizerTraining
from pipeline.training.task import Task
from pipeline.training.trainer import fit

_TRIAL_STEPS = 60


def steps_in_budget(experiment: Experiment, seconds: float) -> int:
    """How many steps of a tokenizer fit into this time, with start and compilation. The pace is
    that of a few trial steps, and of a few with the discriminator where one joins later."""
    discriminator = experiment.tokenizer.objective.discriminator
    joins = discriminator.start if discriminator.weight else 0
    before, pace = _seconds_per_step(experiment, discriminator=not joins)
    if joins and before + joins * pace < seconds:
        before, slower = _seconds_per_step(experiment, discriminator=True)
        steps = joins + max(int((seconds - before - joins * pace) / slower), 0)
        return max(steps, 1)
    return max(int((seconds - before) / pace), 1)


def prior_steps_in_budget(experiment: Experiment, seconds: float) -> int:
    """As `steps_in_budget`, of a prior. The stages before it are done."""
    accelerator = make_accelerator(experiment.folder, [], experiment.process_timeout)
    train = experiment.prior.train
    task = new_prior_training(experiment, accelerator).task(train.resolved_batch("prior")[0])
    before, pace = _trial(experiment, task, train, accelerator, "prior")
    return max(int((seconds - before) / pace), 1)


def _seconds_per_step(experiment: Experiment, *, discriminator: bool) -> tuple[float, float]:
    """Seconds before the first step and seconds per step, with the discriminator from the start
    or without one."""
    objective = experiment.tokenizer.objective
    changed = (
        replace(objective.discriminator, start=0)
        if discriminator
        else replace(objective.discriminator, weight=0.0)
    )
    objective = replace(objective, discriminator=changed)
    experiment = replace(experiment, tokenizer=replace(experiment.tokenizer, objective=objective))
    train = experiment.tokenizer.train
    accelerator = make_accelerator(experiment.folder, [], experiment.process_timeout)
    sources = sources_of(experiment.data, experiment.folder, experiment.process_timeout)
    training = TokenizerTraining(experiment, accelerator, *sources)
    task = training.task(train.resolved_batch("tokenizer")[0])
    return _trial(experiment, task, train, accelerator, "tokenizer")


def _trial(
    experiment: Experiment, task: Task, train: TrainConfig, accelerator: Accelerator, stage: Stage
) -> tuple[float, float]:
    """Seconds before the first step and seconds per step, in which a task was trained."""
    times: list[float] = []

    def timed(step: int) -> object:
        times.append(time.perf_counter())
        return task.batch(step)

    steps = _TRIAL_STEPS
    trial = replace(train, steps=steps, eval_every=steps, save_every=steps, save_best=False)
    with tempfile.TemporaryDirectory() as scratch:
        start = time.perf_counter()
        fit(
            replace(task, batch=timed, sample_images=dict),
            trial,
            accelerator,
            Path(scratch),
            seed=experiment.seed,
            bf16=uses_bf16(experiment.precision, accelerator.device),
            compile_networks=should_compile(train, accelerator.device),
            label=stage,
            seconds_after=None,
        )
    pace = float(np.median(np.diff(times)[steps // 2 :]))
    return times[steps // 2] - start - pace * steps / 2, pace
