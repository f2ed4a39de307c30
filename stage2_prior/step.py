"""One step of drawing codes: tokens in, codes out; plain, compiled, or captured as a CUDA graph.
Knows places and slots, no order of steps.

Legend: B images, R tokens fed in one step, P captions, S text slots that are read, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from stage2_prior.model import CodebookTables, ImagePrior
from stage2_prior.sampling import guide, keep_min_p, sample_from_uniform, warp_logits
from stage2_prior.transformer import CacheView, KeyValueCache, attention_mask, project

_compiled: WeakKeyDictionary[ImagePrior, dict[Any, Callable[..., Any]]] = WeakKeyDictionary()
"""Compiled programs of each prior, by what makes one another program; they end with the prior."""


class SamplingSpec(NamedTuple):
    """What of the sampling options makes a step another program; a compiled step is made for one
    choice."""

    guided: bool
    greedy: bool
    top_k: int | None
    top_p: bool
    min_p: bool


class StepInput(NamedTuple):
    """One step's tokens: R for each row of the batch, each of which predicts its target."""

    ids: Tensor
    """(B or 2B, R)"""
    slots: Tensor
    """(R,) or (B or 2B, R)"""
    targets: Tensor
    """Like `slots`: the slot after each."""
    places: Tensor
    """(R,) of the cache."""
    before: Tensor
    """(R,) each token looks at itself and at places below this one."""
    noise: Tensor
    """(B,R) uniform numbers."""
    scales: Tensor
    """(R,) of guidance."""


class StepOutput(NamedTuple):
    """What one step draws."""

    classes: Tensor
    """(B,R) counted over all levels."""
    log_p: Tensor
    """(B,R) given the caption."""
    null_log_p: Tensor | None
    """(B,R) given the null caption, where the step is guided."""


def decode_step(
    prior: ImagePrior,
    tables: CodebookTables,
    cache: KeyValueCache,
    fed: StepInput,
    numbers: Tensor,
    choice: SamplingSpec,
) -> StepOutput:
    """Feeds tokens and draws the code of each one's target; `numbers` (3,) are temperature, top_p
    and min_p."""
    past = CacheView(cache, fed.places, attention_mask(fed.places, fed.before, cache.capacity))
    logits = project(
        prior.features(fed.ids, fed.slots, fed.targets, tables, past), tables.head
    ).float()
    outside = prior.stream.outside_level(fed.targets - prior.stream.text_length, tables.level_edges)
    if outside is not None:
        logits = logits.masked_fill(outside, float("-inf"))
    temperature, top_p, min_p = numbers.unbind()
    conditional, null = logits.chunk(2) if choice.guided else (logits, None)
    chosen = conditional if null is None else guide(conditional, null, fed.scales[:, None])
    if null is not None and outside is not None:
        # Inf - inf is no number
        chosen = chosen.masked_fill(
            outside[: len(chosen)] if outside.ndim == 3 else outside, float("-inf")
        )
    if choice.min_p:
        chosen = keep_min_p(chosen, conditional, min_p)
    if choice.greedy:
        classes = chosen.argmax(-1)
    else:
        classes = sample_from_uniform(
            warp_logits(chosen, temperature, choice.top_k, top_p if choice.top_p else None),
            fed.noise,
        )
    log_p = _log_p(conditional, classes)
    return StepOutput(classes, log_p, None if null is None else _log_p(null, classes))


def _log_p(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, classes[..., None])[..., 0]


def prefill(prior: ImagePrior, tables: CodebookTables, cache: KeyValueCache, ids: Tensor) -> None:
    """Fills an empty cache with captions (P,S)."""
    slots = torch.arange(ids.shape[1], device=ids.device)
    prior.features(
        ids,
        slots,
        slots + 1,
        tables,
        CacheView(cache, slots, attention_mask(slots, slots, cache.capacity)),
    )


def compiled_prefill(prior: ImagePrior) -> Callable[..., None]:
    """`prefill` compiled once for any number of captions."""
    key = ("captions", *_computed(prior))
    programs = compiled_programs(prior)
    if key not in programs:
        options: dict[str, Any] = {
            "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe
        }
        programs[key] = torch.compile(
            _copied(prefill), dynamic=True, fullgraph=True, options=options
        )
    return programs[key]


def compiled_programs(prior: ImagePrior) -> dict[Any, Callable[..., Any]]:
    """The programs that were compiled for a prior so far."""
    return _compiled.setdefault(prior, {})


def _computed(prior: ImagePrior) -> tuple[Any, ...]:
    """What else makes a program another one: how and where it computes."""
    kind = prior.device.type
    return (
        prior.dtype,
        prior.device,
        prior.training,
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
    )


def compiled_decode_step(
    prior: ImagePrior, fed: StepInput, choice: SamplingSpec
) -> Callable[..., StepOutput]:
    """`advance` for single codes, compiled for this prior, these shapes and this choice: some
    seconds at its first step, then far less a code. Steps of several codes are not compiled: each
    has another number of them, and so much work that it would save little."""
    key = (choice, fed.ids.shape[0], fed.slots.ndim, *_computed(prior))
    programs = compiled_programs(prior)
    found = programs.get(key)
    if found is None:
        cpu = prior.device.type == "cpu"
        # What guards would look at before every code - shapes, types, choices - is all in the key.
        # On the CPU a step is so short that calling its kernels from Python would take a tenth of
        # its time.
        options: dict[str, Any] = {
            "guard_filter_fn": lambda guards: [False] * len(guards),
            "cpp_wrapper": cpu,
        }
        found = torch.compile(_copied(decode_step), dynamic=False, fullgraph=True, options=options)
        programs[key] = found
    return found


def _copied(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with a code object of its own. `torch.compile` keeps compiled programs by code
    object and tells them apart by guards, which these steps have not: with one code object a step
    would run the program of another."""
    assert isinstance(function, FunctionType)
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


def capture_cuda_graph(
    step: Callable[..., StepOutput],
    prior: ImagePrior,
    tables: CodebookTables,
    cache: KeyValueCache,
    fed: StepInput,
    numbers: Tensor,
    choice: SamplingSpec,
):
    """A step as a CUDA graph: its kernels are started all at once, not one after another from
    Python. The graph reads and writes this cache and these tables, so it serves one call of
    `sample`; what it draws is overwritten by its next step."""
    # Compiled steps are made for these strides, which a clone would not keep.
    held = StepInput(
        *(
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)
            for t in fed
        )
    )
    graph = torch.cuda.CUDAGraph()
    # Records, and computes nothing yet. Other threads may allocate meanwhile: they load the next
    # batch.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        drawn = step(prior, tables, cache, held, numbers, choice)

    def replay(fed: StepInput) -> StepOutput:
        for own, new in zip(held, fed, strict=True):
            own.copy_(new)
        graph.replay()
        return drawn

    return replay
