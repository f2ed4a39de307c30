"""What is monitored in every step: numbers that are not finite, growing gradients, time spent
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
    """The losses and gradient norms that are not finite. A finite loss may have a gradient that is
    not, which breaks the weights too."""
    return [
        name
        for name, value in scalars.items()
        if ("loss" in name or "grad_norm" in name) and not math.isfinite(value)
    ]


def all_reduce_flags(
    scalars: Mapping[str, Tensor], stop: int, device: torch.device, several: bool
) -> tuple[bool, int]:
    """Whether a loss or a gradient norm of this step is not finite on any process, and the highest
    signal that any process caught. The answer is the same on all, so that all skip and stop at the
    same step.

    It is the one number that a step reads from the device, after the gradients and before the
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
    """Warns when a gradient norm is far above that of the last logs."""

    FACTOR = 10
    LOGS = 50
    """Logged norms that the median is taken of."""
    AFTER = 5
    """Logs before the first warning."""

    def __init__(self) -> None:
        self._seen: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=self.LOGS))

    def check(self, scalars: Mapping[str, float], step: int) -> str | None:
        """One line on a norm above FACTOR times its median, or None; records the norms."""
        warning = None
        for name in (name for name in scalars if name.endswith("grad_norm")):
            seen = self._seen[name]
            norm = scalars[name]
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
    """Images per second, and the fraction of the time spent waiting for them, since the start or
    the last `restart`."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.restart()

    def restart(self) -> None:
        self.steps = 0
        self.waited = 0.0
        self.start = time.perf_counter()

    def step(self, waited: float) -> None:
        """Counts a step, which waited `waited` seconds for its batch."""
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
        metrics = self.metrics()
        return (
            f"{self.seconds / 60:.1f} minutes, {metrics['images_per_second']:,.0f} images/s, "
            f"{metrics['data_wait_fraction']:.1%} of it waiting for data"
        )


def mean_over_ranks(scalars: Mapping[str, Tensor], processes: int) -> dict[str, float]:
    """Metrics of the whole batch: the mean over the processes that have each. Every process calls
    this, at the same steps."""
    own = {name: float(value) for name, value in scalars.items()}
    every: list[dict[str, float]] = gather_object([own]) if processes > 1 else [own]
    names = dict.fromkeys(name for metrics in every for name in metrics)
    return {
        name: statistics.fmean(metrics[name] for metrics in every if name in metrics)
        for name in names
    }


def format_metrics(scalars: Mapping[str, float], metrics: Mapping[str, float]) -> str:
    """Metrics of a step and of the last evaluation in one line."""
    parts = [f"{k} {v:.4g}" for k, v in scalars.items() if "grad_norm" not in k and k != "lr"]
    parts += [f"held-out {k} {v:.4g}" for k, v in list(metrics.items())[:2]]
    return ", ".join(parts)
