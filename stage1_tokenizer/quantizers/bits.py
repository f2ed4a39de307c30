"""Codes as bits: integers <-> vectors of -1 and 1, the highest bit first. Knows numbers alone."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(positive: Tensor) -> Tensor:
    """Bits (B,n,h,w), true for 1 -> integers (B,h,w)."""
    places = 2 ** torch.arange(positive.shape[1] - 1, -1, -1, device=positive.device)
    # CUDA has no product of integer matrices
    return (positive.long() * places[:, None, None]).sum(dim=1)


def unpack(codes: Tensor, bits: int) -> Tensor:
    """Integers (...) -> (...,n) of -1 and 1."""
    places = torch.arange(bits - 1, -1, -1, device=codes.device)
    return ((codes[..., None] >> places) & 1).float() * 2 - 1
