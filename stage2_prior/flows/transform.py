"""What the transforms of a flow have in common: their interface, the network that computes shift
and scale, and permutations of dimensions. Knows vectors alone.

Legend: B batch, n dimensions of a latent vector, C features of a context, I inputs and O outputs of
a conditioner.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from stage2_prior.flows.config import Permutation

_MAX_LOG_SCALE = 3.0
"""One transform scales by a factor of at most e^3 = 20, so that no step makes it overflow."""


class Transform(nn.Module):
    """An invertible map of vectors, x <-> u."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B,n) -> u (B,n) and log |det du/dx| (B,)."""
        raise NotImplementedError

    def inverse(self, u: Tensor, context: Tensor | None = None) -> Tensor:
        """u (B,n) -> x (B,n)."""
        raise NotImplementedError


class Conditioner(nn.Module):
    """An MLP from known dimensions, and a context, to the shift and log-scale of others. It starts
    at 0 for both, so that a transform starts as the identity.

    Args:
        layers: linear layers, with the features of a shift and of a log-scale after the last one.
        context_features: C; the context is added to the first hidden layer.
    """

    def __init__(self, layers: Sequence[nn.Linear], context_features: int = 0) -> None:
        super().__init__()
        self.hidden = nn.ModuleList(layers[:-1])
        self.output = layers[-1]
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        self.from_context = (
            nn.Linear(context_features, layers[0].out_features, bias=False)
            if context_features
            else None
        )

    def forward(self, known: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Known dimensions (B,I), context (B,C) -> shift and log-scale, (B,O) each."""
        features = known
        for number, layer in enumerate(self.hidden):
            features = layer(features)
            if number == 0 and self.from_context is not None:
                features = features + self.from_context(context)
            features = F.silu(features)
        shift, log_scale = self.output(features).chunk(2, dim=-1)
        return shift, _MAX_LOG_SCALE * (log_scale / _MAX_LOG_SCALE).tanh()


def permutations(features: int, count: int, how: Permutation) -> list[list[int]]:
    """An order of the dimensions 0..n-1 for each of `count` transforms, the same in every call.
    Each second one is the reverse of the one before, so that couplings change both halves."""
    shuffle = random.Random(0)
    order = list(range(features))
    orders = []
    for number in range(count):
        if number % 2:
            order = order[::-1]
        elif how == "random":
            order = shuffle.sample(range(features), features)
        else:
            order = list(range(features))
        orders.append(order)
    return orders
