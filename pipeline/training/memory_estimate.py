"""What training a stage will take in memory. Knows tensors; knows no stage.

Parameters, gradients, averages and optimizer state are counted. What a step holds beyond them is
measured, by the gradient of a few rows and of twice as many, after which everything is as it was.
"""

from __future__ import annotations

import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.config.train import TrainConfig
from pipeline.runtime.devices import format_bytes
from pipeline.training.fsdp import local_shard
from pipeline.training.snapshot import preserve_state

_PROBED_ROWS = 4
"""Rows of the smaller probe; the larger one has twice as many."""
_COMPILED_SHARE = 0.65
"""What a compiled step holds of a plain one's, as measured on the shipped configurations
(docs/scaling.md)."""
_COMPILER = 150 * 2**20
"""Bytes that torch.compile itself takes in a process on a CPU."""
_MUON_BYTES = 14
"""Bytes an entry of the matrices that Muon orthogonalises together: a stack in fp32 and five in
bf16."""


class Losses(Protocol):
    """What a probe needs of an objective."""

    networks: dict[str, nn.Module]

    def losses(self, batch: Any, step: int) -> Iterator[Any]: ...


@dataclass(frozen=True)
class StateBytes:
    """Bytes that stay for the whole training, by what they are; of this process where the networks
    are sharded."""

    entries: int
    """Number of parameters, over all processes."""
    parameters: int
    """Parameters and buffers."""
    gradients: int
    optimizer: int
    average: int
    muon_workspace: int
    """What a step of Muon holds for a moment."""

    @property
    def kept(self) -> int:
        """Bytes between two steps."""
        return self.parameters + self.optimizer + self.average


