"""One decoding step: tokens in, codes out; plain, compiled, or captured as a CUDA graph. Knows
cache positions and position ids, no order of steps.

Legend: B images, R input tokens of one step, P captions, S text positions to prefill, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from types import FunctionType
from typing import NamedTuple, Protocol, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from stage2_prior.model import CodebookTables, ImagePrior
from stage2_prior.sampling import guide, keep_min_p, sample_from_uniform, warp_logits
from stage2_prior.transformer import CacheView, KeyValueCache, attention_mask, project

Programs = dict[Hashable, Callable[..., object]]
_compiled: WeakKeyDictionary[ImagePrior, Programs] = WeakKeyDictionary()
"""Compiled programs of each prior, by what distinguishes them; freed with the prior."""
_Function = TypeVar("_Function", bound=Callable[..., object])


class _Guard(Protocol):
    """A condition that torch.compile checks before it calls a program."""

    guard_type: str


class SamplingSpec(NamedTuple):
    """The part of the sampling options that is compiled into a step."""

    guided: bool
    greedy: bool
    top_k: int | None
    top_p: bool
    min_p: bool


class StepInput(NamedTuple):
    """One step's tokens: R for each row of the batch, each of which predicts its target."""

    ids: Tensor
    """(B or 2B, R)"""
    position_ids: Tensor
    """(R,) or (B or 2B, R)"""
    targets: Tensor
    """Like `position_ids`: the position id of the token that each predicts."""
    cache_positions: Tensor
    """(R,)"""
    before: Tensor
    """(R,) each token attends to itself and to cache positions below this one."""
    noise: Tensor
    """(B,R) uniform numbers."""
    scales: Tensor
    """(R,) of guidance."""


class StepOutput(NamedTuple):
    """What one step samples."""

    classes: Tensor
    """(B,R) counted over all levels."""
    log_p: Tensor
    """(B,R) given the caption."""
    null_log_p: Tensor | None
    """(B,R) given the null caption, where the step is guided."""


DecodeStep = Callable[
    [ImagePrior, CodebookTables, KeyValueCache, StepInput, Tensor, SamplingSpec], StepOutput
]
"""`decode_step`, or a compiled one."""
Prefill = Callable[[ImagePrior, CodebookTables, KeyValueCache, Tensor], None]
"""`prefill`, or a compiled one."""


def decode_step(
    prior: ImagePrior,
    tables: CodebookTables,
    cache: KeyValueCache,
    inputs: StepInput,
    numbers: Tensor,
    spec: SamplingSpec,
) -> StepOutput:
    """Samples the code of each input token's target; `numbers` (3,) are temperature, top_p and
    min_p."""
    logits, outside = _logits(prior, tables, cache, inputs)
    temperature, top_p, min_p = numbers.unbind()
    conditional, null = logits.chunk(2) if spec.guided else (logits, None)
    chosen = conditional if null is None else guide(conditional, null, inputs.scales[:, None])
    if null is not None and outside is not None:
        # Guidance made nan of inf - inf.
        chosen = chosen.masked_fill(
            outside[: len(chosen)] if outside.ndim == 3 else outside, float("-inf")
        )
    if spec.min_p:
        chosen = keep_min_p(chosen, conditional, min_p)
    if spec.greedy:
        classes = chosen.argmax(-1)
    else:
        warped = warp_logits(chosen, temperature, spec.top_k, top_p if spec.top_p else None)
        classes = sample_from_uniform(warped, inputs.noise)
    log_p = _log_p(conditional, classes)
    return StepOutput(classes, log_p, None if null is None else _log_p(null, classes))


def score_step(
    prior: ImagePrior, tables: CodebookTables, cache: KeyValueCache, inputs: StepInput, ids: Tensor
) -> Tensor:
    """log p of given ids (B or 2B,R) as the input tokens' targets; fills the cache as
    `decode_step` does, and samples nothing."""
    logits, _ = _logits(prior, tables, cache, inputs)
    return _log_p(logits, prior.stream.classes_of(ids))


def _logits(
    prior: ImagePrior, tables: CodebookTables, cache: KeyValueCache, inputs: StepInput
) -> tuple[Tensor, Tensor | None]:
    """(B or 2B,R,K), -inf where a target's level has no such class; and where that is, if there are
    several levels."""
    mask = attention_mask(inputs.cache_positions, inputs.before, cache.capacity)
    past = CacheView(cache, inputs.cache_positions, mask)
    features = prior.features(inputs.ids, inputs.position_ids, inputs.targets, tables, past)
    logits = project(features, tables.head).float()
    image_positions = inputs.targets - prior.stream.text_length
    outside = prior.stream.outside_level(image_positions, tables.level_edges)
    if outside is not None:
        logits = logits.masked_fill(outside, float("-inf"))
    return logits, outside


