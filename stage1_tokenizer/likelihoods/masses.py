"""Distributions of 8-bit values: the mass that a density has on the step around each value. Knows
units of the model's range; knows no networks and no likelihoods.

The first and last of the 256 values take the tails beyond them too, so that the masses sum to one
(Salimans et al. 2017, https://arxiv.org/abs/1701.05517, section 2.1). All functions are
elementwise, broadcast their arguments and return log masses in nats. Far from the location a mass
underflows; its logarithm here does not: it is a difference of logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from stage1_tokenizer.options import STEP
from stage1_tokenizer.pixels import step_edges

VALUES = 256
"""Number of values of an 8-bit dimension."""
LAST = VALUES - 1


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(-x)) of x above 0."""
    return torch.log(-torch.expm1(-x))


def laplace_log_cdf(x: Tensor) -> Tensor:
    """The log distribution function of the Laplace of location 0 and scale 1."""
    below = x - math.log(2)
    above = torch.log1p(-0.5 * torch.exp(-x.abs()))
    return torch.where(x < 0, below, above)


def log_mass(
    log_cdf: Callable[[Tensor], Tensor], values: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    """The log mass of values 0 to 255 under a distribution that is symmetric about 0.

    Args:
        log_cdf: its log distribution function.
        values: which values these are; integers.
        low, high: the standardized edges of each value's step.
    """
    first = values == 0
    last = values == LAST
    # The distribution function is accurate below 0 alone: steps above are mirrored.
    mirrored = last | ((low + high > 0) & ~first)
    upper = log_cdf(torch.where(mirrored, -low, high))
    lower = log_cdf(torch.where(mirrored, -high, low))
    tail = first | last
    # A tail has no other edge. Any number will do there, and 1 has a finite gradient.
    gap = torch.where(tail, 1.0, upper - lower)
    return torch.where(tail, upper, upper + log1mexp(gap))


def normal_log_mass(values: Tensor, location: Tensor, scale: Tensor | float) -> Tensor:
    """Of the normal distribution; `scale` is its standard deviation."""
    low, high = step_edges(values, location.dtype)
    return log_mass(
        torch.special.log_ndtr, values, (low - location) / scale, (high - location) / scale
    )


def logistic_log_mass(values: Tensor, location: Tensor, scale: Tensor) -> Tensor:
    """Of the logistic: sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b)), so that
    no difference is taken."""
    low, high = step_edges(values, location.dtype)
    below_high = F.logsigmoid((high - location) / scale)
    above_low = F.logsigmoid((location - low) / scale)
    width = log1mexp(STEP / scale)
    first = values == 0
    last = values == LAST
    return (
        torch.where(last, 0.0, below_high)
        + torch.where(first, 0.0, above_low)
        + torch.where(first | last, 0.0, width)
    )
