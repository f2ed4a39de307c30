"""Steps and the reading of captions as compiled programs, and steps as CUDA graphs. Knows which
program serves which shapes; no requests.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from types import FunctionType
from typing import NamedTuple, Protocol, TypeVar, cast
from weakref import WeakKeyDictionary

import torch

from stage2_prior.model import PriorModule
from stage2_prior.step import Advance, Filters, Layout, Prefill, Rows, advance, prefill

Programs = dict[Hashable, Callable[..., object]]
_compiled: WeakKeyDictionary[PriorModule, Programs] = WeakKeyDictionary()
"""Compiled programs of each prior, by what distinguishes them; freed with the prior."""
_Function = TypeVar("_Function", bound=Callable[..., object])
_CompileOptions = dict[str, str | int | bool | Callable[..., object]]


class _Guard(Protocol):
    """A condition that torch.compile checks before it calls a program."""

    guard_type: str


class StepShape(NamedTuple):
    """What one compiled step of single codes serves. Steps of several codes are not compiled: their
    number of codes varies, and they compute so much that it would save little."""

    num_rows: int
    num_images: int
    """Images that these rows are of."""
    guided: bool
    """Whether any image has two rows."""
    filters: Filters

    @classmethod
    def of_images(cls, num_images: int, *, guided: bool, filters: Filters) -> StepShape:
        """Of images that are all guided, or all not."""
        return cls(num_images * (2 if guided else 1), num_images, guided, filters)


class Steps:
    """What an engine calls for captions and steps; here nothing is compiled."""

    prefill: Prefill = staticmethod(prefill)

    def advance(self, shape: StepShape) -> Advance | None:
        """The compiled step of a shape; None where there is none."""
        return None


class CompiledSteps(Steps):
    """Steps that were compiled beforehand, for a program that must not wait later."""

    def __init__(self, prior: PriorModule) -> None:
        self.prior = prior
        self._ready: dict[StepShape, tuple[Hashable, Advance]] = {}
        """Steps, and how the prior computed when they were compiled."""

    @torch.inference_mode()
    def compile(self, shape: StepShape) -> None:
        """Compiles the step of a shape: seconds to a minute. No other thread may call modules
        meanwhile: torch's compiler replaces what calls them."""
        prior = self.prior
        step = _compiled_step(prior, shape)
        # Compiled at its first call, here on rows of no image.
        cache = prior.new_cache(shape.num_rows)
        rows = Rows.empty(prior, shape.num_rows)
        layout = Layout.empty(prior, shape.num_rows, shape.num_images, guided=shape.guided)
        step(prior, prior.tables(), cache, rows, layout, shape.filters, 1)
        self._ready[shape] = (_computing(prior), step)

    def advance(self, shape: StepShape) -> Advance | None:
        computing, step = self._ready.get(shape, (None, None))
        return step if step is not None and computing == _computing(self.prior) else None


class CompiledAtFirstUse(Steps):
    """Everything is compiled when it is first needed: some seconds then, far less per code after.
    Programs are kept with the prior."""

    def __init__(self, prior: PriorModule) -> None:
        self.prior = prior
        self.prefill = _compiled_prefill(prior)

    def advance(self, shape: StepShape) -> Advance | None:
        return _compiled_step(self.prior, shape)


def compiled_programs(prior: PriorModule) -> Programs:
    """The programs that were compiled for a prior so far."""
    return _compiled.setdefault(prior, {})


def capture_cuda_graph(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """A step as a CUDA graph: its kernels are launched all at once, not one by one from Python. The
    graph reads and writes the memory that the step does now, on this device."""
    graph = torch.cuda.CUDAGraph()
    # A stream of its own: the one that torch shares among all graphs is of the device that was
    # current at the first one. Records, and computes nothing yet. Other threads may allocate
    # meanwhile: they load the next batch.
    stream = torch.cuda.Stream(device)
    with (
        torch.cuda.device(device),
        torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
    ):
        step()
    return graph.replay


def _compiled_step(prior: PriorModule, shape: StepShape) -> Advance:
    # On the CPU a step is so short that calling its kernels from Python would take a tenth of its
    # time. The key holds all that guards would check before every code.
    options: _CompileOptions = {
        "guard_filter_fn": lambda guards: [False] * len(guards),
        "cpp_wrapper": prior.device.type == "cpu",
    }
    return _compile_once(prior, ("step", shape), advance, options, dynamic=False)


def _compiled_prefill(prior: PriorModule) -> Prefill:
    """For any number of captions."""
    options: _CompileOptions = {"guard_filter_fn": _prefill_guards}
    return _compile_once(prior, ("captions",), prefill, options, dynamic=True)


def _prefill_guards(guards: Sequence[_Guard]) -> list[bool]:
    """Which guards to keep: not those on modules, nor that on torch's global state, which has the
    number of threads; what else matters of it is in the key."""
    kept = torch.compiler.skip_guard_on_all_nn_modules_unsafe(guards)
    return [
        keep and guard.guard_type != "GLOBAL_STATE"
        for keep, guard in zip(kept, guards, strict=True)
    ]


def _computing(prior: PriorModule) -> tuple[Hashable, ...]:
    """How and where a prior computes now, which a program is compiled for."""
    kind = prior.device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    return prior.dtype, prior.device, prior.training, autocast


def _compile_once(
    prior: PriorModule,
    key: tuple[Hashable, ...],
    function: _Function,
    options: _CompileOptions,
    *,
    dynamic: bool,
) -> _Function:
    """The prior's program of this key, compiled when it is first asked for.

    The function is compiled with a code object of its own. `torch.compile` keeps compiled programs
    by code object and tells them apart by guards, which these have not: with one code object a step
    would run the program of another.
    """
    key = (*key, *_computing(prior))
    programs = compiled_programs(prior)
    if key not in programs:
        assert isinstance(function, FunctionType)
        code = function.__code__.replace()
        copied = FunctionType(code, function.__globals__, function.__name__)
        programs[key] = torch.compile(copied, dynamic=dynamic, fullgraph=True, options=options)
    return cast(_Function, programs[key])
