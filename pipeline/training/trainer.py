"""`fit`: the accelerate loop for any objective. Knows steps, optimizers, averages and checkpoints; knows no stage and no data.

Every random number is a pure function of (seed, step, process), so a checkpoint needs no random state and no position in the
data: the batch of a step and its noise are made anew from the step's number.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm

from pipeline.config.train import TrainConfig
from pipeline.runtime.atomic_io import tidy
from pipeline.runtime.distributed import lost_process, told_by_main
from pipeline.runtime.signals import Caught, Resumable, Stopped, signals_caught
from pipeline.training.checkpoint import (
    DamagedCheckpoint,
    State,
    damage,
    load_checkpoint,
    load_newest,
    newest_checkpoint,
    prune,
    save_checkpoint,
)
from pipeline.training.ema import WeightAverage, average_decay
from pipeline.training.fsdp import Cut, Trained, can_cut
from pipeline.training.memory_estimate import estimated, to_device
from pipeline.training.monitoring import GradientWatch, Pace, agreed, broken, not_finite, over_processes, readable_figures
from pipeline.training.optimizers import optimizers_for
from pipeline.training.prefetch import Ahead
from pipeline.training.rehearsal import rehearse, steps_in_all, steps_to_time
from pipeline.training.snapshot import Undo, as_they_were
from pipeline.training.task import Task
from pipeline.training.train_step import _step, step_seed


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
    progress: bool = True,
) -> dict[str, float]:
    """Trains `task.objective` for `config.steps` steps, from the newest whole checkpoint in `folder`/checkpoints if there is one.

    Ends with the averaged weights in the objective's networks (the best ones with `config.keep_best`) and returns the last
    (or best) held-out figures.

    Raises:
        FloatingPointError: a loss or a gradient is not finite, more often than `config.skip_nonfinite` allows; names the step, its
            pictures and the last good checkpoint. The weights are those of the step before.
        ValueError: the batch does not split evenly over the processes, or every checkpoint is damaged.
        Stopped: by a signal, after the step it came in, which is saved, or before the first one.
        Resumable: a checkpoint cannot be written, or another process of the job is gone.
    """
    batch_size, accumulate = config.numbers()
    if batch_size % (accelerator.num_processes * accumulate):
        raise ValueError(
            f"train.batch_size {batch_size} does not split evenly over {accelerator.num_processes} processes with "
            f"train.accumulate {accumulate}; choose a multiple of both together"
        )
    training = _Training(task, config, accelerator, folder, label, bf16)
    try:
        return training.run(seed, compile_networks, progress)
    except RuntimeError as error:
        if accelerator.num_processes > 1 and lost_process(error):
            raise Resumable(f"{label}: another process of this job is gone or no longer answers; {training.good()}") from error
        raise


class _Training:
    """One call of `fit`: what its parts share."""

    def __init__(self, task: Task, config: TrainConfig, accelerator: Accelerator, folder: Path, label: str, bf16: bool) -> None:
        self.task, self.config, self.accelerator, self.folder, self.label = task, config, accelerator, folder, label
        self.checkpoints, self.whole = folder / "checkpoints", set[Path]()
        # Accelerate's own mixed precision patches `forward` for good; a context leaves the modules as they are.
        self.autocast = partial(torch.autocast, accelerator.device.type, torch.bfloat16, enabled=bf16)
        self.plain = dict(task.objective.networks)
        cut = can_cut(self.plain, accelerator)
        for network in self.plain.values():
            network.to("cpu" if cut else accelerator.device).train()
        self.state = State(0)
        optimizers, average = self.optimized(self.plain)
        self.go_on(optimizers, average)
        given = (self.plain, optimizers, average, accelerator)
        self.trained = Cut(*given, self.optimized) if cut else Trained(*given)
        self.undo = Undo(self.trained.networks.values() if config.skip_nonfinite else ())
        self.caught = Caught()
        self.ahead = Ahead(task.batch, config.steps, pin_memory=accelerator.device.type == "cuda")
        self.stop = 0
        """The signal after which all processes stop, 0 while there is none."""

    def optimized(self, networks: Mapping[str, nn.Module]) -> tuple[dict[str, Any], WeightAverage]:
        optimizers: dict[str, Any] = {}
        for group, network in networks.items():
            optimizers |= optimizers_for(group, network, self.config)
        return optimizers, WeightAverage(networks)

    def run(self, seed: int, compile_networks: bool, progress: bool) -> dict[str, float]:
        objective, config, accelerator, plain = self.task.objective, self.config, self.accelerator, self.plain
        first = self.state.step
        objective.networks.update(self.trained.networks)
        pace = Pace(config.numbers()[0])
        with signals_caught() as self.caught, self.ahead:
            if progress and first < config.steps:
                self.say_need(compile_networks)
            if compile_networks:
                self.trained.compile()
            for group in plain:
                objective.networks[group] = self.trained.for_training(group)
            if progress:
                self.say_time(seed)
            shown = progress and accelerator.is_main_process
            # The bar is closed before anything that stops the training is said, which would stand on the bar's line otherwise.
            with tqdm(total=config.steps, initial=first, desc=self.label, disable=not shown, mininterval=1.0) as bar:
                pace.restart()
                figures = self.steps(seed, bar, pace)
        if progress and pace.steps:
            skipped = f"; steps skipped as not finite: {self.state.skipped}" if self.state.skipped else ""
            accelerator.print(f"{self.label}: {pace.line()}{skipped}")
        for group, network in plain.items():
            objective.networks[group] = network
        if first >= config.steps:  # nothing was left to train: the figures are those of the checkpoint
            figures = self.evaluate()
        if config.keep_best and (chosen := newest_checkpoint(self.folder / "best")):
            try:
                average = WeightAverage(plain)
                figures = load_checkpoint(chosen, plain, {}, average.shadow).best
                average.swap()
            except DamagedCheckpoint as error:
                accelerator.print(f"{self.label}: {chosen} is damaged ({error}); the last weights take the place of the best")
                self.trained.end()
        else:
            self.trained.end()
        for network in plain.values():
            network.eval()
        return figures

    def say_need(self, compiled: bool) -> None:
        batch_size, accumulate = self.config.numbers()
        rows = batch_size // self.accelerator.num_processes // accumulate
        device = self.accelerator.device
        batch = to_device(self.ahead.take(self.state.step, keep=True), device)
        given = self.task.objective, self.config, device, self.autocast, batch, rows, self.trained
        need = estimated(*given, compiled=compiled, rehearsed=steps_in_all(self.config.steps - self.state.step))
        self.accelerator.print(f"{self.label}: {need.line(self.accelerator.num_processes)}")

    def say_time(self, seed: int) -> None:
        accelerator, first, steps = self.accelerator, self.state.step, self.config.steps

        def heard(scalars: dict[str, Tensor]) -> bool:
            bad, stop = agreed(scalars, self.caught.number, accelerator.device, accelerator.num_processes > 1)
            if stop:
                raise Stopped(stop, f" before step {first} of {steps} ({self.label}), which loses nothing")
            return not bad  # or what is not finite would fail the steps after it in other ways

        def step(number: int, batch: Any) -> None:
            self.take(seed, number, to_device(batch, accelerator.device), heard)

        def slowest(seconds: float) -> float:
            return max(gather_object([seconds])) if accelerator.num_processes > 1 else seconds

        if steps_to_time(steps - first):
            accelerator.print(f"{self.label}: taking a few steps to see how long all of them will take; they are taken back")
        moved = self.trained.networks.values(), self.trained.optimizers.values(), self.trained.average.shadow
        if rehearsed := rehearse(step, self.ahead, first, steps, self.task.begins, partial(as_they_were, *moved), slowest):
            accelerator.print(f"{self.label}: {rehearsed.line()}")
        if accelerator.device.type == "cuda":
            torch.cuda.empty_cache()  # moments that were dropped must not lie in the way of the first true ones

    def take(self, seed: int, step: int, batch: Any, finite: Callable[[dict[str, Tensor]], bool]) -> dict[str, Tensor]:
        """One step; its scalars, none where it was skipped."""
        self.undo.remember()
        torch.manual_seed(step_seed(seed, step, self.accelerator.process_index))
        given = self.task.objective, self.trained.optimizers, self.accelerator, self.autocast
        scalars = _step(*given, batch, step, self.config, finite)
        if scalars:
            self.trained.average.update(average_decay(step, self.config))
        return scalars

    def go_on(self, optimizers: dict[str, Any], average: WeightAverage) -> None:
        """From the newest whole checkpoint, if there is one."""
        best = self.folder / "best"
        if self.accelerator.is_main_process:
            tidy(self.checkpoints)
            tidy(best)
        self.accelerator.wait_for_everyone()
        say = self.accelerator.print
        found = load_newest(self.checkpoints, self.plain, optimizers, average.shadow, lambda line: say(f"{self.label}: {line}"))
        if found is None:
            return
        newest, self.state = found
        self.whole.add(newest)
        if self.accelerator.is_main_process:  # a kill may have come before the last one's turn
            prune(self.checkpoints, newest, self.config.keep_checkpoints, self.whole)
        say(f"{self.label}: going on from {newest} (step {self.state.step})")
        if self.config.keep_best and self.state.best:
            kept = newest_checkpoint(best)
            if problem := damage(kept) if kept else "it is gone":
                say(f"{self.label}: {kept or best} is damaged ({problem}); the best weights are chosen anew from here on")
                self.state.best.clear()

    def steps(self, seed: int, bar: tqdm, pace: Pace) -> dict[str, float]:
        """Every step that is left; returns the held-out figures after the last one."""
        config, accelerator, task, first = self.config, self.accelerator, self.task, self.state.step
        figures: dict[str, float] = {}
        recent: dict[str, Tensor] = {}
        alarms, warned = (task.alarm, GradientWatch().alarm), [False, False]
        latest, made = Pace(config.numbers()[0]), self.ahead.made
        for step in range(first, config.steps):
            for clock in (pace, latest) if step == first + made else ():  # batches that were rehearsed were there to be taken
                clock.restart()
            start = time.perf_counter()
            batch = self.ahead.take(step)
            waited = time.perf_counter() - start
            # Not every step has every figure: batches with codes first have others.
            recent = recent | self.take(seed, step, to_device(batch, accelerator.device), partial(self.finite, step))
            self.caught.begun = True
            self.state.step = done = step + 1
            for clock in (pace, latest):
                clock.step(waited)
            bar.update(1)
            if done % config.log_every == 0 or self.saves(done):
                said = over_processes(recent, accelerator.num_processes) | latest.figures()
                if config.skip_nonfinite:
                    said["skipped_steps"] = float(self.state.skipped)
                latest.restart()
                for i, alarm in enumerate(alarms):
                    warning = alarm(said, done)
                    if warning and not warned[i] and accelerator.is_main_process:  # said once, and again where it comes back
                        bar.write(f"{self.label}: {warning}")
                    warned[i] = warning is not None
                bar.set_postfix_str(readable_figures(said, figures), refresh=False)
                accelerator.log({f"{self.label}/{k}": v for k, v in said.items()}, step=done)
            # Also where a signal came: what is chosen as the best must not depend on it.
            if done % config.evaluate_every == 0 or done == config.steps:
                figures = self.evaluate()
                latest.restart()
            if self.stop or done % config.checkpoint_every == 0 or done == config.steps:
                self.checkpoint()
            if done == config.steps:  # or one that came during the last evaluation would be forgotten
                self.finite(step, {})
            if self.stop:
                raise Stopped(self.stop, f" after step {done} of {config.steps} ({self.label}), which is saved")
        return figures

    def saves(self, done: int) -> bool:
        every = (self.config.evaluate_every, self.config.checkpoint_every)
        return done == self.config.steps or any(done % count == 0 for count in every)

    def finite(self, step: int, scalars: Mapping[str, Tensor]) -> bool:
        """Whether a step may move the weights, for all processes; one that may not is an error, or is undone and counted."""
        accelerator = self.accelerator
        bad, self.stop = agreed(scalars, self.caught.number, accelerator.device, accelerator.num_processes > 1)
        if not bad:
            return True
        problem = not_finite(*self.culprits(broken(scalars), step), step)
        if self.state.skipped >= self.config.skip_nonfinite:
            after = f"{self.state.skipped} such steps were skipped before; " if self.state.skipped else ""
            raise FloatingPointError(
                f"{self.label}: {problem}; {self.good()}; {after}lower the learning rate, and start again under another name (--name) or "
                f"without this run's folder; or go on and skip a few such steps: {self.label}.train.skip_nonfinite"
            )
        self.undo.restore()
        self.state.skipped += 1
        if accelerator.is_main_process:
            tqdm.write(f"{self.label}: {problem}; skipped, {self.state.skipped} of {self.config.skip_nonfinite}")
        return False

    def culprits(self, names: list[str], step: int) -> tuple[list[str], list[str]]:
        """What was not finite in a step and in which pictures: of the processes whose own loss was not, as a gradient is everybody's."""
        own = (names, list(self.task.rows(step)))
        every = gather_object([own]) if self.accelerator.num_processes > 1 else [own]
        guilty = [one for one in every if any("loss" in name for name in one[0])] or every
        return list(dict.fromkeys(name for names, _ in guilty for name in names)), [row for _, rows in guilty for row in rows]

    def good(self) -> str:
        newest = newest_checkpoint(self.checkpoints)
        return f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"

    @contextmanager
    def written_by_main(self) -> Iterator[None]:
        """Around what the main process alone writes; the others wait and learn whether it could."""
        problem: str | None = None
        try:
            yield
        except OSError as error:
            problem = f"{self.label}: the checkpoint of step {self.state.step} could not be written ({error}); {self.good()}"
        if problem := told_by_main(problem):
            raise Resumable(problem)

    def checkpoint(self) -> None:
        networks, optimizers, average = self.trained.saved()
        with self.written_by_main():
            if self.accelerator.is_main_process:
                save_checkpoint(
                    self.checkpoints, self.state, networks, optimizers, average, keep=self.config.keep_checkpoints, whole=self.whole
                )

    def evaluate(self) -> dict[str, float]:
        """On the main process alone: but for putting averaged weights together and writing, nothing talks to the others."""
        figures: dict[str, float] = {}
        label, accelerator, step, best = self.label, self.accelerator, self.state.step, self.state.best
        with self.trained.averaged():
            if accelerator.is_main_process:
                with self.autocast():
                    figures = self.task.objective.evaluate(self.task.held_out())
                    pictures = self.task.pictures()
        better = bool(self.config.keep_best and figures and figures[self.task.best] < best.get(self.task.best, math.inf))
        if self.config.keep_best and isinstance(self.trained, Cut):  # gathering takes part of all
            better = bool(accelerator.reduce(torch.tensor(float(better), device=accelerator.device)))
        if better:
            best.clear()
            best.update(figures)
            networks, _, average = self.trained.saved()
        if accelerator.is_main_process:
            accelerator.log({f"{label}/held_out/{k}": v for k, v in figures.items()}, step=step)
            for tracker in accelerator.trackers:
                if hasattr(tracker, "log_images"):
                    layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                    tracker.log_images({f"{label}/{k}": v[None] for k, v in pictures.items()}, step=step, **layout)
        with self.written_by_main():
            if better and accelerator.is_main_process:
                save_checkpoint(self.folder / "best", self.state, networks, {}, average, keep=1)
        return figures
