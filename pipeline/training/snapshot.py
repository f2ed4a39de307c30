"""Steps that are taken back: a rehearsal's and a probe's whole, one that is not finite without its optimizers. Knows tensors alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from pipeline.training.fsdp import local


@contextmanager
def as_they_were(networks: Iterable[nn.Module], optimizers: Iterable[Optimizer] = (), others: Iterable[Tensor] = ()) -> Iterator[None]:
    """Puts parameters, buffers, moments and other tensors back when it ends, and takes gradients away; what they were is held in the CPU's
    memory meanwhile. Torch's random state is set by each step anew."""
    of_networks = [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]
    # Parameters that are frozen are not moved by steps.
    moving = [tensor for tensor in of_networks if tensor.requires_grad or not isinstance(tensor, nn.Parameter)]
    held = [(tensor, tensor.data, _put_aside(tensor)) for tensor in (*moving, *others)]
    moments = {
        optimizer: {p: {key: (value, _put_aside(value)) for key, value in state.items()} for p, state in optimizer.state.items()}
        for optimizer in optimizers
    }
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, data, values in held:
                tensor.grad = None
                if not isinstance(tensor, DTensor):
                    tensor.data = data  # a codebook that restarts is another tensor
                local(tensor.detach()).copy_(values)
            for optimizer, states in moments.items():
                optimizer.state.clear()
                for parameter, state in states.items():
                    for value, before in state.values():
                        local(value).copy_(before)
                    optimizer.state[parameter] = {key: value for key, (value, _) in state.items()}


def _put_aside(tensor: Tensor) -> Tensor:
    """A copy of this process's part."""
    return local(tensor.detach()).to("cpu", copy=True)


class Undo:
    """Takes back what a step's passes changed: statistics that move in the forward pass - of codebooks, of an adversary - and codes that
    jump. Weights need none of it: they have not moved yet when a step is found not to be finite."""

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        self._modules = [module for network in networks for module in network.modules()]
        self._before: list[Tensor] = []

    def _moving(self) -> list[Tensor]:
        # Asked for anew each time: moving a module to a device (`cpu` to `cpu:0`) puts other tensors in its buffers' places.
        moving = [b for module in self._modules for b in module.buffers(recurse=False)]
        moving += [p for module in self._modules for p in getattr(module, "jumping_parameters", list)()]
        return list({id(tensor): tensor for tensor in moving}.values())

    @torch.no_grad()
    def remember(self) -> None:
        self._before = [tensor.detach().clone() for tensor in self._moving()]

    @torch.no_grad()
    def restore(self) -> None:
        for before, tensor in zip(self._before, self._moving(), strict=True):
            tensor.copy_(before)
