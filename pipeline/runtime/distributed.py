"""The processes of a run: accelerate, what the main one tells the others, and how they end. Knows
no stage."""

from __future__ import annotations

import warnings
from datetime import timedelta

import torch
from accelerate import (
    Accelerator,
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    PartialState,
)
from accelerate.utils import ProjectConfiguration, broadcast_object_list, parse_flag_from_env

from pipeline.config.experiment import Experiment
from pipeline.runtime.devices import tune_malloc


def make_accelerator(experiment: Experiment, *, trackers: bool) -> Accelerator:
    """One accelerator for a stage; trackers write to the run folder's logs/."""
    logs = experiment.folder / "logs"
    names = experiment.trackers if trackers else []
    # accelerate 1.15 passes torch 2.13 the option under its older name.
    warnings.filterwarnings(
        "ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning
    )
    # accelerate warns where none of the trackers is installed and leaves them out where some are;
    # here it is an error below.
    warnings.filterwarnings("ignore", message="`log_with=", category=UserWarning)
    accelerator = Accelerator(
        log_with=names or None,
        project_config=ProjectConfiguration(
            project_dir=str(experiment.folder), logging_dir=str(logs)
        ),
        # Every process computes the same buffers (codebook statistics are reduced), so sending them
        # anew is waste.
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=timedelta(minutes=experiment.process_timeout)),
        ],
    )
    if accelerator.device.type == "cpu":
        tune_malloc()
    found = {getattr(tracker, "value", tracker) for tracker in accelerator.log_with}
    if missing := [name for name in names if name not in found and name != "all"]:
        raise ValueError(
            f"trackers {missing} are not installed; pip install them, or leave them out of "
            f"trackers (now {names})"
        )
    if names:
        accelerator.init_trackers(experiment.name, config=None)
    return accelerator


def distributed_state(minutes: int = 30) -> PartialState:
    """The processes alone, for work that trains nothing; they wait so many minutes for one another.
    `PartialState` does not read ACCELERATE_USE_CPU as `Accelerator` does: left to itself it would
    see one process where torchrun started several on CPUs, and each would do all the work."""
    return PartialState(
        cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=timedelta(minutes=minutes)
    )


def broadcast_from_main(text: str | None) -> str | None:
    """The main process's text, on every process; all wait until it has one."""
    told = [text]
    if distributed_state().num_processes > 1:
        broadcast_object_list(told)
    return told[0]


def is_peer_failure(error: RuntimeError) -> bool:
    """Whether an error of several processes says that another one is gone or no longer answers."""
    text = str(error).lower()
    return isinstance(error, torch.distributed.DistError) or any(
        part in text for part in ("gloo", "nccl", "by peer", "broken pipe")
    )


def destroy_process_group() -> None:
    """Ends the process group, if there is one; the last thing a command does."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
