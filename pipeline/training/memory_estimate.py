"""What training a stage will take in memory. Knows tensors; knows no stage.

Parameters, gradients, EMA weights and optimizer state are counted. What a step holds beyond them is
measured by the gradient of a few rows and of twice as many; the networks are restored afterwards.
"""

from __future__ import annotations

import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.config.train import TrainConfig
from pipeline.runtime.devices import format_bytes
from pipeline.training.batch import Batch, tile_rows
from pipeline.training.fsdp import local_shard
from pipeline.training.simulated_tensors import simulate_tensors
from pipeline.training.snapshot import preserve_state
from pipeline.training.task import Autocast, Objective

_PROBED_ROWS = 4
"""Rows of the smaller probe; the larger one has twice as many."""
_COMPILED_SHARE = 0.65
"""Bytes of a compiled step, relative to an eager one, as measured on the shipped configurations
(docs/scaling.md)."""
_COMPILER = 150 * 2**20
"""Bytes that torch.compile itself takes in a process on a CPU."""
_MUON_BYTES = 24
"""Bytes per entry of the matrices that Muon orthogonalises together: a stack and five more in fp32.
Where the device computes bf16 natively it takes 14."""


@dataclass(frozen=True)
class StateBytes:
    """Bytes that stay for the whole training, by kind; of this process where the networks are
    sharded."""

    entries: int
    """Number of parameters, over all processes."""
    parameters: int
    """Parameters and buffers."""
    gradients: int
    optimizer: int
    average: int
    muon_workspace: int
    """Temporary tensors of a step of Muon."""

    @property
    def kept(self) -> int:
        """Bytes between two steps."""
        return self.parameters + self.optimizer + self.average


def state_bytes(networks: Mapping[str, nn.Module], config: TrainConfig) -> StateBytes:
    """Of networks on any device, the meta device too."""
    entries = parameters = gradients = optimizer = muon_workspace = 0
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
        muon_workspace = max([muon_workspace, *(_MUON_BYTES * count for count in alike.values())])
    average = sum(
        _bytes(local_shard(p))
        for network in networks.values()
        for p in network.parameters()
        if p.requires_grad
    )
    return StateBytes(entries, parameters, gradients, optimizer, average, muon_workspace)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class LiveTensorTracker(TorchDispatchMode):
    """Counts the bytes of live tensors that operations made while it is on: `now`, and their
    maximum `peak`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device.type
        self.now = 0
        self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self,
        function: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        # Inputs that were not made here existed before, and count nothing.
        for storage in self._storages((args, kwargs)):
            self._see(storage, 0)
        out = function(*args, **(kwargs or {}))
        for storage in self._storages(out):
            self._see(storage, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _see(self, storage: torch.UntypedStorage, size: int) -> None:
        """Counts a storage until it is freed: another one may have its address then."""
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self.now += size
            weakref.finalize(storage, self._freed, storage._cdata, size).atexit = False

    def _storages(self, tree: object) -> Iterator[torch.UntypedStorage]:
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor) and leaf.device.type == self.device:
                yield local_shard(leaf).untyped_storage()

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


@dataclass(frozen=True)
class Probe:
    """Measures the memory of a step's gradients."""

    objective: Objective
    step: int
    """The step as which it is measured: the last one, where every loss takes part."""
    autocast: Autocast
    device: torch.device
    simulated: bool = False
    """Whether tensors have no values (`simulate_tensors`), so that networks of any size take
    seconds. Not on CUDA, whose allocator is asked."""

    def peak(self, batch: Batch) -> int:
        """The most bytes that all gradients of a batch hold at a time, the gradients included,
        beyond what was there before. The networks are restored afterwards."""
        with preserve_state(self.objective.networks.values()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on the few rows; training warns of its own batches
            return self._peak(batch)

    def _peak(self, batch: Batch) -> int:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self._backward(batch)
            torch.cuda.synchronize(self.device)
            return int(torch.cuda.max_memory_allocated(self.device) - before)
        live = LiveTensorTracker(self.device)
        with simulate_tensors() if self.simulated else nullcontext(), live:
            self._backward(batch)
        return live.peak

    def _backward(self, batch: Batch) -> None:
        losses = self.objective.losses(batch, self.step)
        while True:
            with self.autocast():
                loss = next(losses, None)
            if loss is None:
                return
            loss.value.backward()
            group = loss.group
            del loss
            for parameter in self.objective.networks[group].parameters():
                parameter.grad = None


@dataclass(frozen=True)
class LinearMemoryModel:
    """Peak bytes of a step by its rows: `fixed` + `row` * rows."""

    fixed: float
    row: float

    def at(self, rows: int) -> float:
        return self.fixed + self.row * rows


def fit_memory_model(
    probe: Probe, example: Callable[[int], Batch], *, most: int
) -> LinearMemoryModel:
    """How the memory of a step grows with its rows, from two probes.

    Args:
        example: (rows) -> a batch of so many rows on the device.
        most: rows that a batch has at most.

    Raises:
        ValueError: the objective refuses even `most` rows.
    """
    rows = min(_PROBED_ROWS, most)
    while True:
        try:
            if probe.device.type == "cuda":
                # A thread's first products allocate the workspaces of cuBLAS, which stay.
                probe.peak(example(rows))
            low = probe.peak(example(rows))
            many = min(2 * rows, most)
            high = probe.peak(example(many)) if many > rows else low
            break
        except ValueError:  # k-means over fewer vectors than codes, for one
            if rows >= most:
                raise
            rows = min(2 * rows, most)
    row = max(high - low, 0) / (many - rows) if many > rows else high / many
    return LinearMemoryModel(max(low - row * rows, 0.0), row)


@dataclass(frozen=True)
class MemoryEstimate:
    """What one process of a stage takes at its peak, in bytes."""

    state: StateBytes
    step: float
    """Peak of a step beyond parameters, moments and EMA weights; its gradients included."""
    other: int
    """On a CPU, what the process holds before training, and what compiling takes."""

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
            "EMA": self.state.average,
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
        program: on a CPU, bytes that the process holds before it builds anything.
    """
    activations = max(model.at(rows) - state.gradients, 0) * (_COMPILED_SHARE if compiled else 1.0)
    step = activations + state.gradients * (2 if several else 1)
    other = 0
    if device.type != "cuda":
        other = program + (_COMPILER if compiled else 0)
    return MemoryEstimate(state, step, other)


def estimate_training_memory(
    probe: Probe,
    config: TrainConfig,
    batch: Batch,
    rows: int,
    *,
    compiled: bool,
    several: bool = False,
    program: int = 0,
) -> MemoryEstimate:
    """`estimate_memory` of steps of `rows` rows like those of `batch`; the networks are neither
    wrapped nor compiled yet."""
    model = fit_memory_model(probe, lambda count: tile_rows(batch, count), most=rows)
    state = state_bytes(probe.objective.networks, config)
    return estimate_memory(
        state, model, rows, probe.device, compiled=compiled, several=several, program=program
    )
