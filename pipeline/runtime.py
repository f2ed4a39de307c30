"""Processes, devices and precision of a run. Knows accelerate; knows no stage."""

from __future__ import annotations

import ctypes
import os
import shutil
import sysconfig
import warnings
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs, PartialState
from accelerate.utils import ProjectConfiguration, broadcast_object_list, parse_flag_from_env

from pipeline.config import Experiment, TrainConfig

WORTH_COMPILING = 1000
"""Steps from which compiling pays on a CPU: at a tenth of a second or more each, a third less outweighs half a minute."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's `mallopt` options."""


def make_accelerator(experiment: Experiment, *, trackers: bool) -> Accelerator:
    """One accelerator for a stage; trackers write to the run folder's logs/."""
    logs = experiment.folder / "logs"
    names = experiment.trackers if trackers else []
    # accelerate 1.15 passes torch 2.13 the option under its older name.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    # accelerate warns where none of the trackers is installed and leaves them out where some are; here it is an error below.
    warnings.filterwarnings("ignore", message="`log_with=", category=UserWarning)
    accelerator = Accelerator(
        log_with=names or None,
        project_config=ProjectConfiguration(project_dir=str(experiment.folder), logging_dir=str(logs)),
        # Every process computes the same buffers (codebook statistics are reduced), so sending them anew is waste.
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=timedelta(minutes=experiment.process_timeout)),
        ],
    )
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    found = {getattr(tracker, "value", tracker) for tracker in accelerator.log_with}
    if missing := [name for name in names if name not in found and name != "all"]:
        raise ValueError(f"trackers {missing} are not installed; pip install them, or leave them out of trackers (now {names})")
    if names:
        accelerator.init_trackers(experiment.name, config=None)
    return accelerator


def keep_freed_memory() -> bool:
    """Has the C library keep what tensors give back for the next ones; returns whether it could (glibc can). By default it hands large
    pieces back to the system, and every training step then waits while the same pages are zeroed and mapped again, a seventh of its
    time."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library, or none that can be asked
        return False
    return all(mallopt(option, 2**31 - 1) for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD))


def processes(minutes: int = 30) -> PartialState:
    """The processes alone, for work that trains nothing; they wait so many minutes for one another. `PartialState` does not read
    ACCELERATE_USE_CPU as `Accelerator` does: left to itself it would see one process where torchrun started several on CPUs, and each
    would do all the work."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=timedelta(minutes=minutes))


def told_by_main(text: str | None) -> str | None:
    """The main process's text, on every process; all wait until it has one."""
    told = [text]
    if processes().num_processes > 1:
        broadcast_object_list(told)
    return told[0]


def lost_process(error: RuntimeError) -> bool:
    """Whether an error of several processes says that another one is gone or no longer answers."""
    text = str(error).lower()
    return isinstance(error, torch.distributed.DistError) or any(part in text for part in ("gloo", "nccl", "by peer", "broken pipe"))


def end_processes() -> None:
    """Ends the process group, if there is one; the last thing a verb does."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether training computes in bf16: asked for, or `auto` on a device that does so natively."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return False


def compiles(config: TrainConfig, device: torch.device) -> bool:
    """Whether a stage compiles. `auto`: always on CUDA; on the CPU for runs that outlast the half minute it costs, where there is
    a C++ compiler with Python's headers.

    Raises:
        ValueError: it is asked for and there is no such compiler.
    """
    if config.compile == "on" and device.type == "cpu" and not finds_compiler():
        raise ValueError(
            "train.compile is on, and there is no C++ compiler with Python's headers here; install them (Debian: g++ python3-dev), or set "
            "tokenizer.train.compile and prior.train.compile to auto"
        )
    if config.compile != "auto":
        return config.compile == "on"
    if device.type == "cuda":
        return True
    return device.type == "cpu" and config.steps >= WORTH_COMPILING and finds_compiler()


def finds_compiler() -> bool:
    """Whether there is a C++ compiler with Python's headers, which torch.compile needs on CPUs."""
    compiler = any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))
    return compiler and Path(sysconfig.get_path("include"), "Python.h").is_file()
