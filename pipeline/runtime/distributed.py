"""The processes of a run: accelerate, what the main one tells the others, and how they end. Knows
no stage and no settings."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import (
    Accelerator,
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    PartialState,
)
from accelerate.utils import ProjectConfiguration, broadcast_object_list, parse_flag_from_env

from pipeline.runtime.network import require_online


def make_accelerator(run_dir: Path, trackers: Sequence[str], timeout: int) -> Accelerator:
    """One accelerator for a stage.

    Args:
        run_dir: folder of the run; trackers write to its logs/.
        trackers: names of what records the metrics.
        timeout: minutes that processes wait for one another.

    Raises:
        ValueError: a tracker is not installed, or may need the network, which is forbidden.
    """
    if remote := [name for name in trackers if name != "tensorboard"]:
        require_online(f"trackers {remote}", "set trackers=[tensorboard], or []")
    with warnings.catch_warnings():
        # Accelerate warns where no tracker is installed and is silent where some are missing. Both
        # are an error below.
        warnings.filterwarnings("ignore", message="`log_with=", category=UserWarning)
        accelerator = Accelerator(
            # The experiment says it (`precision`), and not the launcher.
            mixed_precision="no",
            log_with=list(trackers) or None,
            project_config=ProjectConfiguration(
                project_dir=str(run_dir), logging_dir=str(run_dir / "logs")
            ),
            # Every process computes the same buffers (codebook statistics are reduced), so sending
            # them again is waste.
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False),
                InitProcessGroupKwargs(timeout=timedelta(minutes=timeout)),
            ],
        )
    found = {getattr(tracker, "value", tracker) for tracker in accelerator.log_with}
    if missing := [name for name in trackers if name not in found and name != "all"]:
        raise ValueError(
            f"trackers {missing} are not installed; pip install them, or leave them out of "
            f"trackers (now {list(trackers)})"
        )
    if trackers:
        accelerator.init_trackers(run_dir.name, config=None)
    return accelerator


def distributed_state(minutes: int = 30) -> PartialState:
    """The processes alone, for work that trains nothing; they wait this long for one another.

    `PartialState` does not read ACCELERATE_USE_CPU as `Accelerator` does. By default it would see
    one process where torchrun started several on CPUs, and each would do all the work.
    """
    return PartialState(
        cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=timedelta(minutes=minutes)
    )


def broadcast_from_main(text: str | None) -> str | None:
    """The main process's text, on every process; all wait until it has one."""
    texts = [text]
    if distributed_state().num_processes > 1:
        broadcast_object_list(texts)
    return texts[0]


def is_peer_failure(error: RuntimeError) -> bool:
    """Whether an error means that another process is gone or no longer answers."""
    text = str(error).lower()
    return isinstance(error, torch.distributed.DistError) or any(
        part in text for part in ("gloo", "nccl", "by peer", "broken pipe")
    )


def destroy_process_group() -> None:
    """Ends the process group, if there is one; the last thing a command does."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
