"""Networks sharded over the processes (FSDP2: torch's `fully_shard`), where `accelerate launch`
asks for FSDP. Knows modules and tensors.

Accelerate's own preparation is not used: it supports FSDP on accelerators alone; here it runs, and
is tested, on CPUs too. The unsharded networks stay in the CPU's memory and are filled for
evaluating and saving. Evaluation and saved files then need no other process and are the same with
one process as with many.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from pipeline.training.checkpoint import CheckpointState
from pipeline.training.ema import EMA
from pipeline.training.task import Objective

Optimizers = dict[str, torch.optim.Optimizer]
_Key = TypeVar("_Key")


def fsdp_requested() -> bool:
    """Whether `accelerate launch` was given an FSDP configuration, or the environment says so."""
    return bool(parse_flag_from_env("ACCELERATE_USE_FSDP"))


def wrap_ddp(network: nn.Module, accelerator: Accelerator) -> nn.Module:
    """An unsharded network whose gradients are averaged over the processes."""
    with warnings.catch_warnings():
        # accelerate 1.15 passes torch 2.13 the option under its older name.
        warnings.filterwarnings(
            "ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning
        )
        if not fsdp_requested():
            prepared: nn.Module = accelerator.prepare(network)
            return prepared
        if accelerator.num_processes == 1:
            return network
        # Under FSDP accelerate would shard it.
        device = accelerator.device
        return DistributedDataParallel(
            network, device_ids=None if device.type == "cpu" else [device], broadcast_buffers=False
        )


def local_shard(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, which shares its memory; other tensors as they
    are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from all processes, which all call this; other tensors as they
    are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class Steppers:
    """What updates networks and their EMA weights."""

    optimizers: Optimizers
    ema: EMA


class ModelState:
    """Unsharded networks.

    Attributes:
        networks: what is trained, by group.
    """

    saves_together = False
    """Whether all processes take part in `checkpoint_state`."""

    def __init__(
        self, plain: Mapping[str, nn.Module], steppers: Steppers, accelerator: Accelerator
    ) -> None:
        self.plain = plain
        self.optimizers = steppers.optimizers
        self.ema = steppers.ema
        self.accelerator = accelerator
        self.networks: dict[str, nn.Module] = dict(plain)

    def for_training(self, group: str) -> nn.Module:
        """The module that losses call."""
        return wrap_ddp(self.networks[group], self.accelerator)

    def compile(self, objective: Objective) -> None:
        """Compiles what the losses of the objective call."""
        objective.compile()

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Within it the unsharded networks hold the EMA weights, on the main process."""
        if not self.accelerator.is_main_process:
            yield
            return
        self.ema.swap()
        try:
            yield
        finally:
            self.ema.swap()

    def checkpoint_state(self) -> CheckpointState:
        """What checkpoints hold; every process calls this, and the main one may use the result."""
        return CheckpointState(
            {group: network.state_dict() for group, network in self.plain.items()},
            {name: optimizer.state_dict()["state"] for name, optimizer in self.optimizers.items()},
            self.ema.shadow,
        )

    def load_ema(self) -> None:
        """Leaves the EMA weights in the unsharded networks."""
        self.ema.swap()


class FSDPModelState(ModelState):
    """Networks that name their `shard_units`, sharded like their moments and EMA weights.

    Args:
        build: makes the optimizers and the EMA of the sharded networks.
    """

    saves_together = True

    def __init__(
        self,
        plain: Mapping[str, nn.Module],
        steppers: Steppers,
        accelerator: Accelerator,
        build: Callable[[Mapping[str, nn.Module]], Steppers],
    ) -> None:
        super().__init__(plain, steppers, accelerator)
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        for group, network in plain.items():
            sharded = copy.deepcopy(network).to(accelerator.device)
            for unit in (*sharded.shard_units(), sharded):  # type: ignore[operator]
                fully_shard(unit, mesh=mesh)
            self.networks[group] = sharded
        built = build(self.networks)
        self.optimizers = built.optimizers
        self.ema = built.ema
        for own, given in zip(self.ema.shadow, steppers.ema.shadow, strict=True):
            own.copy_(shard_like(given, own))
        for name, optimizer in self.optimizers.items():
            states = _states(steppers.optimizers[name])
            for parameter, values in zip(_parameters(optimizer), states, strict=True):
                if values:  # it resumes from a checkpoint
                    optimizer.state[parameter] = {
                        key: shard_like(value, parameter)
                        if value.shape == parameter.shape
                        else value
                        for key, value in values.items()
                    }

    def for_training(self, group: str) -> nn.Module:
        return self.networks[group]

    def compile(self, objective: Objective) -> None:
        for network in self.networks.values():
            for unit in network.shard_units():  # type: ignore[operator]
                unit.compile(dynamic=False)

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """The gathered EMA weights; on the main process the unsharded networks are on the device
        meanwhile."""
        self._fill(self.ema.shadow)
        if not self.accelerator.is_main_process:
            yield
            return
        for network in self.plain.values():
            network.to(self.accelerator.device)
        try:
            yield
        finally:
            for network in self.plain.values():
                network.to("cpu")

    def checkpoint_state(self) -> CheckpointState:
        networks = {
            group: self._gathered(network.state_dict()) for group, network in self.networks.items()
        }
        optimizers = {
            name: {
                i: self._gathered(values) for i, values in enumerate(_states(optimizer)) if values
            }
            for name, optimizer in self.optimizers.items()
        }
        ema = self._gathered(dict(enumerate(self.ema.shadow)))
        return CheckpointState(networks, optimizers, list(ema.values()))

    def load_ema(self) -> None:
        self._fill(self.ema.shadow)

    def _fill(self, parameters: Sequence[Tensor]) -> None:
        """Copies parameters, and the present buffers, into the unsharded networks."""
        owners = [
            p for network in self.plain.values() for p in network.parameters() if p.requires_grad
        ]
        with torch.no_grad():
            for owner, value in zip(owners, parameters, strict=True):
                owner.copy_(full_tensor(value))
            for group, network in self.plain.items():
                for buffer, value in zip(
                    network.buffers(), self.networks[group].buffers(), strict=True
                ):
                    buffer.copy_(value)

    def _gathered(self, tensors: Mapping[_Key, Tensor]) -> dict[_Key, Tensor]:
        """Unsharded tensors in the CPU's memory, on the main process; one after another, or a GPU
        would hold all of them."""
        held = {}
        for key, tensor in tensors.items():
            value = full_tensor(torch.as_tensor(tensor).detach())
            if self.accelerator.is_main_process:
                held[key] = value.cpu()
        return held


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor sharded as another of its shape is; every process holds it, so nothing is sent."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(
        tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _states(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """The moments of each parameter, {} before the first step."""
    return [dict(optimizer.state.get(parameter, {})) for parameter in _parameters(optimizer)]


def can_shard(networks: Mapping[str, nn.Module], accelerator: Accelerator) -> bool:
    """Whether FSDP is asked for, there are several processes, and all networks name their
    `shard_units`."""
    return (
        fsdp_requested()
        and accelerator.num_processes > 1
        and all(hasattr(network, "shard_units") for network in networks.values())
    )
