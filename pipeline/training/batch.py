"""Batches of any training: a tensor with a row per image, or a mapping of batches. Knows rows and
devices; knows no stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

Batch: TypeAlias = Any
"""`Any`, since each objective takes one of the two forms alone: none would fit a protocol with
their union."""


def map_batch(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """The batch with each of its tensors replaced by `function(tensor)`."""
    if isinstance(batch, Mapping):
        return {key: map_batch(function, value) for key, value in batch.items()}
    return function(batch)


def to_device(batch: Batch, device: torch.device) -> Batch:
    return map_batch(lambda tensor: tensor.to(device, non_blocking=True), batch)


def pinned(batch: Batch) -> Batch:
    """The batch in page-locked memory."""
    return map_batch(lambda tensor: tensor.pin_memory(), batch)


def tile_rows(batch: Batch, count: int) -> Batch:
    """The first `count` rows; from the first again where there are fewer."""
    return map_batch(
        lambda tensor: tensor[torch.arange(count, device=tensor.device) % len(tensor)], batch
    )


def split_batch(batch: Batch, count: int) -> list[Batch]:
    """The batch in equal parts."""
    if isinstance(batch, Mapping):
        parts = {key: split_batch(value, count) for key, value in batch.items()}
        return [{key: part[i] for key, part in parts.items()} for i in range(count)]
    return list(batch.chunk(count))
