"""When the codes of images are decided, and what a prior refuses to sample. Takes no step.

Legend: B images, N codes of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stage2_prior.model import PriorModule
from stage2_prior.order import cosine_step_sizes, kept_first, seeded_orders
from stage2_prior.sampling import SamplingOptions, guidance_at


@dataclass(frozen=True)
class SamplingSchedule:
    """When the codes of B images are decided."""

    orders: Tensor
    """(B,N) image positions: kept codes, then those to sample."""
    step_sizes: list[int]
    """How many codes each step samples first."""
    scales: list[float]
    """(N,) the guidance scale of each code, in the codes' order."""

    @property
    def num_rows(self) -> int:
        """Rows of a step that an image needs at most: a second one where any code is guided."""
        return 2 if any(scale != 1 for scale in self.scales[self.num_kept :]) else 1

    @property
    def num_kept(self) -> int:
        """Codes of each image that are given."""
        return self.orders.shape[1] - sum(self.step_sizes)


def sampling_schedule(
    prior: PriorModule,
    seeds: Sequence[int],
    options: SamplingOptions,
    *,
    known: Tensor | None = None,
    codes: Tensor | None = None,
    orders: Tensor | None = None,
) -> SamplingSchedule:
    """The schedule of `sample`, whose arguments these are.

    Raises:
        ValueError: as `sample`.
    """
    _check_guidance(prior, options)
    _check_seeds(seeds)
    count = prior.stream.image_length
    num_kept = _count_kept(known, codes, count)
    if known is not None and codes is not None:
        _check_codes(prior, known, codes)
    step_sizes = cosine_step_sizes(count - num_kept, options.num_inference_steps)
    orders = _sampling_orders(prior, seeds, known, orders, options.num_inference_steps)
    scales = [float(guidance_at(i / count, options)) for i in range(count)]
    return SamplingSchedule(orders, step_sizes, scales)


def _check_guidance(prior: PriorModule, options: SamplingOptions) -> None:
    """Raises ValueError where guidance is asked of a prior trained without caption dropout."""
    if options.guidance_scale != 1 and not prior.config.trained_with_caption_dropout:
        raise ValueError(
            f"guidance_scale {options.guidance_scale} needs a prior trained with caption dropout, "
            "and this one was not; "
            "sample with guidance_scale=1 or train with prior.objective.caption_dropout=0.1"
        )


def _check_seeds(seeds: Sequence[int]) -> None:
    """Raises ValueError where torch's generators take no such seed."""
    for seed in seeds:
        if not -(2**63) <= int(seed) < 2**63:
            raise ValueError(f"the seed is {seed}; it must be from -2**63 to 2**63 - 1")


def _check_codes(prior: PriorModule, known: Tensor, codes: Tensor) -> None:
    """Raises ValueError where the kept codes are not those of an image of this prior."""
    count = prior.stream.image_length
    if codes.is_floating_point() or codes.is_complex() or codes.shape[-1] != count:
        raise ValueError(
            f"the codes are {codes.shape[-1]} of {codes.dtype} per image; give {count} integers"
        )
    first, past = prior.stream.level_edges
    sizes = past - first
    values = codes.cpu().long()
    wrong = known.cpu() & ((values < 0) | (values >= sizes))
    if wrong.any():
        value = int(values.expand(wrong.shape)[wrong][0])
        most = int(sizes.expand(wrong.shape)[wrong][0]) - 1
        raise ValueError(f"a known code is {value}; there it must be 0 to {most}")


def _count_kept(keep_mask: Tensor | None, codes: Tensor | None, count: int) -> int:
    """How many of the `count` codes of each image are kept.

    Raises:
        ValueError: not as many in each, all of them, or no codes are given.
    """
    if keep_mask is None:
        return 0
    numbers = set(keep_mask.reshape(-1, count).sum(1).tolist())
    if len(numbers) > 1:
        raise ValueError(
            f"the images of a batch keep {sorted(numbers)} codes; they must all keep as many"
        )
    number = int(numbers.pop())
    if number and codes is None:
        raise ValueError(f"{number} codes are known and none is given; give codes")
    if number == count:
        raise ValueError(f"all {count} codes are known; there is nothing to sample")
    return number


def _sampling_orders(
    prior: PriorModule,
    seeds: Sequence[int],
    keep_mask: Tensor | None,
    orders: Tensor | None,
    steps: int | None,
) -> Tensor:
    """(B,N): the kept codes, then the others.

    Raises:
        ValueError: a prior in raster order is asked for another.
    """
    count = prior.stream.image_length
    raster = torch.arange(count, device="cpu").expand(len(seeds), count)
    random = prior.config.trained_order == "random"
    if orders is None:
        orders = seeded_orders(seeds, count) if random else raster
    orders = orders.cpu().long()
    if orders.shape != raster.shape or not torch.equal(orders.sort(1).values, raster):
        raise ValueError(
            f"the order of the codes is {tuple(orders.shape)}; each row must have the numbers 0 to "
            f"{count - 1} once"
        )
    if keep_mask is not None:
        orders = kept_first(orders, keep_mask.cpu())
    if not random and (steps not in (None, count) or not torch.equal(orders, raster)):
        what = (
            "several codes per step"
            if torch.equal(orders, raster)
            else "codes in any order (editing, known codes but the first rows)"
        )
        raise ValueError(
            f"{what} need a prior that was trained on random orders, and this one knows "
            f"{prior.config.trained_order}; train one with "
            "prior.train.code_order=random"
        )
    return orders
