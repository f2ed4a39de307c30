"""Many images' codes in batches: how large they may be, and whether compiling pays. Knows memory
and time; no images, no prompts."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.runtime.devices import USABLE_MEMORY_FRACTION, free_memory, is_out_of_memory
from stage2_prior import ImagePrior, Samples, SamplingOptions, sample

Compile = Literal["auto", "on", "off"]

COMPILE_SECONDS = 20.0
"""Seconds that compiling a step takes on a CPU where it was never compiled before; a fifth of it
from the second time on."""
COMPILED_TIME_FRACTION = 0.5
"""Time of a compiled step as a share of a plain one's."""
_TOO_LARGE = (
    "one image of {} codes does not fit the memory of {}; close other programs, use a "
    "smaller prior, or sample without guidance"
)


def bytes_per_image(prior: ImagePrior, options: SamplingOptions) -> int:
    """Memory that sampling one image takes, weights aside: its cache, and what reading its
    caption holds at a time."""
    config, stream = prior.model_config, prior.stream
    itemsize = prior.text_head.weight.element_size()
    rows = 2 if options.guidance_scale != 1 else 1
    # Seldom so many, but a code that changes has all after it fed again
    at_once = 1 if options.num_inference_steps is None else stream.image_length
    cache = (
        2
        * config.depth
        * prior.kv_heads
        * (config.width // config.heads)
        * stream.length
        * itemsize
    )
    reading = (
        stream.text_length
        * (6 * config.width + 3 * config.hidden + config.heads * stream.text_length)
        * itemsize
    )
    deciding = at_once * stream.num_codes * 4 * 6
    return rows * (cache + reading + deciding)


def can_compile(device: torch.device) -> bool:
    """Whether steps can be compiled for a device."""
    # Here, since it brings accelerate along, which drawing needs for nothing else
    from pipeline.runtime.devices import has_cpp_compiler

    return device.type != "cpu" or has_cpp_compiler()


def even_batches(count: int, largest: int) -> list[slice]:
    """As few parts as there must be, of as equal sizes as there can be: one size compiles once."""
    parts = math.ceil(count / largest)
    size = math.ceil(count / parts)
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def sample_codes_batched(
    prior: ImagePrior,
    text_ids: Tensor,
    seeds: Sequence[int],
    options: SamplingOptions,
    *,
    batch_size: int,
    compile: Compile = "auto",
    **given: Tensor | None,
) -> Samples:
    """`sample` in batches that fit the memory, with `given` (`known`, `codes`, `orders`) a row a
    image.

    Says once, as a warning, where batches are smaller than was asked for, and where steps are
    compiled unasked.

    Raises:
        MemoryError: not even one image fits.
    """
    if compile not in ("auto", "on", "off"):
        raise ValueError(f"compile is {compile!r}; choose auto, on or off")
    if compile != "off" and not can_compile(prior.device):
        if compile == "on":
            raise ValueError(
                "compile is on, and there is no C++ compiler with Python's headers here; install "
                "them (Debian: g++ python3-dev)"
            )
        compile = "off"
    fitting = int(
        USABLE_MEMORY_FRACTION * free_memory(prior.device) // bytes_per_image(prior, options)
    )
    if not fitting:
        raise MemoryError(_TOO_LARGE.format(prior.stream.image_length, prior.device))
    largest = min(batch_size, len(text_ids))
    if fitting < largest:
        largest = fitting
        warnings.warn(
            f"{min(batch_size, len(text_ids))} images at a time do not fit the free memory; "
            f"going on with {largest}",
            stacklevel=3,
        )
    # Steps of several codes are never compiled.
    compiled, decided = (
        compile == "on",
        compile != "auto" or options.num_inference_steps is not None,
    )
    done: list[Samples] = []
    first = 0
    while first < len(text_ids):
        remaining = even_batches(len(text_ids) - first, largest)
        part = slice(first, first + remaining[0].stop)
        start = time.perf_counter()
        try:
            done.append(
                sample(
                    prior,
                    text_ids[part],
                    seeds[part],
                    options,
                    compiled=compiled,
                    **_rows(given, part),
                )
            )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if part.stop - part.start == 1:
                raise MemoryError(
                    _TOO_LARGE.format(prior.stream.image_length, prior.device)
                ) from error
            largest = (part.stop - part.start) // 2
            warnings.warn(
                f"out of memory with {part.stop - part.start} images at a time; going on with "
                f"{largest}",
                stacklevel=3,
            )
            if prior.device.type == "cuda":
                torch.cuda.empty_cache()
            continue
        first = part.stop
        if not decided and len(remaining) > 1:
            # The batch just drawn says what the others will take.
            left = (len(remaining) - 1) * (time.perf_counter() - start)
            compiled = left * (1 - COMPILED_TIME_FRACTION) > COMPILE_SECONDS
            decided = True
            if compiled:
                warnings.warn(
                    f"{left:.0f} seconds of drawing are left, so the steps are compiled",
                    stacklevel=3,
                )
    return _joined(done)


def _rows(given: dict[str, Tensor | None], part: slice) -> dict[str, Any]:
    return {
        name: value if value is None or value.ndim == 1 else value[part]
        for name, value in given.items()
    }


def _joined(parts: list[Samples]) -> Samples:
    null = [part.null_log_likelihood for part in parts if part.null_log_likelihood is not None]
    return Samples(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.log_likelihood for part in parts]),
        torch.cat(null) if len(null) == len(parts) else None,
        torch.cat([part.orders for part in parts]),
    )
