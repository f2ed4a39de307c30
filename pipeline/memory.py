"""How much memory there is, when it has run out, and how to say bytes. Knows devices; nothing of what the memory is for."""

from __future__ import annotations

import psutil
import torch

USABLE = 0.8
"""Share of the free memory that a batch may take."""


def free_memory(device: torch.device) -> int:
    """Bytes that may be had on a device, what torch keeps for its next tensors included."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available


def out_of_memory(error: Exception) -> bool:
    """Whether this is what torch raises where memory has run out."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def readable(size: float) -> str:
    """Bytes in words."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if size >= 10 or unit in ("B", "KiB") else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"
