"""Rolls back what a step changed: a probe's step, or one that is not finite. Knows
tensors alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pipeline.training.fsdp import local_shard


@contextmanager
def preserve_state(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Restores parameters and buffers at its end and removes gradients. Copies lie in the CPU's
    memory meanwhile. Each step seeds torch's generators itself."""
    of_networks = [
        tensor for network in networks for tensor in (*network.parameters(), *network.buffers())
    ]
    # Steps do not change frozen parameters.
    moving = [
        tensor
        for tensor in of_networks
        if tensor.requires_grad or not isinstance(tensor, nn.Parameter)
    ]
    held = [(tensor, tensor.data, _to_cpu_copy(tensor)) for tensor in moving]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, data, values in held:
                tensor.grad = None
                if not isinstance(tensor, DTensor):
                    tensor.data = data  # a restart replaces the tensor of a codebook
                local_shard(tensor.detach()).copy_(values)


def _to_cpu_copy(tensor: Tensor) -> Tensor:
    """A copy of this process's part."""
    return local_shard(tensor.detach()).to("cpu", copy=True)


class BufferSnapshot:
    """Restores what a step's forward passes changed: running statistics of codebooks and of a
    discriminator, and restarted codes. Weights need no copy: they have not changed yet when a step
    is found not to be finite."""

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        self._modules = [module for network in networks for module in network.modules()]
        self._before: list[Tensor] = []

    def _moving(self) -> list[Tensor]:
        # Collected each time: moving a module to a device (`cpu` to `cpu:0`) replaces its buffers.
        moving = [b for module in self._modules for b in module.buffers(recurse=False)]
        moving += [
            p
            for module in self._modules
            for p in getattr(module, "ema_excluded_parameters", list)()
        ]
        return list({id(tensor): tensor for tensor in moving}.values())

    @torch.no_grad()
    def capture(self) -> None:
        self._before = [tensor.detach().clone() for tensor in self._moving()]

    @torch.no_grad()
    def restore(self) -> None:
        for before, tensor in zip(self._before, self._moving(), strict=True):
            tensor.copy_(before)
