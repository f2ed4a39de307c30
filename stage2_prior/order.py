"""The order of the codes of an image: schedules and permutations as pure functions.
Knows counts; no networks, no text.

Legend: B images, N codes of an image, k codes decided in one step.

Raster order reads row by row. A prior that is trained on random orders, with the position of the
next code as input, can start anywhere (sigma-GPT, Pannatier et al. 2024; RandAR, Pang et al. 2024).
Random orders that give way to raster order during training improve raster order (RAR, Yu et al.
2024, section 3.2). Few codes per step at first and more later, by a cosine, is MaskGIT's schedule
(Chang et al. 2022, section 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

CodeOrder = Literal["raster", "random", "annealed"]


@dataclass(frozen=True, kw_only=True)
class OrderSchedule:
    """Which orders a prior is trained on."""

    order: CodeOrder = "raster"
    """`annealed`: random until step `first`, then ever fewer, raster alone from step `last`."""
    first: int = 0
    last: int = 0

    def random_share(self, step: int) -> float:
        """Fraction of a step's images whose codes come in random order."""
        if self.order != "annealed":
            return float(self.order == "random")
        if step >= self.last:
            return 0.0
        return min((self.last - step) / (self.last - self.first), 1.0)


def training_orders(batch: int, count: int, share: float, device: torch.device) -> Tensor:
    """(B,N) orders: a random permutation for `share` of the rows, raster for the others; draws from
    torch's random state."""
    raster = torch.arange(count, device=device).expand(batch, count)
    if not share:
        return raster
    shuffled = torch.rand(batch, count, device=device).argsort(1)
    return torch.where(torch.rand(batch, 1, device=device) < share, shuffled, raster)


def seeded_orders(seeds: Sequence[int], count: int) -> Tensor:
    """(B,N) random permutations, row i from seeds[i] alone; the same on every device."""
    generators = (torch.Generator("cpu").manual_seed(int(seed) ^ 0x5EED) for seed in seeds)
    return torch.stack([torch.randperm(count, generator=one, device="cpu") for one in generators])


def kept_first(orders: Tensor, keep_mask: Tensor) -> Tensor:
    """Orders (B,N) with the codes of `keep_mask` (N,) or (B,N) moved to the front. Both kinds stay
    in their order: a prior trained on random orders has hardly seen one that is sorted in part."""
    resampled = ~keep_mask.expand(orders.shape).gather(1, orders)
    return orders.gather(1, resampled.long().argsort(dim=1, stable=True))


def cosine_step_sizes(count: int, steps: int | None) -> list[int]:
    """How many of `count` codes each of `steps` steps decides, by a cosine: few at first, more as
    the context grows. By default one per step.

    Raises:
        ValueError: there are more steps than codes, or none.
    """
    if steps is None or steps == count:
        return [1] * count
    if not 1 <= steps <= count:
        raise ValueError(
            f"num_inference_steps is {steps}; it must be at least 1 and at most the {count} "
            "codes that are to be "
            "decided"
        )
    left = count
    counts = []
    for step in range(1, steps + 1):
        unknown = round(count * math.cos(math.pi / 2 * step / steps))
        # At least one code now, and at least one for each of the steps to come.
        now = min(max(left - unknown, 1), left - (steps - step))
        counts.append(now)
        left -= now
    return counts
