"""Steps of training and images per second beside a program that keeps one core busy, relative to
those on a quiet machine.

    python -m benchmarks.busy [--bundle runs/shapes/bundle] [--rounds N] [--seconds S] [--policies]
        [--anyway] [--out FILE]

The sides of each work run in turn, each in a process of its own, first quiet, then beside a busy
program:

- `fixed`: `OMP_NUM_THREADS` is the number of cores, so that nothing adapts;
- `ours`: the default, which follows the cores that are free;
- with `--policies` also `fixed` with waiting policies of OpenMP, which are set before torch loads.

The first seconds, in which a side adapts, are not counted. The goals (on two cores): quiet, ours
keeps 97% of fixed; beside the busy program, training keeps 50% and sampling 80% of the quiet speed.
Sampling four images again and again stands for the steps of a server. Steps of training are not
compiled.

It refuses to start while other programs compute; `--anyway` measures all the same.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.timing import machine
from pipeline.runtime.threads import FreeCores, usable_cores

SETTLE = 5.0
"""Seconds that a side has to adapt before it is measured."""
WORKS = {"tokenizer": 0.5, "prior": 0.5, "1 image": 0.8, "4 images": 0.8}
"""Each work, with the fraction of its quiet speed that it keeps beside a busy program."""
POLICIES = {
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "spin 10,000": {"GOMP_SPINCOUNT": "10000"},
    "spin 1,000": {"GOMP_SPINCOUNT": "1000"},
}
"""libgomp's, which torch's wheels for Linux carry: sleep at once, or after so many looks."""
_PROMPT = "a red circle left of a blue square"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bundle", type=Path, default=Path("runs/shapes/bundle"))
    parser.add_argument("--works", nargs="+", choices=list(WORKS), default=list(WORKS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--policies", action="store_true")
    parser.add_argument("--anyway", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker")  # a side's own process
    options = parser.parse_args()
    # A termination ends the busy program, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if options.worker:
        print(json.dumps(rate(options.worker, options.bundle, options.seconds)))
        return
    others = load_of_others()
    if others > 0.1 and not options.anyway:
        sys.exit(
            f"other programs use {others:.1f} cores, so that nothing here would be quiet; stop "
            "them, or add --anyway"
        )
    cores = str(len(usable_cores()))
    sides: dict[str, dict[str, str]] = {"fixed": {"OMP_NUM_THREADS": cores}, "ours": {}}
    if options.policies:
        sides |= {name: sides["fixed"] | policy for name, policy in POLICIES.items()}
    print(f"{machine()}; load of other programs at the start: {others:.2f} cores")
    found = {work: measure(work, sides, options) for work in options.works}
    if options.out:
        options.out.write_text(json.dumps({"machine": machine(), **found}, indent=2) + "\n")


def measure(
    work: str, sides: dict[str, dict[str, str]], options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Median rates of each side, quiet and busy, by turns; prints them."""
    rates: dict[str, dict[str, list[float]]] = {name: {"quiet": [], "busy": []} for name in sides}
    for _ in range(options.rounds):
        for name, environment in sides.items():
            rates[name]["quiet"].append(rate_of_side(work, environment, options))
            with busy_program():
                rates[name]["busy"].append(rate_of_side(work, environment, options))
    medians = {
        name: {when: statistics.median(values) for when, values in side.items()}
        for name, side in rates.items()
    }
    unit = "images/s" if "image" in work else "steps/s"
    quiet = medians["fixed"]["quiet"]
    print(f"{work} ({unit})")
    for name, side in medians.items():
        shares = ", ".join(f"{when} {v:7.2f} ({v / quiet:4.0%})" for when, v in side.items())
        print(f"  {name:<12} {shares}", flush=True)
    ours = medians["ours"]
    held = ours["quiet"] / quiet >= 0.97 and ours["busy"] / quiet >= WORKS[work]
    print(f"  goal (97% quiet, {WORKS[work]:.0%} busy): {'held' if held else 'missed'}", flush=True)
    return medians


