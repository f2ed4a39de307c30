"""`fit`: the accelerate loop for any objective. Knows steps, optimizers, averages and checkpoints; knows no stage and no data.

Every random number is a pure function of (seed, step, process), so a checkpoint needs no random state and no position in the
data: the batch of a step and its noise are made anew from the step's number.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from pipeline.checkpoints import load_checkpoint, newest_checkpoint, save_checkpoint
from pipeline.config import TrainConfig
from pipeline.estimate import Forecast, estimated, to_device
from pipeline.muon import Muon
from pipeline.sharding import Cut, Trained, can_cut, whole


class Loss(Protocol):
    """One loss to step: for the optimizer of `group`."""

    @property
    def group(self) -> str: ...
    @property
    def value(self) -> Tensor: ...
    @property
    def metrics(self) -> dict[str, Tensor]: ...


class Objective(Protocol):
    """What `fit` minimises. `networks` holds a module an optimizer, by group; the loop puts wrapped ones in their place, and
    `losses` calls those, so that gradients are averaged over processes."""

    networks: dict[str, nn.Module]

    def losses(self, batch: Any, step: int) -> Iterator[Loss]: ...
    def evaluate(self, batches: Iterable[Any]) -> dict[str, float]: ...


@dataclass
class Task:
    """What a stage hands to `fit`.

    Attributes:
        batch: (step) -> this process's part of the batch of that step, on the CPU; a pure function of the step.
        held_out: () -> batches to evaluate on.
        best: name of the held-out figure that says which weights are best (smaller is better).
        pictures: () -> name -> uint8 (H,W,3) grids to log at each evaluation, made with the averaged weights.
        alarm: (scalars, step) -> a line that warns of something wrong with training and says what to do, or None.
    """

    objective: Objective
    batch: Callable[[int], Any]
    held_out: Callable[[], Iterable[Any]]
    best: str
    pictures: Callable[[], Mapping[str, Any]]
    alarm: Callable[[Mapping[str, float], int], str | None] = lambda scalars, step: None


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then down to `final_learning_rate` of the peak at the last step by the schedule."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    floor = config.final_learning_rate
    if config.schedule == "wsd":
        falling = max(round(config.decay_share * config.steps), 1)
        left = min((config.steps - step) / falling, 1.0)
        return config.learning_rate * (floor + (1 - floor) * left)
    span = max(config.steps - config.warmup_steps, 1)
    progress = min((step - config.warmup_steps) / span, 1.0)
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def average_decay(step: int, config: TrainConfig) -> float:
    """Decay of the weight average: short at first, so that the random start is forgotten."""
    return min(config.ema_decay, (1 + step) / (10 + step))


def step_seed(seed: int, step: int, process: int) -> int:
    """One seed for torch's generators; distinct for each step and process."""
    return (seed * 1_000_003 + step) * 4096 + process


