"""What every quantizer is and returns, and how use of a codebook is counted. Knows codes; knows no
particular quantizer.

Legend: B batch, D features of a code, h w code grid, K codes, L levels. Codes are (B,h,w) where
there is one level and (B, sum of the levels' lengths) where there are several, level after level,
coarse ones first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer.config import Level
from stage1_tokenizer.posterior import GaussianLatents

DEAD_BELOW = 0.01
"""A code used less than this fraction of the average counts as dead in the reported metrics."""


@dataclass
class Quantized:
    """A quantizer's result."""

    latents: Tensor
    """(B,D,h,w) what the decoder sees."""
    codes: Tensor
    """(B,h,w) or flat, int64; (B,0) where latents are Gaussian."""
    loss: Tensor
    """Scalar: what the quantizer adds to the objective as it stands (squared distances,
    entropies)."""
    kl: Tensor | None = None
    """Scalar: KL(q(codes given image) || uniform) in nats per image, a mean over the batch; None
    where q is one code. Of Gaussian latents, the KL to N(0, I), with free bits."""
    log_q: Tensor | None = None
    """(B,h,w) log probability of each sampled code, for the score function; None where the latents
    carry the gradient."""
    gaussian: GaussianLatents | None = None
    """Gaussian latents and their posterior; None where there are codes."""
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class CodebookStatistics:
    """How a codebook, or the codebooks of several levels, are used."""

    usage: float
    """Fraction of the codes used at all."""
    perplexity: float
    """exp of the mean entropy of a code, given its level: how many equally used codes would be as
    varied."""
    dead: int
    """Codes never used."""


def codebook_statistics(*counts: Tensor) -> CodebookStatistics:
    """From a histogram (K,) of the codes of each level."""
    used = sum(int((level > 0).sum()) for level in counts)
    size = sum(len(level) for level in counts)
    perplexity = perplexity_of_levels([level.double() for level in counts])
    return CodebookStatistics(used / size, float(perplexity), size - used)


def perplexity_of_levels(counts: Sequence[Tensor]) -> Tensor:
    """exp of the mean entropy () of a code, from a histogram (K,), float, of each level's codes.

    Each code counts once, among the codes of its own level. One histogram over all levels would add
    the entropy of the level itself, which is known from a code's place in the stream: two levels
    that each use one code would have a perplexity of 2.
    """
    totals = torch.stack([level.sum() for level in counts])
    entropies = torch.stack([entropy_of_counts(level) for level in counts])
    weights = totals / totals.sum().clamp(min=1e-8)
    return (weights * entropies).sum().exp()


def entropy_of_counts(counts: Tensor) -> Tensor:
    """Entropy () of a histogram (K,), float, in nats."""
    p = counts / counts.sum().clamp(min=1e-8)
    return -(p * p.clamp(min=1e-30).log()).sum()


def count_codes(codes: Tensor, layout: Sequence[Level]) -> Tensor:
    """Histogram (sum of K,) of codes in either form, counted over all levels: level i's codes come
    after those of the levels before."""
    parts = codes.flatten(1).split([level.length for level in layout], dim=1)
    return torch.cat(
        [
            torch.bincount(part.flatten(), minlength=level.num_codes)
            for part, level in zip(parts, layout, strict=True)
        ]
    )