def _log_p(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, classes[..., None])[..., 0]


def prefill(prior: ImagePrior, tables: CodebookTables, cache: KeyValueCache, ids: Tensor) -> None:
    """Fills an empty cache with captions (P,S)."""
    positions = torch.arange(ids.shape[1], device=ids.device)
    past = CacheView(cache, positions, attention_mask(positions, positions, cache.capacity))
    prior.features(ids, positions, positions + 1, tables, past)


def compiled_prefill(prior: ImagePrior) -> Prefill:
    """`prefill` compiled once for any number of captions."""
    key = ("captions", *_computed(prior))
    options: dict[str, str | int | bool | Callable[..., object]] = {
        "guard_filter_fn": _prefill_guards
    }
    return _compile_once(prior, key, prefill, options, dynamic=True)


def _prefill_guards(guards: Sequence[_Guard]) -> list[bool]:
    """Which guards to keep: not those on modules, nor that on torch's global state, which has the
    number of threads; what else matters of it is in the key."""
    kept = torch.compiler.skip_guard_on_all_nn_modules_unsafe(guards)
    return [
        keep and guard.guard_type != "GLOBAL_STATE"
        for keep, guard in zip(kept, guards, strict=True)
    ]


def compiled_programs(prior: ImagePrior) -> Programs:
    """The programs that were compiled for a prior so far."""
    return _compiled.setdefault(prior, {})


def _computed(prior: ImagePrior) -> tuple[Hashable, ...]:
    """What else distinguishes programs: how and where they compute."""
    kind = prior.device.type
    return (
        prior.dtype,
        prior.device,
        prior.training,
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
    )


def compiled_decode_step(prior: ImagePrior, inputs: StepInput, spec: SamplingSpec) -> DecodeStep:
    """`decode_step` for single codes, compiled for this prior, these shapes and this spec: some
    seconds at its first call, then far less per code. Steps of several codes are not compiled:
    their number of codes varies, and they compute so much that it would save little."""
    key = (spec, inputs.ids.shape[0], inputs.position_ids.ndim)
    return compile_step(prior, key, decode_step)


def compile_step(prior: ImagePrior, key: tuple[Hashable, ...], function: _Function) -> _Function:
    """A step compiled for this prior and key, which must hold all that guards would check before
    every code: shapes, types, options."""
    # On the CPU a step is so short that calling its kernels from Python would take a tenth of its
    # time.
    options: dict[str, str | int | bool | Callable[..., object]] = {
        "guard_filter_fn": lambda guards: [False] * len(guards),
        "cpp_wrapper": prior.device.type == "cpu",
    }
    return _compile_once(prior, (*key, *_computed(prior)), function, options, dynamic=False)


def _compile_once(
    prior: ImagePrior,
    key: Hashable,
    function: _Function,
    options: dict[str, str | int | bool | Callable[..., object]],
    *,
    dynamic: bool,
) -> _Function:
    """The prior's program of this key, compiled when it is first asked for.

    The function is compiled with a code object of its own. `torch.compile` keeps compiled programs
    by code object and tells them apart by guards, which these have not: with one code object a step
    would run the program of another.
    """
    programs = compiled_programs(prior)
    if key not in programs:
        assert isinstance(function, FunctionType)
        code = function.__code__.replace()
        copied = FunctionType(code, function.__globals__, function.__name__)
        programs[key] = torch.compile(copied, dynamic=dynamic, fullgraph=True, options=options)
    return cast(_Function, programs[key])


def capture_cuda_graph(
    step: DecodeStep,
    prior: ImagePrior,
    tables: CodebookTables,
    cache: KeyValueCache,
    inputs: StepInput,
    numbers: Tensor,
    spec: SamplingSpec,
) -> Callable[[StepInput], StepOutput]:
    """A step as a CUDA graph: its kernels are launched all at once, not one by one from Python. The
    graph reads and writes this cache and these tables, so it serves one call of `sample`. Its next
    step overwrites its output."""
    # Compiled steps are made for these strides, which a clone would not keep.
    held = StepInput(
        *(
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)
            for t in inputs
        )
    )
    graph = torch.cuda.CUDAGraph()
    # Records, and computes nothing yet. Other threads may allocate meanwhile: they load the next
    # batch.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = step(prior, tables, cache, held, numbers, spec)

    def replay(inputs: StepInput) -> StepOutput:
        for own, new in zip(held, inputs, strict=True):
            own.copy_(new)
        graph.replay()
        return output

    return replay
