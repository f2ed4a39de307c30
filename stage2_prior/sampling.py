"""How codes are chosen: options, filters and guidance as small functions. Knows logits and seeds;
no networks, no ids.

Legend: B images, N codes of an image, k codes decided in one step, K codes to choose from.

Each image draws one uniform number per code from a generator of its own and inverts the cumulative
distribution, so that its codes depend on its seed alone and not on the batch it is in. Guidance:
logits = null + scale * (conditional - null) (Ho & Salimans 2022), at one scale, in an interval
alone (Kynkaanniemi et al. 2024, arXiv:2404.07724), or rising by a power of a cosine (MDT, Gao et
al. 2023, arXiv:2303.14389). It prefers codes that the caption makes likelier than they would be
without it, and so, now and then, one that is next to impossible either way. `min_p` rules those out
by the caption's own distribution, as contrastive decoding does (Li et al. 2022, arXiv:2210.15097,
section 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stage2_prior.config import refuse

_BLOCK = 128
"""Classes per scan."""
LEAST_TEMPERATURE = 1e-6
"""Below it the most likely code is taken: logits divided by less would overflow."""


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How codes are chosen (`sampling` in a YAML)."""

    guidance_scale: float = 1.0
    """1 samples the caption's distribution; above 1 moves away from the null caption's, and costs a
    second branch."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Fractions of the codes between which guidance is on; before and after, the null caption's
    branch is not computed."""
    guidance_power: float | None = None
    """Lets guidance rise from none to `guidance_scale` by (1 - cos(pi share^power)) / 2 over the
    codes; absent, it is constant."""
    temperature: float = 1.0
    """Logits are divided by it; 0 takes the most likely code."""
    top_k: int | None = None
    """Keep only the k most likely codes."""
    top_p: float | None = None
    """Keep the smallest set of codes whose probability reaches p (nucleus sampling, Holtzman et al.
    2020)."""
    min_p: float | None = None
    """Keep only codes at least this fraction as likely as the likeliest one, given the caption and
    before guidance and temperature. With a small one (0.002) guidance can be stronger."""
    num_inference_steps: int | None = None
    """Steps in which all codes are sampled, few at first and more later; needs a prior that was
    trained on random orders. Absent: one step per code."""

    def __post_init__(self) -> None:
        # JSON has lists
        object.__setattr__(self, "guidance_interval", tuple(self.guidance_interval))
        interval = self.guidance_interval
        refuse(
            (
                not 0 <= self.guidance_scale <= 1e6,
                f"sampling.guidance_scale is {self.guidance_scale}; it must be 0 or more (1 is "
                "off), and at most 1e6",
            ),
            (
                len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1,
                f"sampling.guidance_interval is {self.guidance_interval}; it must be two "
                "fractions of the codes, as in (0.1, 0.8)",
            ),
            (
                self.guidance_power is not None and not self.guidance_power > 0,
                f"sampling.guidance_power is {self.guidance_power}; it must be above 0, or "
                "absent for constant guidance",
            ),
            (
                not 0 <= self.temperature <= 1e6,
                f"sampling.temperature is {self.temperature}; it must be 0 (greedy) or more, and "
                "at most 1e6",
            ),
            (
                self.top_k is not None and self.top_k < 1,
                f"sampling.top_k is {self.top_k}; it must be at least 1, or absent for no limit",
            ),
            (
                self.top_p is not None and not 0 < self.top_p <= 1,
                f"sampling.top_p is {self.top_p}; it must be in (0, 1], or absent for no limit",
            ),
            (
                self.min_p is not None and not 0 <= self.min_p <= 1,
                f"sampling.min_p is {self.min_p}; it must be in [0, 1], or absent for no limit",
            ),
            (
                self.num_inference_steps is not None and self.num_inference_steps < 1,
                f"sampling.num_inference_steps is {self.num_inference_steps}; it must be at least "
                "1, or absent for one step per code",
            ),
        )


