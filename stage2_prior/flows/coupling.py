"""RealNVP's affine coupling: half of the dimensions scale and shift the other half. Density and
sampling take one pass each. Knows vectors alone.

Legend: B batch, n dimensions of a latent vector, C features of a context, n' dimensions that are
kept.

Dinh et al. 2016 (https://arxiv.org/abs/1605.08803), eq. 7-8: u_a = x_a and u_b = x_b exp(s(x_a)) +
t(x_a), with log |det du/dx| = sum s (eq. 6). Their s goes through a tanh, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from stage2_prior.flows.transform import Conditioner, Transform


class AffineCoupling(Transform):
    """Keeps the first half of the dimensions, by a given order, and transforms the others.

    Args:
        order: the dimensions 0..n-1 in any order.
        width, depth: hidden features, and number of hidden layers, of the conditioner.
        context_features: C.

    Raises:
        ValueError: n is 1, so that there is no other half.
    """

    kept: Tensor
    changed: Tensor

    def __init__(
        self, order: Sequence[int], width: int, depth: int, context_features: int = 0
    ) -> None:
        super().__init__()
        if len(order) < 2:
            raise ValueError(
                "an affine coupling needs latents of at least 2 dimensions; for 1, set "
                "prior.latent.kind to maf or mixture"
            )
        half = len(order) // 2
        self.register_buffer("kept", torch.tensor(order[:half]))
        self.register_buffer("changed", torch.tensor(order[half:]))
        sizes = [half, *[width] * depth, 2 * (len(order) - half)]
        layers = [nn.Linear(size, after) for size, after in pairwise(sizes)]
        self.conditioner = Conditioner(layers, context_features)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shift, log_scale = self.conditioner(x[:, self.kept], context)
        changed = x[:, self.changed] * log_scale.exp() + shift
        return x.index_copy(1, self.changed, changed), log_scale.sum(1)

    def inverse(self, u: Tensor, context: Tensor | None = None) -> Tensor:
        shift, log_scale = self.conditioner(u[:, self.kept], context)
        changed = (u[:, self.changed] - shift) * (-log_scale).exp()
        return u.index_copy(1, self.changed, changed)
