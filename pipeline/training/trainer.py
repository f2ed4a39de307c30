"""`fit`: the accelerate loop for any objective. Knows steps, optimizers, EMA and checkpoints; knows
no stage and no data.

Every random number is a pure function of (seed, step, process). A checkpoint therefore needs no
random state and no position in the data.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from pipeline.config.train import TrainConfig
from pipeline.runtime.atomic_io import clean_partial_writes, write_errors
from pipeline.runtime.distributed import broadcast_from_main, is_peer_failure
from pipeline.runtime.log import on_main_process, shows_progress
from pipeline.runtime.progress import ProgressBar
from pipeline.runtime.signals import (
    RecoverableError,
    SignalState,
    TrainingInterrupted,
    catch_signals,
)
from pipeline.runtime.threads import FreeThreads
from pipeline.training.batch import Batch, to_device
from pipeline.training.checkpoint import (
    CorruptedCheckpoint,
    State,
    load_checkpoint,
    load_newest,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    verify_checkpoint,
)
from pipeline.training.ema import EMA, ema_decay
from pipeline.training.fsdp import FSDPModelState, ModelState, Optimizers, Steppers, can_shard
from pipeline.training.monitoring import (
    GradNormMonitor,
    ThroughputMeter,
    all_reduce_flags,
    format_metrics,
    mean_over_ranks,
    nonfinite_message,
    nonfinite_names,
)
from pipeline.training.optimizers import learning_rate, optimizers_for
from pipeline.training.prefetch import BatchPrefetcher
from pipeline.training.snapshot import BufferSnapshot
from pipeline.training.task import Task
from pipeline.training.train_step import StepContext, backward_all, step_optimizers, step_seed

_log = logging.getLogger(__name__)
_log.addFilter(on_main_process)


# Nine parameters: all but the first four are one setting each, by keyword. A class of settings for
# its three callers would be longer.
def fit(
    task: Task,
    config: TrainConfig,
    accelerator: Accelerator,
    folder: Path,
    *,
    seed: int,
    compile_networks: bool,
    bf16: bool,
    label: str,
    seconds_after: float | None = 0.0,
) -> dict[str, float]:
    """Trains `task.objective` for `config.steps` steps, from the newest whole checkpoint in
    `folder`/checkpoints if there is one.

    Ends with the EMA weights in the objective's networks (the best ones with `config.save_best`)
    and returns the last (or best) held-out metrics.

    Args:
        seconds_after: estimated seconds that the run takes after this training, for the progress
            bar; None shows none.

    Raises:
        FloatingPointError: a loss or a gradient is not finite, more often than
            `config.max_nonfinite_steps` allows; names the step, its images and the last good
            checkpoint. The weights are those of the step before.
        ValueError: the batch does not split evenly over the processes, or every checkpoint is
            corrupted.
        TrainingInterrupted: by a signal, after the step it came in, which is saved.
        RecoverableError: a checkpoint cannot be written, or another process of the job is gone.
    """
    config.check_processes(label, accelerator.num_processes)
    trainer = Trainer(task, config, accelerator, folder, label, seed=seed, bf16=bf16)
    try:
        return trainer.train(compile_networks=compile_networks, seconds_after=seconds_after)
    except RuntimeError as error:
        if accelerator.num_processes > 1 and is_peer_failure(error):
            problem = (
                f"{label}: another process of this job is gone or no longer answers; "
                f"{trainer.last_checkpoint_hint()}"
            )
            raise RecoverableError(problem) from error
        raise


class Trainer:
    """One training: `train` is the loop, the other methods are its parts in the order in which they
    are called."""

    context: StepContext
    """What each step uses; `train` sets it, after compiling."""

    def __init__(
        self,
        task: Task,
        config: TrainConfig,
        accelerator: Accelerator,
        folder: Path,
        label: str,
        *,
        seed: int,
        bf16: bool,
    ) -> None:
        self.task = task
        self.config = config
        self.accelerator = accelerator
        self.label = label
        self.seed = seed
        self.checkpoints = folder / "checkpoints"
        self.best = folder / "best"
        self.verified: set[Path] = set()
        """Checkpoints that were verified and need not be read again."""
        self.stop = 0
        """The signal after which all processes stop, 0 while there is none."""
        self.signals = SignalState()
        # Not accelerate's mixed precision, which patches `forward` permanently.
        self.autocast = partial(
            torch.autocast, accelerator.device.type, torch.bfloat16, enabled=bf16
        )
        # Build, on the CPU where the networks will be sharded; resume; then shard.
        self.networks = task.objective.networks
        sharded = can_shard(self.networks, accelerator)
        for network in self.networks.values():
            network.to("cpu" if sharded else accelerator.device).train()
        steppers = self.build(self.networks)
        self.state = self.resume(steppers)
        self.model = (
            FSDPModelState(self.networks, steppers, accelerator, self.build)
            if sharded
            else ModelState(self.networks, steppers, accelerator)
        )
        self.buffers = BufferSnapshot(
            self.model.networks.values() if config.max_nonfinite_steps else ()
        )
        self.batches = BatchPrefetcher(
            task.batch, config.steps, pin_memory=accelerator.device.type == "cuda"
        )

    def build(self, networks: Mapping[str, nn.Module]) -> Steppers:
        optimizers: Optimizers = {}
        for group, network in networks.items():
            optimizers |= optimizers_for(group, network, self.config)
        return Steppers(optimizers, EMA(networks))

    def resume(self, steppers: Steppers) -> State:
        """Restores the newest whole checkpoint, if there is one; returns its state."""
        if self.accelerator.is_main_process:
            clean_partial_writes(self.checkpoints)
            clean_partial_writes(self.best)
        self.accelerator.wait_for_everyone()
        found = load_newest(
            self.checkpoints, self.networks, steppers.optimizers, steppers.ema.shadow, self.warn
        )
        if found is None:
            return State(0)
        newest, state = found
        if self.accelerator.is_main_process:  # a kill may have come before pruning
            self.verified = prune_checkpoints(
                self.checkpoints, newest, self.config.save_total_limit, {newest}
            )
        self.say(f"resuming from {newest} (step {state.step})")
        if self.config.save_best and state.best:
            kept = newest_checkpoint(self.best)
            if problem := verify_checkpoint(kept) if kept else "it is gone":
                self.warn(
                    f"{kept or self.best} is corrupted ({problem}); the best weights are chosen "
                    "from here on alone"
                )
                state.best.clear()
        return state

    def train(self, *, compile_networks: bool, seconds_after: float | None) -> dict[str, float]:
        """The loop; returns the held-out metrics of the weights that it leaves in the networks."""
        config = self.config
        first = self.state.step
        metrics: dict[str, float] = {}
        on_cpu = self.accelerator.device.type == "cpu"
        threads = FreeThreads(config.threads, adapts=on_cpu, agreeing=2)
        with catch_signals() as self.signals, self.batches, threads:
            if compile_networks:
                self.model.compile(self.task.objective)
            self.context = self.step_context()
            shown = (
                seconds_after is not None and self.accelerator.is_main_process and shows_progress()
            )
            # The bar is closed before errors are reported, which would stand on its line otherwise.
            with ProgressBar(
                total=config.steps,
                initial=first,
                desc=self.label,
                seconds_after=seconds_after or 0.0,
                disable=not shown,
            ) as bar:
                log = _Log(self, bar)
                for step in range(first, config.steps):
                    start = time.perf_counter()
                    batch = self.batches.get(step)
                    waited = time.perf_counter() - start
                    if threads.update():
                        self.note_threads(threads)
                    scalars = self.train_step(step, to_device(batch, self.accelerator.device))
                    done = self.state.step
                    log.add(scalars, waited)
                    if done % config.log_every == 0 or self.saves(done):
                        log.write(done, metrics)
                    # Also after a signal: the choice of the best weights must not depend on it.
                    if done % config.eval_every == 0 or done == config.steps:
                        metrics = self.evaluate()
                        log.recent.restart()
                    if self.stop or done % config.save_every == 0 or done == config.steps:
                        self.save_checkpoint()
                    self.stop_if_asked(done)
        if seconds_after is not None:
            log.summarize()
        if first >= config.steps:  # nothing was left to train
            metrics = self.evaluate()
        metrics = self.load_final_weights(metrics)
        for network in self.networks.values():
            network.eval()
        return metrics

    def note_threads(self, threads: FreeThreads) -> None:
        """Says how the number of threads is unusual, and keeps it for the checkpoint."""
        if line := threads.line(self.state.threads):
            self.say(line)
        self.state.threads = torch.get_num_threads()

    def step_context(self) -> StepContext:
        networks = {group: self.model.for_training(group) for group in self.networks}
        micro_batches = self.config.resolved_batch(self.label)[1]
        return StepContext(
            self.task.objective,
            networks,
            self.accelerator,
            self.autocast,
            self.config.grad_clip,
            micro_batches,
        )

    def train_step(self, step: int, batch: Batch) -> dict[str, Tensor]:
        """One step; its scalars, none where it was skipped."""
        self.buffers.capture()
        torch.manual_seed(step_seed(self.seed, step, self.accelerator.process_index))
        gradients = backward_all(self.context, batch, step)
        nonfinite = self.sync_flags(gradients.scalars)
        if nonfinite:
            self.handle_nonfinite(step, gradients.scalars)
        rate = learning_rate(step, self.config)
        step_optimizers(self.model.optimizers, gradients.groups, rate, apply=not nonfinite)
        self.signals.begun = True
        self.state.step = step + 1
        if nonfinite:
            return {}
        self.model.ema.update(ema_decay(step, self.config))
        return gradients.scalars | {"lr": torch.tensor(rate)}

    def sync_flags(self, scalars: Mapping[str, Tensor]) -> bool:
        """Whether a loss or gradient norm is not finite on any process; also shares a signal to any
        process with all."""
        accelerator = self.accelerator
        bad, self.stop = all_reduce_flags(
            scalars, self.signals.number, accelerator.device, accelerator.num_processes > 1
        )
        return bad

    def handle_nonfinite(self, step: int, scalars: Mapping[str, Tensor]) -> None:
        """Rolls back what the forward passes changed and counts the step.

        Raises:
            FloatingPointError: there were as many such steps before as are allowed.
        """
        names, rows = self.nonfinite_sources(nonfinite_names(scalars), step)
        problem = nonfinite_message(names, rows, step)
        skipped = self.state.skipped
        if skipped >= self.config.max_nonfinite_steps:
            after = f"{skipped} such steps were skipped before; " if skipped else ""
            raise FloatingPointError(
                f"{self.label}: {problem}; {self.last_checkpoint_hint()}; {after}continue "
                f"and skip a few such steps ({self.label}.train.max_nonfinite_steps), or lower the "
                "learning rate and start again under another name (setting: name)"
            )
        self.buffers.restore()
        self.state.skipped += 1
        self.warn(f"{problem}; skipped, {self.state.skipped} of {self.config.max_nonfinite_steps}")

    def nonfinite_sources(self, names: list[str], step: int) -> tuple[list[str], list[str]]:
        """What was not finite in a step and in which images: those of the processes whose own loss
        was not, since all share the gradient."""
        own = (names, list(self.task.sample_names(step)))
        every: list[tuple[list[str], list[str]]] = [own]
        if self.accelerator.num_processes > 1:
            every = gather_object([own])
        sources = [one for one in every if any("loss" in name for name in one[0])] or every
        wrong = list(dict.fromkeys(name for names, _ in sources for name in names))
        return wrong, [row for _, rows in sources for row in rows]

    def saves(self, done: int) -> bool:
        """Whether metrics are due because something is saved after this step."""
        every = (self.config.eval_every, self.config.save_every)
        return done == self.config.steps or any(done % count == 0 for count in every)

    def evaluate(self) -> dict[str, float]:
        """Held-out metrics of the EMA weights; saves the weights if they are the best so far. The
        main process evaluates and the others wait: they take part in gathering sharded weights
        and in `main_process_io` alone."""
        task = self.task
        accelerator = self.accelerator
        state = self.state
        metrics: dict[str, float] = {}
        images: Mapping[str, np.ndarray] = {}
        with self.model.ema_weights(), self.autocast():
            if accelerator.is_main_process:
                metrics = task.objective.evaluate(task.eval_batches())
                images = task.sample_images()
        better = bool(
            self.config.save_best
            and metrics
            and metrics[task.best_metric] < state.best.get(task.best_metric, math.inf)
        )
        if self.config.save_best and self.model.saves_together:  # all take part in gathering
            better = bool(
                accelerator.reduce(torch.tensor(float(better), device=accelerator.device))
            )
        if better:
            state.best.clear()
            state.best.update(metrics)
            saved = self.model.checkpoint_state()
        if accelerator.is_main_process:
            self.track({f"held_out/{name}": value for name, value in metrics.items()})
            self.log_images(images)
        with self.main_process_io():
            if better and accelerator.is_main_process:
                save_checkpoint(self.best, state, replace(saved, optimizers={}), keep=1)
        return metrics

    def track(self, metrics: Mapping[str, float]) -> None:
        """Gives metrics of the last step to the trackers."""
        named = {f"{self.label}/{name}": value for name, value in metrics.items()}
        with write_errors(Path(self.accelerator.logging_dir or ".")):
            self.accelerator.log(named, step=self.state.step)

    def log_images(self, images: Mapping[str, np.ndarray]) -> None:
        named = {f"{self.label}/{name}": image[None] for name, image in images.items()}
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                with write_errors(Path(self.accelerator.logging_dir)):
                    tracker.log_images(named, step=self.state.step, **layout)

    def save_checkpoint(self) -> None:
        saved = self.model.checkpoint_state()
        with self.main_process_io():
            if self.accelerator.is_main_process:
                self.verified = save_checkpoint(
                    self.checkpoints,
                    self.state,
                    saved,
                    keep=self.config.save_total_limit,
                    verified=self.verified,
                )

    @contextmanager
    def main_process_io(self) -> Iterator[None]:
        """Around what the main process alone writes; the others wait and raise its error too."""
        problem: str | None = None
        try:
            yield
        except OSError as error:
            hint = self.last_checkpoint_hint()
            problem = (
                f"{self.label}: the checkpoint of step {self.state.step} could not be "
                f"written ({error}); {hint}"
            )
        if problem := broadcast_from_main(problem):
            raise RecoverableError(problem)

    def stop_if_asked(self, done: int) -> None:
        """Raises TrainingInterrupted after a signal; after the last step it checks once more, for
        one during the last evaluation."""
        if done == self.config.steps:
            self.sync_flags({})
        if self.stop:
            raise TrainingInterrupted(
                self.stop,
                f" after step {done} of {self.config.steps} ({self.label}), which is saved",
            )

    def load_final_weights(self, metrics: dict[str, float]) -> dict[str, float]:
        """Leaves the EMA weights, or with `save_best` the best ones, in the networks; returns their
        metrics."""
        if self.config.save_best and (chosen := newest_checkpoint(self.best)):
            try:
                ema = EMA(self.networks)
                best = load_checkpoint(chosen, self.networks, {}, ema.shadow).best
                ema.swap()
                return best
            except CorruptedCheckpoint as error:
                self.warn(
                    f"{chosen} is corrupted ({error}); the last weights take the place of the best"
                )
        self.model.load_ema()
        return metrics

    def last_checkpoint_hint(self) -> str:
        newest = newest_checkpoint(self.checkpoints)
        return f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"

    def say(self, line: str) -> None:
        _log.info(f"{self.label}: {line}")

    def warn(self, line: str) -> None:
        _log.warning(f"{self.label}: {line}")


class _Log:
    """What is logged and shown of a training: the newest scalars, throughput, and warnings."""

    def __init__(self, trainer: Trainer, bar: ProgressBar) -> None:
        self.trainer = trainer
        self.bar = bar
        batch_size = trainer.config.resolved_batch(trainer.label)[0]
        self.overall = ThroughputMeter(batch_size)
        self.recent = ThroughputMeter(batch_size)
        """Since the last line."""
        self.scalars: dict[str, Tensor] = {}
        self.checks = (trainer.task.check_health, GradNormMonitor().check)
        self.warned = [False, False]

    def add(self, scalars: Mapping[str, Tensor], waited: float) -> None:
        """Counts a step, which waited `waited` seconds for its batch."""
        # Not every step has every metric: batches with codes first have others.
        self.scalars |= scalars
        self.overall.step(waited)
        self.recent.step(waited)
        self.bar.update(1)

    def write(self, done: int, metrics: Mapping[str, float]) -> None:
        """Logs the means over all processes, and the warnings of the checks."""
        trainer = self.trainer
        processes = trainer.accelerator.num_processes
        scalars = mean_over_ranks(self.scalars, processes) | self.recent.metrics()
        if trainer.config.max_nonfinite_steps:
            scalars["skipped_steps"] = float(trainer.state.skipped)
        self.recent.restart()
        for i, check in enumerate(self.checks):
            warning = check(scalars, done)
            if warning and not self.warned[i]:  # once, and again if it comes back
                trainer.warn(warning)
            self.warned[i] = warning is not None
        self.bar.set_postfix_str(format_metrics(scalars, metrics), refresh=False)
        trainer.track(scalars)

    def summarize(self) -> None:
        if self.overall.steps:
            skipped = self.trainer.state.skipped
            self.trainer.say(
                self.overall.line()
                + (f"; steps skipped as not finite: {skipped}" if skipped else "")
            )
