"""Masked autoregressive flow: each dimension is scaled and shifted by those before it. The density
takes one pass, sampling one pass per dimension. Knows vectors alone.

Legend: B batch, n dimensions of a latent vector, C features of a context.

MAF, Papamakarios et al. 2017 (https://arxiv.org/abs/1705.07057), eq. 3-5: u_i = (x_i - m_i(x_<i))
exp(-a_i(x_<i)), with log |det du/dx| = -sum a. One network computes all m and a by masks: MADE,
Germain et al. 2015 (https://arxiv.org/abs/1502.03509), eq. 12-13.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage2_prior.flows.transform import Conditioner, Transform


class MaskedLinear(nn.Linear):
    """A linear layer in which an output sees the inputs of at most its own degree, or of a lower
    one where `strict`."""

    degrees_in: Tensor
    degrees_out: Tensor

    def __init__(self, degrees_in: Tensor, degrees_out: Tensor, *, strict: bool = False) -> None:
        super().__init__(len(degrees_in), len(degrees_out))
        self.strict = strict
        # Copies: files of weights hold no tensor twice.
        self.register_buffer("degrees_in", degrees_in.clone())
        self.register_buffer("degrees_out", degrees_out.clone())

    def forward(self, values: Tensor) -> Tensor:
        """(B,inputs) -> (B,outputs)."""
        limits = self.degrees_out[:, None]
        visible = limits > self.degrees_in if self.strict else limits >= self.degrees_in
        return F.linear(values, self.weight * visible, self.bias)


def made(order: Sequence[int], width: int, depth: int, context_features: int = 0) -> Conditioner:
    """A conditioner (B,n) -> shift and log-scale (B,n) of each dimension, given those before it in
    `order`.

    A dimension's degree is its place in the order, from 1. Degrees of hidden features are spread
    over 0..n-1. Those of degree 0 see the context alone: without them the first dimension would not
    depend on it.
    """
    features = len(order)
    degrees = torch.empty(features, dtype=torch.long)
    degrees[list(order)] = torch.arange(1, features + 1)
    hidden = torch.arange(width) * features // width
    layers = [
        MaskedLinear(degrees, hidden),
        *(MaskedLinear(hidden, hidden) for _ in range(depth - 1)),
        MaskedLinear(hidden, degrees.repeat(2), strict=True),
    ]
    return Conditioner(layers, context_features)


class MaskedAutoregressive(Transform):
    """One layer of a masked autoregressive flow.

    Args:
        order: the dimensions 0..n-1 in the order in which they are sampled.
        width, depth: hidden features, and number of hidden layers, of the conditioner.
        context_features: C.
    """

    def __init__(
        self, order: Sequence[int], width: int, depth: int, context_features: int = 0
    ) -> None:
        super().__init__()
        self.order = tuple(order)
        self.conditioner = made(order, width, depth, context_features)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shift, log_scale = self.conditioner(x, context)
        return (x - shift) * (-log_scale).exp(), -log_scale.sum(1)

    def inverse(self, u: Tensor, context: Tensor | None = None) -> Tensor:
        x = torch.zeros_like(u)
        for dimension in self.order:
            shift, log_scale = self.conditioner(x, context)
            value = u[:, dimension] * log_scale[:, dimension].exp() + shift[:, dimension]
            # Not in place, so that a gradient can pass.
            x = x.index_copy(1, torch.tensor([dimension], device=u.device), value[:, None])
        return x
