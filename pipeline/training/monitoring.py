"""What is watched in every step: numbers that are not finite, gradients that grow, time spent
waiting. Knows scalars; knows no stage."""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from torch import Tensor

_NAMED = 8
"""Rows of a batch that are named."""


def nonfinite_names(scalars: Mapping[str, Tensor]) -> list[str]:
    """The losses and gradient norms that are not finite. A finite loss with a gradient that is not
    breaks the weights all the same."""
    return [
        name
        for name, value in scalars.items()
        if ("loss" in name or "grad_norm" in name) and not math.isfinite(value)
    ]


def all_reduce_flags(
    scalars: Mapping[str, Tensor], stop: int, device: torch.device, several: bool
) -> tuple[bool, int]:
    """Whether a loss or a gradient norm of this step is not finite on any process, and the highest
    signal that any of them caught: the same answer on all, so that all skip and stop at the same
    step.

    The one number that is read from the device in a step, after the gradients and before the
    weights change.
    """
    watched = [value for name, value in scalars.items() if "loss" in name or "grad_norm" in name]
    bad = torch.tensor(False, device=device)
    if watched:
        bad = (
            ~torch.stack([value.detach().float().to(device) for value in watched]).isfinite().all()
        )
    if not several:
        return bool(bad), stop
    flags = torch.stack([bad.float(), torch.tensor(float(stop), device=device)])
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    bad, stop = flags.tolist()
    return bool(bad), int(stop)


def nonfinite_message(names: Sequence[str], rows: Sequence[str], step: int) -> str:
    """What was not finite in a step, and where: 'loss is not finite at step 5 (row 3, row 17)'."""
    shown = ", ".join(rows[:_NAMED]) + (
        f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    )
    return f"{', '.join(names)} is not finite at step {step}" + (f" ({shown})" if rows else "")


class GradNormMonitor:
    """Warns when a gradient's norm is far above what it was in the last logs."""

    FACTOR = 10
    LOGS = 50
    """Logged norms that the median is taken of."""
    AFTER = 5
    """Logs before the first warning."""

    def __init__(self) -> None:
        self._seen: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=self.LOGS))

    def check(self, scalars: Mapping[str, float], step: int) -> str | None:
        """One line on a norm above FACTOR times its median, or None; takes the norms in."""
        warning = None
        for name in (name for name in scalars if name.endswith("grad_norm")):
            seen, norm = self._seen[name], scalars[name]
            if len(seen) >= self.AFTER and norm > self.FACTOR * (usual := statistics.median(seen)):
                what = name.replace("grad_norm", "gradient norm").replace("_", " ")
                warning = (
                    f"{what} is {norm:.3g} at step {step}, and {usual:.3g} in the median of the "
                    f"last {len(seen)} logs; "
                    "if it stays there, lower train.learning_rate or train.grad_clip"
                )
            seen.append(norm)
        return warning


class ThroughputMeter:
    """Images per second, and the share of the time that was spent waiting for them, since the start
    or the last `restart`."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.restart()

    def restart(self) -> None:
        self.steps, self.waited, self.start = 0, 0.0, time.perf_counter()

    def step(self, waited: float) -> None:
        """A step was made, `waited` seconds of it waiting for its batch."""
        self.steps += 1
        self.waited += waited

    @property
    def seconds(self) -> float:
        return max(time.perf_counter() - self.start, 1e-9)

    def metrics(self) -> dict[str, float]:
        seconds = self.seconds
        return {
            "images_per_second": self.steps * self.batch_size / seconds,
            "data_wait_fraction": self.waited / seconds,
        }

    def line(self) -> str:
        figures = self.metrics()
        return (
            f"{self.seconds / 60:.1f} minutes, {figures['images_per_second']:,.0f} pictures/s, "
            f"{figures['data_wait_fraction']:.1%} of it waiting for data"
        )


def mean_over_ranks(scalars: Mapping[str, Tensor], processes: int) -> dict[str, float]:
    """Figures of the whole batch: the mean over the processes that have each. Every process calls
    this, at the same steps."""
    own = {name: float(value) for name, value in scalars.items()}
    everybodys = gather_object([own]) if processes > 1 else [own]
    names = dict.fromkeys(name for figures in everybodys for name in figures)
    return {
        name: statistics.fmean(figures[name] for figures in everybodys if name in figures)
        for name in names
    }


def format_metrics(scalars: Mapping[str, float], figures: Mapping[str, float]) -> str:
    """Figures of a step and of the last evaluation in one line."""
    parts = [f"{k} {v:.4g}" for k, v in scalars.items() if "grad_norm" not in k and k != "lr"]
    parts += [f"held-out {k} {v:.4g}" for k, v in list(figures.items())[:2]]
    return ", ".join(parts)