def optimizers_for(group: str, network: nn.Module, config: TrainConfig) -> dict[str, torch.optim.Optimizer]:
    """A group's optimizers by name, `GROUP/KIND`. AdamW decays tensors of two or more dimensions only."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizers: dict[str, torch.optim.Optimizer] = {}
    if config.optimizer == "muon":
        matrices = network.hidden_matrices()  # type: ignore[operator]
        chosen = {id(p) for p in matrices}
        parameters = [p for p in parameters if id(p) not in chosen]
        optimizers[f"{group}/muon"] = Muon(matrices, lr=config.learning_rate, weight_decay=config.weight_decay)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers[f"{group}/adamw"] = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
    return optimizers


class WeightAverage:
    """Exponential moving average of every parameter; buffers (codebook statistics are averages already) are not averaged, nor is what a
    module's `jumping_parameters` names."""

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        self.parameters: list[Tensor] = [p for network in networks.values() for p in network.parameters()]
        self.shadow = [p.detach().clone() for p in self.parameters]
        modules = (module for network in networks.values() for module in network.modules())
        jumping = {id(p) for module in modules for p in getattr(module, "jumping_parameters", list)()}
        self._jumping = [i for i, p in enumerate(self.parameters) if id(p) in jumping]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        torch._foreach_lerp_(self.shadow, self.parameters, 1 - decay)
        for i in self._jumping:
            self.shadow[i].copy_(self.parameters[i])

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the averaged weights with the trained ones; called again, it puts them back."""
        for parameter, average in zip(self.parameters, self.shadow, strict=True):
            held = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(held)


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
        FloatingPointError: the loss is not finite; names the step and the last good checkpoint.
        ValueError: the batch does not split evenly over the processes.
    """
    objective = task.objective
    batch_size, accumulate = config.numbers()
    if batch_size % (accelerator.num_processes * accumulate):
        raise ValueError(
            f"train.batch_size {batch_size} does not split evenly over {accelerator.num_processes} processes with "
            f"train.accumulate {accumulate}; choose a multiple of both together"
        )
    # Accelerate's own mixed precision patches `forward` for good; a context leaves the modules as they are.
    autocast = partial(torch.autocast, accelerator.device.type, torch.bfloat16, enabled=bf16)
    plain = dict(objective.networks)
    cut = can_cut(plain, accelerator)
    for network in plain.values():
        network.to("cpu" if cut else accelerator.device).train()

    def optimized(networks: Mapping[str, nn.Module]) -> tuple[dict[str, Any], WeightAverage]:
        optimizers: dict[str, Any] = {}
        for group, network in networks.items():
            optimizers |= optimizers_for(group, network, config)
        return optimizers, WeightAverage(networks)

    optimizers, average = optimized(plain)
    checkpoints = folder / "checkpoints"
    first, best = 0, dict[str, float]()
    if newest := newest_checkpoint(checkpoints):
        first, best = load_checkpoint(newest, plain, optimizers, average.shadow)
        accelerator.print(f"{label}: going on from {newest} (step {first})")
    trained = Cut(plain, optimizers, average, accelerator, optimized) if cut else Trained(plain, optimizers, average, accelerator)
    optimizers, average = trained.optimizers, trained.average
    objective.networks.update(trained.networks)
    if progress and first < config.steps:
        rows = batch_size // accelerator.num_processes // accumulate
        batch = to_device(task.batch(0), accelerator.device)
        need = estimated(objective, config, accelerator.device, autocast, batch, rows, trained, compiled=compile_networks)
        accelerator.print(f"{label}: {need.line(accelerator.num_processes)}")
    if compile_networks:
        trained.compile()
    for group in plain:
        objective.networks[group] = trained.for_training(group)

    def checkpoint(step: int) -> None:
        networks, moments, averages = trained.saved()
        if accelerator.is_main_process:
            save_checkpoint(checkpoints, step, best, networks, moments, averages, keep=config.keep_checkpoints)
        accelerator.wait_for_everyone()

    def evaluate(step: int) -> dict[str, float]:
        """On the main process alone: but for putting the averaged weights together and keeping the best, nothing talks to the others."""
        figures: dict[str, float] = {}
        with trained.averaged():
            if accelerator.is_main_process:
                with autocast():
                    figures = objective.evaluate(task.held_out())
                    pictures = task.pictures()
        better = accelerator.is_main_process and config.keep_best and figures[task.best] < best.get(task.best, math.inf)
        if config.keep_best and cut:
            better = bool(accelerator.reduce(torch.tensor(float(better), device=accelerator.device)))
        if better:
            best.clear()
            best.update(figures)
            networks, _, averages = trained.saved()
        if accelerator.is_main_process:
            accelerator.log({f"{label}/held_out/{k}": v for k, v in figures.items()}, step=step)
            for tracker in accelerator.trackers:
                if hasattr(tracker, "log_images"):
                    layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                    tracker.log_images({f"{label}/{k}": v[None] for k, v in pictures.items()}, step=step, **layout)
            if better:
                save_checkpoint(folder / "best", step, best, networks, {}, averages, keep=1)
        accelerator.wait_for_everyone()
        return figures

    figures: dict[str, float] = {}
    bar = tqdm(total=config.steps, initial=first, desc=label, disable=not (progress and accelerator.is_main_process), mininterval=1.0)
    recent: dict[str, Tensor] = {}
    warned: str | None = None
    since, since_step, forecast = time.perf_counter(), first, Forecast(first, config.steps)
    # The bar is closed before anything that stops the training is said, which would stand on the bar's line otherwise.
    with bar, ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        ahead = pool.submit(task.batch, first) if first < config.steps else None
        for step in range(first, config.steps):
            assert ahead is not None
            batch = to_device(ahead.result(), accelerator.device)
            ahead = pool.submit(task.batch, step + 1) if step + 1 < config.steps else None
            torch.manual_seed(step_seed(seed, step, accelerator.process_index))
            # Not every step has every figure: batches with codes first have others.
            recent = recent | _step(objective, optimizers, accelerator, autocast, batch, step, config)
            average.update(average_decay(step, config))
            done = step + 1
            bar.update(1)
            if (line := forecast.after(done)) and progress and accelerator.is_main_process:
                bar.write(f"{label}: {line}")
            saves = done % config.evaluate_every == 0 or done % config.checkpoint_every == 0 or done == config.steps
            if saves or done % config.log_every == 0:
                scalars = over_processes(recent, accelerator)
                _stop_unless_finite(scalars, step, label, newest_checkpoint(checkpoints))
                now = time.perf_counter()
                scalars["pictures_per_second"] = (done - since_step) * batch_size / max(now - since, 1e-9)
                since, since_step = now, done
                warning = task.alarm(scalars, done)
                if warning and not warned and accelerator.is_main_process:  # said once, and again where it comes back
                    bar.write(f"{label}: {warning}")
                warned = warning
                bar.set_postfix_str(_readable(scalars, figures), refresh=False)
                accelerator.log({f"{label}/{k}": v for k, v in scalars.items()}, step=done)
            if done % config.evaluate_every == 0 or done == config.steps:
                figures = evaluate(done)
                since, since_step = time.perf_counter(), done
            if done % config.checkpoint_every == 0 or done == config.steps:
                checkpoint(done)
    for group, network in plain.items():
        objective.networks[group] = network
    if first >= config.steps:  # nothing was left to train: the figures are those of the checkpoint
        figures = evaluate(config.steps)
    if config.keep_best and (chosen := newest_checkpoint(folder / "best")):
        average = WeightAverage(plain)
        _, figures = load_checkpoint(chosen, plain, {}, average.shadow)
        average.swap()
    else:
        trained.end()
    for network in plain.values():
        network.eval()
    return figures


