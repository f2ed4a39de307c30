"""What every quantizer returns and how use of a codebook is counted. Knows codes; knows no particular quantizer.

Legend: B batch, D features of a code, h w code grid, K codes, N = B h w vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

DEAD_BELOW = 0.01
"""A code used less than this share of the average use counts as dead in the reported figures."""


@dataclass
class Quantized:
    """A quantizer's result."""

    latents: Tensor
    """(B,D,h,w) what the decoder sees."""
    codes: Tensor
    """(B,h,w) int64."""
    loss: Tensor
    """Scalar: what the quantizer adds to the objective (nats a picture for `gumbel`, squared distance for `vq`)."""
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class CodebookStatistics:
    """How a codebook is used."""

    usage: float
    """Share of codes used at all."""
    perplexity: float
    """exp of the entropy of the codes' use: how many equally used codes would be as varied."""
    dead: int
    """Codes never used."""


def codebook_statistics(counts: Tensor) -> CodebookStatistics:
    """From a histogram (K,) of codes."""
    p = counts.double() / counts.sum().clamp(min=1)
    entropy = -(p * p.clamp(min=1e-300).log()).sum()
    used = int((counts > 0).sum())
    return CodebookStatistics(used / len(counts), float(entropy.exp()), len(counts) - used)


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes; itself where there is one. Called while training only, by all of them."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


class Quantizer(nn.Module):
    """Base of all: counts the use of codes while training, over all processes."""

    counts: Tensor

    def __init__(self, num_codes: int, decay: float) -> None:
        super().__init__()
        self.num_codes, self.decay = num_codes, decay
        # Moving average of the uses of each code in a step.
        self.register_buffer("counts", torch.zeros(num_codes))

    def embed(self, codes: Tensor) -> Tensor:
        """Codes (B,h,w) -> vectors (B,D,h,w)."""
        raise NotImplementedError

    @torch.no_grad()
    def count(self, codes: Tensor) -> Tensor:
        """Adds a step's codes, over all processes, to the counts; returns the weight () of this step in them."""
        histogram = sum_over_processes(torch.bincount(codes.flatten(), minlength=self.num_codes).float())
        # The first step counts whole, or every code would seem dead for the first hundred steps.
        weight = torch.where(self.counts.sum() > 0, 1 - self.decay, 1.0)
        self.counts.lerp_(histogram, weight)
        return weight

    @torch.no_grad()
    def use(self) -> dict[str, Tensor]:
        """Usage, perplexity and dead codes by the moving average."""
        p = self.counts / self.counts.sum().clamp(min=1e-8)
        alive = p > DEAD_BELOW / self.num_codes
        return {
            "codebook_usage": alive.float().mean(),
            "codebook_perplexity": (-(p * p.clamp(min=1e-30).log()).sum()).exp(),
            "dead_codes": (~alive).sum(),
        }