def guidance_at(share: float, options: SamplingOptions) -> float:
    """The guidance scale where this fraction of the codes, in [0,1), is decided; 1 is off."""
    first, last = options.guidance_interval
    if not first <= share < last:
        return 1.0
    if options.guidance_power is None:
        return options.guidance_scale
    return (
        1
        + (options.guidance_scale - 1) * (1 - math.cos(math.pi * share**options.guidance_power)) / 2
    )


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Sets all but the k largest logits of each row to -inf; ties with the k-th are kept."""
    k = min(k, logits.shape[-1])
    return logits.masked_fill(logits < logits.topk(k).values[..., -1:], float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Sets all logits outside the smallest set that reaches probability p to -inf; the most likely
    one always stays."""
    ordered, order = logits.sort(descending=True)
    probabilities = ordered.softmax(-1)
    before = cumulative_sum(probabilities) - probabilities
    # In fp32 p may be 0, as is what comes before the most likely one.
    dropped = (before >= p) & (before > 0)
    return logits.masked_fill(dropped.scatter(-1, order, dropped), float("-inf"))


def keep_min_p(logits: Tensor, conditional: Tensor, p: float | Tensor) -> Tensor:
    """Sets the logits (...,K) of codes that `conditional` (...,K) finds less than p times as likely
    as its likeliest to -inf."""
    # Compared as probabilities, where p may be 0.
    likelihood = (conditional - conditional.amax(-1, keepdim=True)).exp()
    return logits.masked_fill(likelihood < p, float("-inf"))


def guide(conditional: Tensor, null: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance on logits."""
    return null + scale * (conditional - null)


def warp_logits(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> Tensor:
    """Temperature, then top-k, then top-p; (...,K) -> (...,K). A temperature of 0 keeps the largest
    logit alone."""
    if temperature < LEAST_TEMPERATURE:
        return keep_top_k(logits, 1)
    logits = logits / temperature
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    return logits if top_p is None else keep_top_p(logits, top_p)


def cumulative_sum(values: Tensor) -> Tensor:
    """(...,K) -> (...,K), summed in blocks. `torch.compile` splits one long scan over a GPU's
    processors, which torch 2.11 cannot compile for 16,384 classes, and whose rounding would differ
    from call to call."""
    classes = values.shape[-1]
    blocks = F.pad(values, (0, -classes % _BLOCK)).unflatten(-1, (-1, _BLOCK))
    earlier = F.pad(blocks.sum(-1), (1, -1)).cumsum(-1)
    return (blocks.cumsum(-1) + earlier[..., None]).flatten(-2)[..., :classes]


def sample_from_uniform(logits: Tensor, uniform: Tensor) -> Tensor:
    """Inverts the cumulative distribution: logits (...,K) in fp32, uniform (...) in [0,1) ->
    classes (...). A class of probability 0 is never drawn."""
    probabilities = logits.softmax(-1)
    cumulative = cumulative_sum(probabilities)
    # A parallel sum (CUDA) may rise or fall where a class has probability 0, so these classes are
    # left out.
    reached = cumulative.masked_fill(probabilities == 0, 0.0)
    # The total is 1 only up to rounding. The largest float below it is reached by some class.
    below_total = reached.amax(-1, keepdim=True) * (1 - 2**-24)
    threshold = torch.minimum(uniform[..., None].to(cumulative) * cumulative[..., -1:], below_total)
    return (reached > threshold).byte().argmax(-1)


def per_seed_uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """(B,count) uniform numbers in [0,1), row i from a generator seeded with seeds[i]; the same on
    every device."""
    return torch.stack(
        [torch.rand(count, generator=_generator(seed), device="cpu") for seed in seeds]
    )


def per_seed_normals(seeds: Sequence[int], count: int) -> Tensor:
    """(B,count) standard normal numbers, row i from a generator seeded with seeds[i]."""
    return torch.stack(
        [torch.randn(count, generator=_generator(seed), device="cpu") for seed in seeds]
    )


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(int(seed))