def rate_of_side(work: str, environment: dict[str, str], options: argparse.Namespace) -> float:
    """The rate of a process of its own."""
    named = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    others = {name: value for name, value in os.environ.items() if name not in named}
    command = [sys.executable, "-m", "benchmarks.busy", "--worker", work]
    command += ["--bundle", str(options.bundle), "--seconds", str(options.seconds)]
    done = subprocess.run(
        command, env=others | environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return float(json.loads(done.stdout.splitlines()[-1]))


@contextmanager
def busy_program() -> Iterator[None]:
    """Meanwhile another program, in a session of its own, keeps one core busy."""
    program = subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
    try:
        yield
    finally:
        program.kill()
        program.wait()


def load_of_others() -> float:
    """Cores that other programs use, over two seconds."""
    cores = FreeCores()
    time.sleep(2.0)
    cores.update()
    return len(usable_cores()) - (cores.free or 0.0)


def rate(work: str, bundle: Path, seconds: float) -> float:
    """Steps or images per second of this process, once it has adapted."""
    from pipeline.runtime.devices import tune_malloc

    tune_malloc()
    if "image" in work:
        return sampling_rate(int(work.split()[0]), bundle, seconds)
    return training_rate(work, seconds)


class _Counter:
    """Counts calls from SETTLE to SETTLE + `seconds` after the first one."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.started = time.perf_counter()
        self.first: float | None = None
        self.calls = 0

    def is_done(self) -> bool:
        """To be called before each unit of work."""
        now = time.perf_counter()
        if now - self.started < SETTLE:
            return False
        if self.first is None:
            self.first = now
            return False
        self.calls += 1
        self.last = now
        return now - self.first > self.seconds

    @property
    def rate(self) -> float:
        assert self.first is not None
        return self.calls / (self.last - self.first)


def sampling_rate(images: int, bundle: Path, seconds: float) -> float:
    from pipeline import TextToImagePipeline

    pipe = TextToImagePipeline.from_pretrained(bundle)
    counter = _Counter(seconds)
    while not counter.is_done():
        pipe([_PROMPT] * images, seed=counter.calls, compile="off")
    return counter.rate * images


class _Enough(Exception):
    """Ends a training that was measured."""


def training_rate(stage: str, seconds: float) -> float:
    """Steps per second of `fit` on one batch of arbitrary rows."""
    import torch
    from accelerate import Accelerator

    from pipeline.config.load import load_experiment
    from pipeline.runtime.devices import uses_bf16
    from pipeline.stages.estimate import trial_objective
    from pipeline.training.task import Objective, Task
    from pipeline.training.trainer import fit
    from stage1_tokenizer import TokenizerModule, TokenizerObjective

    experiment = load_experiment(["--config", "configs/emoji.yaml"])
    tokenizer = TokenizerModule(experiment.tokenizer.model)
    config = experiment.tokenizer.train if stage == "tokenizer" else experiment.prior.train
    rows, _ = config.resolved_batch(stage)
    objective: Objective
    if stage == "tokenizer":
        objective = TokenizerObjective(tokenizer, experiment.tokenizer.objective)
        batch = torch.randint(0, 256, (rows, *experiment.data.size, 3), dtype=torch.uint8)
    else:
        objective, batch = trial_objective(experiment, tokenizer, rows)
    counter = _Counter(seconds)
    counted = _counted(objective.losses, counter)
    objective.losses = counted  # type: ignore[method-assign]
    task = Task(objective, lambda step: batch, lambda: [], "nll", dict)
    accelerator = Accelerator(cpu=True)
    config.steps = 10**6
    config.eval_every = config.steps
    config.save_every = config.steps
    with TemporaryDirectory() as folder, suppress(_Enough):
        fit(
            task,
            config,
            accelerator,
            Path(folder),
            seed=0,
            compile_networks=False,
            bf16=uses_bf16(experiment.precision, accelerator.device),
            label=stage,
            seconds_after=None,
        )
    return counter.rate


def _counted(losses: Callable, counter: _Counter) -> Callable:
    def watched(*arguments: object) -> object:
        if counter.is_done():
            raise _Enough
        return losses(*arguments)

    return watched


if __name__ == "__main__":
    main()