def statistics_by_level(counts: Tensor, layout: Sequence[Level]) -> dict[str, CodebookStatistics]:
    """Of a histogram (sum of K,) over all levels: how all codebooks are used under "" and, where
    there are several levels, each one under "_level_1", ..."""
    levels = counts.split([level.num_codes for level in layout])
    found = {"": codebook_statistics(*levels)}
    if len(levels) > 1:
        found |= {f"_level_{i}": codebook_statistics(own) for i, own in enumerate(levels, start=1)}
    return found


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes; itself where there is one. Called while training
    only, by all of them."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def from_first_process(tensor: Tensor) -> Tensor:
    """The first process's tensor, on every process: what each computes alone differs by rounding
    between devices. Called while training only, by all of them."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        tensor = tensor.contiguous()
        dist.broadcast(tensor, 0)
    return tensor


def mean_over_processes(mean: Tensor) -> Tensor:
    """The mean of all processes' means; the gradient goes to this process's own, which
    data-parallel training averages in turn."""
    others = sum_over_processes(mean.detach().clone())
    count = sum_over_processes(torch.ones((), device=mean.device))
    return mean + (others / count - mean).detach()


class Quantizer(nn.Module):
    """The contract of all quantizers."""

    relaxed = False
    """Whether training sees other latents than those of the codes, by a temperature."""

    def __init__(self, input_dim: int, output_dim: int) -> None:
        super().__init__()
        self.input_dim = input_dim
        self.output_dim = output_dim

    def forward(self, features: Tensor, temperature: float | None = None) -> Quantized:
        """Features (B,input_dim,h,w) -> codes and what the decoder sees of them (B,output_dim,h,w).

        With a `temperature` the codes may be relaxed or sampled, as in training; without one they
        are the most likely ones.
        """
        raise NotImplementedError

    def encode(self, features: Tensor) -> Tensor:
        """The codes alone that `forward` has for features (B,input_dim,h,w) without a
        temperature."""
        return self(features).codes

    def log_assignment(self, features: Tensor) -> Tensor:
        """Log-probabilities (B,h,w,K) of the codes given features (B,input_dim,h,w), where the
        posterior is a distribution of codes: that of each quantizer which is `relaxed`."""
        raise NotImplementedError

    def layout(self, grid: tuple[int, int]) -> tuple[Level, ...]:
        """The levels of the codes of features with this grid; () where there are no codes."""
        raise NotImplementedError

    def embed(self, codes: Tensor, grid: tuple[int, int]) -> Tensor:
        """Codes -> what the decoder sees of them (B,output_dim,h,w), h w being `grid`."""
        raise NotImplementedError

    def vectors(self) -> Tensor:
        """(sum of K, D) the vector of every code of every level."""
        raise NotImplementedError

    def usage(self) -> list[Tensor]:
        """For each level, the moving average (K,) of how often each code is used in a training
        step."""
        raise NotImplementedError

    def surrogate(self, cost: Tensor, log_q: Tensor) -> Tensor:
        """Where results hold `log_q`: the scalar whose gradient the objective adds, given what each
        dimension (B,C,H,W) cost, in nats."""
        raise NotImplementedError


class SingleLevel(Quantizer):
    """One code per position: counts the use of codes in training, over all processes."""

    counts: Tensor

    def __init__(
        self, num_codes: int, input_dim: int, output_dim: int, decay: float = 0.99
    ) -> None:
        super().__init__(input_dim, output_dim)
        self.num_codes = num_codes
        self.decay = decay
        # Moving average of the uses of each code in a step.
        self.register_buffer("counts", torch.zeros(num_codes))

    def layout(self, grid: tuple[int, int]) -> tuple[Level, ...]:
        return (Level(grid=grid, num_codes=self.num_codes),)

    def look_up(self, codes: Tensor) -> Tensor:
        """Codes (...) -> their vectors (...,D)."""
        return F.embedding(codes, self.vectors())

    def vectors(self) -> Tensor:
        return self.look_up(torch.arange(self.num_codes, device=self.counts.device))

    def embed(self, codes: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.look_up(codes).permute(0, 3, 1, 2)

    def usage(self) -> list[Tensor]:
        return [self.counts]

    def usage_buffers(self) -> list[Tensor]:
        """What `count` adds a step's codes to."""
        return [self.counts]

    @torch.no_grad()
    def count(self, codes: Tensor) -> Tensor:
        """Adds a step's codes, over all processes, to the counts; returns the weight () of this
        step in them."""
        histogram = sum_over_processes(
            torch.bincount(codes.flatten(), minlength=self.num_codes).float()
        )
        # The first step has weight 1, or every code would seem dead for the first hundred steps.
        weight = torch.where(self.counts.sum() > 0, 1 - self.decay, 1.0)
        for average in self.usage_buffers():
            average.lerp_(histogram, weight)
        return weight

    def usage_metrics(self) -> dict[str, Tensor]:
        """Usage, perplexity and dead codes by the moving average."""
        return usage_metrics(self.usage())


@torch.no_grad()
def usage_metrics(uses: Sequence[Tensor]) -> dict[str, Tensor]:
    """What `codebook_statistics` tells of a histogram, of the moving average (K,) of each level's
    use, in which a code is alive from `DEAD_BELOW` on."""
    alive = torch.cat([use / use.sum().clamp(min=1e-8) > DEAD_BELOW / len(use) for use in uses])
    return {
        "codebook_usage": alive.float().mean(),
        "codebook_perplexity": perplexity_of_levels(uses),
        "dead_codes": (~alive).sum(),
    }


def metrics_of_levels(
    levels: Sequence[dict[str, Tensor]], uses: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Each level's metrics under `NAME_level_1`, ..., and under NAME those of all levels: how their
    codes are used, by the moving averages `uses`, and the mean of everything else."""
    merged = {
        name: torch.stack([level[name].float() for level in levels]).mean() for name in levels[0]
    }
    if "codebook_usage" in merged:
        merged |= usage_metrics(uses)
    for number, level in enumerate(levels, start=1):
        merged |= {f"{name}_level_{number}": value for name, value in level.items()}
    return merged
