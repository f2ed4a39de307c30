"""What a device can do: bf16, compiling, memory; and bytes in words. Knows devices; nothing of what
they compute."""

from __future__ import annotations

import ctypes
import math
import os
import re
import shutil
import sysconfig
from pathlib import Path

import psutil
import torch

from pipeline.config.train import TrainConfig

USABLE_MEMORY_FRACTION = 0.8
"""Fraction of the free memory that a batch may take."""


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on a device, torch's cache included."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(min(psutil.virtual_memory().available, free_in_container()))


def free_in_container(root: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that a container lets its processes still allocate; infinite without a limit. What it
    holds of files that nothing uses can be dropped."""
    names = ["memory.max", "memory.current", "memory.stat"]  # cgroup v2
    if not (root / names[0]).is_file():
        root /= "memory"
        names[:2] = "memory.limit_in_bytes", "memory.usage_in_bytes"
    try:
        limit, used, stat = ((root / name).read_text() for name in names)
        unused = re.search(r"^inactive_file (\d+)", stat, re.MULTILINE)
        return max(int(limit) - int(used) + int(unused[1] if unused else 0), 0)
    except (OSError, ValueError):  # "max" is no number
        return math.inf


def is_out_of_memory(error: Exception) -> bool:
    """Whether this is what torch raises where memory has run out."""
    return isinstance(
        error, (torch.OutOfMemoryError, MemoryError)
    ) or "can't allocate memory" in str(error)


def format_bytes(size: float) -> str:
    """Bytes in words."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return (
                f"{size:.0f} {unit}" if size >= 10 or unit in ("B", "KiB") else f"{size:.1f} {unit}"
            )
        size /= 1024
    return f"{size:,.1f} TiB"


MIN_STEPS_TO_COMPILE = 1000
"""Steps from which compiling pays on a CPU: at a tenth of a second or more each, a third less
outweighs half a minute."""

_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
"""Numbers of glibc's `mallopt` options."""


def tune_malloc() -> bool:
    """Has the C library keep freed memory for the next tensors, in this whole process; returns
    whether it could (glibc can).

    By default glibc returns large blocks to the system. Each training step on a CPU then waits
    while the same pages are zeroed and mapped again, a seventh of its time. The command line calls
    this before it trains; a program that trains by the stages' functions may do so once at start.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library, or none that can be asked
        return False
    return all(mallopt(option, 2**31 - 1) for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD))


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether training computes in bf16: asked for, or `auto` on a device that does so natively."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return False


def should_compile(config: TrainConfig, device: torch.device) -> bool:
    """Whether a stage compiles. `auto`: always on CUDA; on the CPU for runs that outlast the half
    minute it costs, where there is a C++ compiler with Python's headers.

    Raises:
        ValueError: it is asked for and there is no such compiler.
    """
    if config.compile == "on" and device.type == "cpu" and not has_cpp_compiler():
        raise ValueError(
            "train.compile is on, and there is no C++ compiler with Python's headers here; install "
            "them (Debian: g++ python3-dev), or set "
            "tokenizer.train.compile and prior.train.compile to auto"
        )
    if config.compile != "auto":
        return config.compile == "on"
    if device.type == "cuda":
        return True
    return device.type == "cpu" and config.steps >= MIN_STEPS_TO_COMPILE and has_cpp_compiler()


def has_cpp_compiler() -> bool:
    """Whether there is a C++ compiler with Python's headers, which torch.compile needs on CPUs."""
    compiler = any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))
    return compiler and Path(sysconfig.get_path("include"), "Python.h").is_file()