def state_bytes(networks: Mapping[str, nn.Module], config: TrainConfig) -> StateBytes:
    """Of networks on any device, the meta device too, which holds no numbers."""
    entries = parameters = gradients = optimizer = orthogonalizing = 0
    for network in networks.values():
        matrices = set()
        if config.optimizer == "muon":
            matrices = {id(p) for p in network.hidden_matrices()}  # type: ignore[operator]
        alike: dict[tuple[int, int], int] = defaultdict(int)
        parameters += sum(_bytes(local_shard(buffer)) for buffer in network.buffers())
        for parameter in network.parameters():
            mine = _bytes(local_shard(parameter))
            entries += parameter.numel()
            parameters += mine
            if parameter.requires_grad:
                gradients += mine
                # Momentum; or two moments
                optimizer += mine if id(parameter) in matrices else 2 * mine
            if id(parameter) in matrices:
                alike[len(parameter), parameter.numel() // len(parameter)] += parameter.numel()
        orthogonalizing = max([orthogonalizing, *(_MUON_BYTES * count for count in alike.values())])
    average = sum(
        _bytes(local_shard(p))
        for network in networks.values()
        for p in network.parameters()
        if p.requires_grad
    )
    return StateBytes(entries, parameters, gradients, optimizer, average, orthogonalizing)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class LiveTensorTracker(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make while it is on and that are still alive;
    `peak` is the most there were."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device.type
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # What comes in and was not made here was there before.
        self._seen.update(storage._cdata for storage in self._storages((args, kwargs)))
        out = function(*args, **(kwargs or {}))
        for storage in self._storages(out):
            if storage._cdata not in self._seen:
                self._seen.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _storages(self, tree: Any) -> Iterator[torch.UntypedStorage]:
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor) and leaf.device.type == self.device:
                yield local_shard(leaf).untyped_storage()

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def peak_of_step(
    objective: Losses, batch: Any, step: int, autocast: Callable[[], Any], device: torch.device
) -> int:
    """The most bytes that all gradients of a batch hold at a time, beyond what was there before;
    the gradients themselves too."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        _backward(objective, batch, step, autocast)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with LiveTensorTracker(device) as live:
        _backward(objective, batch, step, autocast)
    return live.peak


def _backward(objective: Losses, batch: Any, step: int, autocast: Callable[[], Any]) -> None:
    losses = objective.losses(batch, step)
    while True:
        with autocast():
            loss = next(losses, None)
        if loss is None:
            return
        loss.value.backward()
        group = loss.group
        del loss
        for parameter in objective.networks[group].parameters():
            parameter.grad = None


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch, or a mapping of batches."""
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    return batch.to(device, non_blocking=True)


def tile_rows(batch: Any, count: int) -> Any:
    """The first `count` rows of a batch, or of a mapping of batches; from the first again where
    there are fewer."""
    if isinstance(batch, Mapping):
        return {key: tile_rows(value, count) for key, value in batch.items()}
    return batch[torch.arange(count, device=batch.device) % len(batch)]


@dataclass(frozen=True)
class LinearMemoryModel:
    """Peak bytes of a step by its rows: `fixed` + `row` * rows."""

    fixed: float
    row: float

    def at(self, rows: int) -> float:
        return self.fixed + self.row * rows


def fit_memory_model(
    objective: Losses,
    example: Callable[[int], Any],
    step: int,
    autocast: Callable[[], Any],
    device: torch.device,
    *,
    most: int,
) -> LinearMemoryModel:
    """How the memory of a step grows with its rows, from two probes; networks are as they were
    afterwards.

    Args:
        example: (rows) -> a batch of so many rows on the device.
        step: the step as which they are taken; the last one, in which everything takes part.
        most: rows that a batch has at most.

    Raises:
        ValueError: the objective refuses even `most` rows.
    """
    rows = min(_PROBED_ROWS, most)
    while True:
        peaks = {}
        try:
            if (
                device.type == "cuda"
            ):  # cuBLAS takes its workspaces, which stay, with a thread's first products
                _probe(objective, example(rows), step, autocast, device)
            for count in sorted({rows, min(2 * rows, most)}):
                peaks[count] = _probe(objective, example(count), step, autocast, device)
            break
        except ValueError:  # k-means over fewer vectors than codes, for one
            if rows >= most:
                raise
            rows = min(2 * rows, most)
    (few, low), (many, high) = next(iter(peaks.items())), list(peaks.items())[-1]
    row = max(high - low, 0) / (many - few) if many > few else high / many
    return LinearMemoryModel(max(low - row * few, 0.0), row)


def _probe(
    objective: Losses, batch: Any, step: int, autocast: Callable[[], Any], device: torch.device
) -> int:
    """`peak_of_step`, after which the networks are as they were."""
    with preserve_state(objective.networks.values()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few rows; training will say what is true of its own
        return peak_of_step(objective, batch, step, autocast, device)


@dataclass(frozen=True)
class MemoryEstimate:
    """What one process of a stage takes at its peak, in bytes."""

    state: StateBytes
    step: float
    """What a step holds at a time beyond parameters, moments and averages; its gradients too."""
    other: int
    """What the process holds before it begins, and what compiling takes, on a CPU."""

    @property
    def peak(self) -> float:
        return (
            self.other
            + self.state.kept
            + max(self.step, self.state.gradients + self.state.muon_workspace)
        )

    def line(self, processes: int) -> str:
        parts = {
            "parameters": self.state.parameters,
            "optimizer": self.state.optimizer,
            "average": self.state.average,
            "a step's gradients and activations": max(
                self.step, self.state.gradients + self.state.muon_workspace
            ),
            "the program": self.other,
        }
        each = " in each process" if processes > 1 else ""
        listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items() if size)
        return (
            f"{self.state.entries / 1e6:,.1f}M parameters, about {format_bytes(self.peak)} "
            f"of memory{each} ({listed})"
        )


def estimate_memory(
    state: StateBytes,
    model: LinearMemoryModel,
    rows: int,
    device: torch.device,
    *,
    compiled: bool,
    several: bool,
    program: int = 0,
) -> MemoryEstimate:
    """Of steps of `rows` rows at a time.

    Args:
        compiled: whether steps are compiled, which makes fewer tensors.
        several: whether processes exchange their gradients, for which they hold a copy.
        program: bytes that the process holds before it builds anything, on a CPU.
    """
    activations = max(model.at(rows) - state.gradients, 0) * (_COMPILED_SHARE if compiled else 1.0)
    step = activations + state.gradients * (2 if several else 1)
    other = 0
    if device.type != "cuda":
        other = program + (_COMPILER if compiled else 0)
    return MemoryEstimate(state, step, other)


def estimate_training_memory(
    objective: Losses,
    config: TrainConfig,
    device: torch.device,
    autocast: Callable[[], Any],
    batch: Any,
    rows: int,
    *,
    compiled: bool,
    several: bool = False,
    program: int = 0,
) -> MemoryEstimate:
    """What training will hold, by steps of `rows` rows at a time like those of `batch`; the
    networks are neither wrapped nor compiled."""
    model = fit_memory_model(
        objective,
        lambda count: tile_rows(batch, count),
        config.steps - 1,
        autocast,
        device,
        most=rows,
    )
    state = state_bytes(objective.networks, config)
    return estimate_memory(
        state, model, rows, device, compiled=compiled, several=several, program=program
    )