def _step(
    objective: Objective,
    optimizers: dict[str, Any],
    accelerator: Accelerator,
    autocast: Callable[[], Any],
    batch: Any,
    step: int,
    config: TrainConfig,
) -> dict[str, Tensor]:
    """One step of every group in the order in which the objective yields its losses; returns scalars, still on the device."""
    scalars: dict[str, Tensor] = {}
    # Each part of the batch goes as far as its next loss, and that loss's gradient is taken, before the next part begins.
    parts = [objective.losses(part, step) for part in _parts(batch, config.numbers()[1])]
    while True:
        of_parts: list[dict[str, Tensor]] = []
        for losses in parts:
            with autocast():
                loss = next(losses, None)
            if loss is None:
                return scalars
            accelerator.backward(loss.value / len(parts))
            of_parts.append({"loss": loss.value.detach(), **loss.metrics})
            group = loss.group
            del loss  # or its graph would stay while the next part's is built
        mean = {name: torch.stack([torch.as_tensor(part[name]) for part in of_parts]).float().mean() for name in of_parts[0]}
        own = [optimizer for name, optimizer in optimizers.items() if name.startswith(f"{group}/")]
        rate = learning_rate(step, config)
        for options in (o for optimizer in own for o in optimizer.param_groups):
            options["lr"] = rate
        norm = whole(accelerator.clip_grad_norm_(objective.networks[group].parameters(), config.grad_clip))
        for optimizer in own:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        prefix = "" if group in ("tokenizer", "prior") else f"{group}_"
        scalars |= {f"{prefix}loss": mean.pop("loss"), f"{prefix}gradient_norm": norm, "learning_rate": torch.tensor(rate)}
        scalars |= mean


def over_processes(scalars: Mapping[str, Tensor], accelerator: Accelerator) -> dict[str, float]:
    """Figures of the whole batch: the mean of those of each process's part. Every process calls this, at the same steps."""
    values = torch.stack([value.detach().float().to(accelerator.device) for value in scalars.values()])
    return dict(zip(scalars, accelerator.reduce(values, "mean").tolist(), strict=True))


def _parts(batch: Any, count: int) -> list[Any]:
    """A batch, or a mapping of batches, in equal parts."""
    if isinstance(batch, Mapping):
        split = {key: value.chunk(count) for key, value in batch.items()}
        return [{key: value[i] for key, value in split.items()} for i in range(count)]
    return list(batch.chunk(count))


def _stop_unless_finite(scalars: Mapping[str, float], step: int, label: str, good: Path | None) -> None:
    # A finite loss with a gradient that is not has broken the weights all the same.
    broken = [name for name, value in scalars.items() if ("loss" in name or "gradient_norm" in name) and not math.isfinite(value)]
    if broken:
        raise FloatingPointError(
            f"{label}: {', '.join(broken)} is not finite at step {step}; "
            + (f"the last good checkpoint is {good}" if good else "there is no checkpoint yet")
            + "; lower the learning rate, and start again under another name (--name) or without this run's folder"
        )


def _readable(scalars: Mapping[str, float], figures: Mapping[str, float]) -> str:
    parts = [f"{k} {v:.4g}" for k, v in scalars.items() if "gradient_norm" not in k and k != "learning_rate"]
    parts += [f"held-out {k} {v:.4g}" for k, v in list(figures.items())[:2]]
    return ", ".join(parts)
