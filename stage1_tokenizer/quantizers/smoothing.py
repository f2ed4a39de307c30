"""Smoothing transformations: continuous stand-ins for bits, so that gradients pass through binary
latents. Knows numbers alone.

A bit z ~ Bernoulli(q) gets a companion s in [0,1] with density r(s|z). The distribution function of
s is the mixture F(s) = (1-q) F0(s) + q F1(s), so s = F^-1(u) with u uniform is a sample of it,
differentiable in q. As the inverse temperature b grows, the densities shrink onto 0 and 1 and s
becomes the bit, the step 1[u >= 1-q].

    spike_exponential   r(s|0) = delta(s), r(s|1) = b e^(b s) / (e^b - 1)
                        (DVAE, Rolfe 2016, section 2.1)
    spike_power         r(s|0) = delta(s), r(s|1) = (1-s)^(1/b - 1) / b
    spike_root          r(s|0) = delta(s), r(s|1) = b s^(b - 1)
    exponential_pair    r(s|0) = b e^(-b s) / (1 - e^-b), r(s|1) = r(1-s|0)
                        (DVAE++, Vahdat et al. 2018a, section 3)
    power_pair          r(s|0) = s^(1/b - 1) / b, r(s|1) = r(1-s|0)
                        (DVAE#, Vahdat et al. 2018b, section 4)
    two_sided_power     s = (1-q) (u / (1-q))^b below u = 1-q, 1 - q ((1-u) / q)^b above
                        (a two-sided power distribution, van Dorp & Kotz 2002)

With a spike, s is 0 below u = 1-q. Above, x = (u + q - 1) / q rises from 0 to 1. Lecture notes
number these transformations:

    f1   log_a(x (a^b - 1) + 1) / b   spike_exponential; a base a other than e rescales b by ln a
    f2   1 - (1-x)^b                  spike_power
    f2'  x^(1/b)                      spike_root
    f3   see above                    two_sided_power

In the pairs and in two_sided_power both ends are flat: s(u) stays near 0 for u well below 1-q and
near 1 well above it, as a bit would. The implicit function theorem gives the gradient of mixtures:
ds/dq = -(dF/dq) / (dF/ds) = (F0(s) - F1(s)) / ((1-q) r(s|0) + q r(s|1)). two_sided_power is no such
mixture, because its densities of s given the bit move with q: ds/dq = (b-1) min(s/(1-q), (1-s)/q).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

Mixture = Literal[
    "spike_exponential", "spike_power", "spike_root", "exponential_pair", "power_pair"
]
"""Smoothings with densities of s given the bit that do not depend on q."""
Smoothing = Literal[Mixture, "two_sided_power"]
_HALVINGS = 30
_SHARPEST = 80.0
"""Largest inverse temperature: s hardly differs from its bit, and e^-b is still a normal number."""
_EDGE = 1e-7
"""The densities of power_pair are infinite at 0 and 1; s keeps this far from both."""
_TINY = 1e-30
"""Divisors are at least this: a certain bit has 0/0 at the edge."""


def distributions(s: Tensor, sharpness: float, kind: Mixture) -> tuple[Tensor, Tensor]:
    """F0(s) and F1(s), of the shape of s, at inverse temperature `sharpness`."""
    b = sharpness
    if kind == "power_pair":
        return s ** (1 / b), 1 - (1 - s) ** (1 / b)
    if kind == "spike_power":
        return torch.ones_like(s), 1 - (1 - s) ** (1 / b)
    if kind == "spike_root":
        return torch.ones_like(s), s**b
    f1 = (torch.exp(b * (s - 1)) - math.exp(-b)) / -math.expm1(-b)
    if kind == "spike_exponential":
        return torch.ones_like(s), f1
    return torch.expm1(-b * s) / math.expm1(-b), f1


def density(s: Tensor, q: Tensor, sharpness: float, kind: Mixture) -> Tensor:
    """(1-q) r(s|0) + q r(s|1); of a spike only the part that is a density."""
    b = sharpness
    if kind == "power_pair":
        return ((1 - q) * s ** (1 / b - 1) + q * (1 - s) ** (1 / b - 1)) / b
    if kind == "spike_power":
        return q * (1 - s) ** (1 / b - 1) / b
    if kind == "spike_root":
        return q * b * s ** (b - 1)
    r1 = b * torch.exp(b * (s - 1)) / -math.expm1(-b)
    if kind == "spike_exponential":
        return q * r1
    return (1 - q) * b * torch.exp(-b * s) / -math.expm1(-b) + q * r1


def inverse(u: Tensor, q: Tensor, sharpness: float, kind: Smoothing) -> Tensor:
    """F^-1(u): in closed form where there is one, else by bisection."""
    b = sharpness
    tail = math.exp(-b)
    above = ((u - (1 - q)) / q.clamp(min=_TINY)).clamp(0, 1)
    match kind:
        case "spike_exponential":
            return torch.where(above > 0, 1 + torch.log(above + (1 - above) * tail) / b, 0.0).clamp(
                0, 1
            )
        case "spike_power":
            return -torch.expm1(b * torch.log1p(-above))
        case "spike_root":
            return above ** (1 / b)
        case "two_sided_power":
            below = (u / (1 - q).clamp(min=_TINY)).clamp(max=1)
            beyond = ((1 - u) / q.clamp(min=_TINY)).clamp(max=1)
            return torch.where(u < 1 - q, (1 - q) * below**b, 1 - q * beyond**b)
        case "exponential_pair":
            # With w = e^(-b s): (1-q) w^2 - m w - q e^-b = 0, m = (1-q) - q e^-b - u (1 - e^-b).
            m = (1 - q) - q * tail + u * math.expm1(-b)
            root = (m.square() + 4 * (1 - q) * q * tail).sqrt()
            # Of the two forms of the positive root the one that does not cancel.
            low_w = 2 * q * tail / (root - m).clamp(min=_TINY)
            w = torch.where(m > 0, (m + root) / (2 * (1 - q)), low_w)
            return (-w.log() / b).clamp(0, 1)
        case "power_pair":
            low = torch.zeros_like(u)
            high = torch.ones_like(u)
            for _ in range(_HALVINGS):
                middle = (low + high) / 2
                f0, f1 = distributions(middle, b, kind)
                too_low = (1 - q) * f0 + q * f1 < u
                low = torch.where(too_low, middle, low)
                high = torch.where(too_low, high, middle)
            return ((low + high) / 2).clamp(_EDGE, 1 - _EDGE)


def slope(s: Tensor, q: Tensor, sharpness: float, kind: Smoothing) -> Tensor:
    """ds/dq at fixed u."""
    if kind == "two_sided_power":
        below = s / (1 - q).clamp(min=_TINY)
        beyond = (1 - s) / q.clamp(min=_TINY)
        return (sharpness - 1) * torch.minimum(below, beyond)
    f0, f1 = distributions(s, sharpness, kind)
    rise = (f0 - f1) / density(s, q, sharpness, kind).clamp(min=1e-6)
    # On the spike s does not move with q.
    return torch.where(s > 0, rise, 0.0)


class _Smooth(torch.autograd.Function):
    """s = F^-1(u; q), with its gradient in q. `ctx` is `Any`: its attributes are what `forward`
    sets."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, u: Tensor, sharpness: float, kind: Smoothing) -> Tensor:
        s = inverse(u, q, sharpness, kind)
        ctx.save_for_backward(q, s)
        ctx.sharpness = sharpness
        ctx.kind = kind
        return s

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        q, s = ctx.saved_tensors
        return gradients[0] * slope(s, q, ctx.sharpness, ctx.kind), None, None, None


def smooth(q: Tensor, u: Tensor, sharpness: float, kind: Smoothing) -> Tensor:
    """Samples s in [0,1] of bits with probabilities q, from uniform numbers u of the same shape;
    differentiable in q."""
    return _Smooth.apply(q, u, min(sharpness, _SHARPEST), kind)
