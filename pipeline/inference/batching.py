"""Many images' codes in batches: how large they may be, and whether compiling pays. Knows memory
and time; no images, no prompts."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from pipeline.runtime.devices import USABLE_MEMORY_FRACTION, free_memory, is_out_of_memory
from pipeline.runtime.threads import free_threads
from stage1_tokenizer.caller import warn_user
from stage2_prior import PriorModule, Samples, SamplingOptions, joined_samples, sample

Compile = Literal["auto", "on", "off"]

COMPILE_SECONDS = 20.0
"""Seconds that the first compilation of a step takes on a CPU; later ones take a fifth of it."""
COMPILED_TIME_FRACTION = 0.5
"""Time of a compiled step as a fraction of a plain one's."""


def bytes_per_image(prior: PriorModule, options: SamplingOptions) -> int:
    """Memory that sampling one image takes, weights aside: its cache, the activations of its
    caption, and the logits of a step."""
    config = prior.model_config
    stream = prior.stream
    itemsize = prior.text_head.weight.element_size()
    head_dim = config.width // config.heads
    cache = 2 * config.depth * prior.kv_heads * head_dim * stream.length
    caption = stream.text_length * (
        6 * config.width + 3 * config.hidden + config.heads * stream.text_length
    )
    # In parallel decoding a code that changes has all after it fed again, in the worst case.
    decided = 1 if options.num_inference_steps is None else stream.image_length
    logits = decided * stream.num_codes * 4 * 6
    branches = 2 if options.guidance_scale != 1 else 1
    return branches * ((cache + caption) * itemsize + logits)


def can_compile(device: torch.device) -> bool:
    """Whether steps can be compiled for a device."""
    # Here, since it imports accelerate, which sampling needs for nothing else
    from pipeline.runtime.devices import has_cpp_compiler

    return device.type != "cpu" or has_cpp_compiler()


def even_batches(count: int, largest: int) -> list[slice]:
    """As few batches as possible, of sizes as equal as possible: one size compiles once."""
    size = math.ceil(count / math.ceil(count / largest))
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def sample_codes_batched(
    prior: PriorModule,
    text_ids: Tensor,
    seeds: Sequence[int],
    options: SamplingOptions,
    *,
    batch_size: int,
    compile: Compile = "auto",
    **given: Tensor | None,
) -> Samples:
    """`sample` in batches that fit the memory. `given` (`known`, `codes`, `orders`) has a row per
    image, or is the same for all.

    Warns once where batches are smaller than `batch_size`, and where `auto` compiles.

    Raises:
        ValueError: `compile` is unknown, or is `on` without a compiler.
        MemoryError: not even one image fits.
    """
    compile = checked_compile(compile, prior.device)
    size = fitting_batch(prior, options, min(batch_size, len(text_ids)))
    compiled = compile == "on"
    # Steps of several codes are never compiled.
    undecided = compile == "auto" and options.num_inference_steps is None
    done: list[Samples] = []
    first = 0
    while first < len(text_ids):
        batches = even_batches(len(text_ids) - first, size)
        rows = slice(first, first + batches[0].stop)
        tensors = {
            name: value if value is None or value.ndim == 1 else value[rows]
            for name, value in given.items()
        }
        start = time.perf_counter()
        try:
            with free_threads():
                samples = sample(
                    prior, text_ids[rows], seeds[rows], options, compiled=compiled, **tensors
                )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            size = _smaller_batch(prior, rows.stop - rows.start)
            continue
        done.append(samples)
        first = rows.stop
        if undecided and len(batches) > 1:
            # The first batch's time predicts that of the others.
            compiled = _compiling_pays((len(batches) - 1) * (time.perf_counter() - start))
            undecided = False
    return joined_samples(done)


def checked_compile(compile: Compile, device: torch.device) -> Compile:
    """`off` where it is `auto` and the device has no compiler.

    Raises:
        ValueError: `compile` is unknown, or is `on` without a compiler.
    """
    if compile not in ("auto", "on", "off"):
        raise ValueError(f"compile is {compile!r}; choose auto, on or off")
    if compile == "off" or can_compile(device):
        return compile
    if compile == "on":
        raise ValueError(
            "compile is on, and there is no C++ compiler with Python's headers here; install "
            "them (Debian: g++ python3-dev)"
        )
    return "off"


def fitting_batch(prior: PriorModule, options: SamplingOptions, wanted: int) -> int:
    """As many images as are wanted, or fewer, by the estimate of their memory; warns then.

    Raises:
        MemoryError: not even one fits.
    """
    usable = USABLE_MEMORY_FRACTION * free_memory(prior.device)
    fitting = int(usable // bytes_per_image(prior, options))
    if not fitting:
        raise _too_large(prior)
    if fitting < wanted:
        warn_user(
            f"{wanted} images at a time do not fit the free memory; continuing with {fitting}"
        )
    return min(fitting, wanted)


def _smaller_batch(prior: PriorModule, failed: int) -> int:
    """Half of a batch that ran out of memory."""
    if failed == 1:
        raise _too_large(prior)
    warn_user(f"out of memory with {failed} images at a time; continuing with {failed // 2}")
    if prior.device.type == "cuda":
        torch.cuda.empty_cache()
    return failed // 2


def _too_large(prior: PriorModule) -> MemoryError:
    return MemoryError(
        f"one image of {prior.stream.image_length} codes does not fit the memory of "
        f"{prior.device}; close other programs, use a smaller prior, or sample without guidance"
    )


def _compiling_pays(seconds: float) -> bool:
    """Whether compiling saves more than it costs, of this time that plain steps would take."""
    pays = seconds * (1 - COMPILED_TIME_FRACTION) > COMPILE_SECONDS
    if pays:
        warn_user(
            f"{seconds:.0f} seconds of sampling are left, so the steps are compiled; set "
            "compile=off to avoid it"
        )
    return pays
