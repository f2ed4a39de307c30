"""Networks cut over the processes (FSDP2: torch's `fully_shard`), where `accelerate launch` asks
for FSDP. Knows modules and tensors.

Accelerate's own preparation is not used: it knows FSDP on accelerators alone, and here it runs, and
is tested, on CPUs too. The whole networks stay beside the cut ones, in the CPU's memory, and are
filled for evaluating and saving: what is evaluated and saved then talks to no other process and is
the same with one process as with many.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from pipeline.training.checkpoint import HasState
from pipeline.training.ema import EMA

Optimizers = dict[str, torch.optim.Optimizer]


def fsdp_requested() -> bool:
    """Whether `accelerate launch` was given an FSDP configuration (or the environment says what it
    would say)."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP")


def wrap_ddp(network: nn.Module, accelerator: Accelerator) -> nn.Module:
    """A whole network whose gradients are averaged over the processes."""
    with warnings.catch_warnings():
        # accelerate 1.15 passes torch 2.13 the option under its older name.
        warnings.filterwarnings(
            "ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning
        )
        if not fsdp_requested():
            return accelerator.prepare(network)
        if accelerator.num_processes == 1:
            return network
        # Under FSDP accelerate would cut it.
        device = accelerator.device
        return DistributedDataParallel(
            network, device_ids=None if device.type == "cpu" else [device], broadcast_buffers=False
        )


def local_shard(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, which shares its memory; a whole tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor of all processes' parts; every process calls this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Steppers(Protocol):
    """What steps networks."""

    @property
    def optimizers(self) -> Optimizers: ...
    @property
    def ema(self) -> EMA: ...


@dataclass(frozen=True)
class CheckpointState:
    """What a checkpoint holds, by group, whole; on the main process alone where it had to be
    gathered."""

    networks: Mapping[str, HasState]
    optimizers: Mapping[str, HasState]
    ema: Sequence[Tensor]


class ModelState:
    """Whole networks, trained as they are.

    Attributes:
        networks: what is trained, by group.
    """

    saves_together = False
    """Whether all processes take part in `checkpoint_state`."""

    def __init__(
        self,
        plain: Mapping[str, nn.Module],
        optimizers: Optimizers,
        ema: EMA,
        accelerator: Accelerator,
        build: Callable[[Mapping[str, nn.Module]], Steppers],
    ) -> None:
        self.plain, self.optimizers, self.ema, self.accelerator = (
            plain,
            optimizers,
            ema,
            accelerator,
        )
        self.networks: dict[str, nn.Module] = dict(plain)

    def for_training(self, group: str) -> nn.Module:
        """The module that losses call."""
        return wrap_ddp(self.networks[group], self.accelerator)

    def compile(self) -> None:
        """Compiles what losses call."""
        for network in self.networks.values():
            network.compile_networks()  # type: ignore[operator]

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Within it the whole networks hold the averaged weights, on the main process."""
        if not self.accelerator.is_main_process:
            yield
            return
        self.ema.swap()
        try:
            yield
        finally:
            self.ema.swap()

    def checkpoint_state(self) -> CheckpointState:
        """What checkpoints hold; every process calls this, and the main one may use it."""
        return CheckpointState(self.plain, self.optimizers, self.ema.shadow)

    def load_ema(self) -> None:
        """Leaves the averaged weights in the whole networks."""
        self.ema.swap()


class FSDPModelState(ModelState):
    """Networks that name their `shard_units` are sharded; what they were made of, moments and
    averages too."""

    saves_together = True

    def __init__(
        self,
        plain: Mapping[str, nn.Module],
        optimizers: Optimizers,
        ema: EMA,
        accelerator: Accelerator,
        build: Callable[[Mapping[str, nn.Module]], Steppers],
    ) -> None:
        super().__init__(plain, optimizers, ema, accelerator, build)
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        for group, network in plain.items():
            sharded = copy.deepcopy(network).to(accelerator.device)
            for unit in (*sharded.shard_units(), sharded):  # type: ignore[operator]
                fully_shard(unit, mesh=mesh)
            self.networks[group] = sharded
        built = build(self.networks)
        self.optimizers, self.ema = built.optimizers, built.ema
        for own, given in zip(self.ema.shadow, ema.shadow, strict=True):
            own.copy_(shard_like(given, own))
        for name, optimizer in self.optimizers.items():
            for parameter, values in zip(
                _parameters(optimizer), _states(optimizers[name]), strict=True
            ):
                if values:  # it resumes from a checkpoint
                    optimizer.state[parameter] = {
                        key: shard_like(value, parameter)
                        if value.shape == parameter.shape
                        else value
                        for key, value in values.items()
                    }

    def for_training(self, group: str) -> nn.Module:
        return self.networks[group]

    def compile(self) -> None:
        for network in self.networks.values():
            for unit in network.shard_units():  # type: ignore[operator]
                unit.compile(dynamic=False)

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """The gathered averages; the whole networks are on the device meanwhile, on the main
        process alone."""
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
            group: _StateDict(self._gathered(network.state_dict()))
            for group, network in self.networks.items()
        }
        optimizers = {}
        for name, optimizer in self.optimizers.items():
            states = {
                i: self._gathered(values) for i, values in enumerate(_states(optimizer)) if values
            }
            optimizers[name] = _StateDict({"state": states})
        return CheckpointState(
            networks, optimizers, list(self._gathered(dict(enumerate(self.ema.shadow))).values())
        )

    def load_ema(self) -> None:
        self._fill(self.ema.shadow)

    def _fill(self, parameters: Sequence[Tensor]) -> None:
        """Puts parameters, and buffers as they are now, into the whole networks."""
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

    def _gathered(self, tensors: Mapping[Any, Any]) -> dict[Any, Tensor]:
        """Whole tensors in the CPU's memory, on the main process; one after another, or a card
        would hold all of them."""
        held = {}
        for key, tensor in tensors.items():
            value = full_tensor(torch.as_tensor(tensor).detach())
            if self.accelerator.is_main_process:
                held[key] = value.cpu()
        return held


class _StateDict:
    """Tensors in the form in which checkpoints ask for them."""

    def __init__(self, state: dict[Any, Any]) -> None:
        self._state = state

    def state_dict(self) -> dict[Any, Any]:
        return self._state


def shard_like(tensor: Tensor, cut: Tensor) -> Tensor:
    """A whole tensor, cut as another of its shape is; nothing is sent, since every process has
    it."""
    if not isinstance(cut, DTensor):
        return tensor
    return distribute_tensor(
        tensor.to(cut.device), cut.device_mesh, cut.placements, src_data_rank=None
    )


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _states(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """The moments of each parameter, {} before the first step."""
    return [dict(optimizer.state.get(parameter, {})) for parameter in _parameters(optimizer)]


def can_shard(networks: Mapping[str, nn.Module], accelerator: Accelerator) -> bool:
    """Whether FSDP is asked for, there is more than one process, and the networks say how they are
    cut."""
    return (
        fsdp_requested()
        and accelerator.num_processes > 1
        and all(hasattr(network, "shard_units") for network in networks.values())
    )
