"""A learned prior of Gaussian latents, as the objective calls it. Knows a module with `log_prob`;
nothing of its kind.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor, nn


class HasLogProb(Protocol):
    """Log-probabilities of latents."""

    def log_prob(self, z: Tensor) -> Tensor:
        """Latents (B,n) -> log p(z) (B,), in nats."""
        ...


class PriorLogProb(nn.Module):
    """Latents (B,n) -> log p(z) (B,) by the prior's `log_prob`, in fp32.

    It is called as a module, so that data-parallel training averages its gradients.
    """

    def __init__(self, prior: nn.Module) -> None:
        super().__init__()
        self.prior = prior

    def forward(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            return cast(HasLogProb, self.prior).log_prob(z.float())

    @property
    def learns(self) -> bool:
        """Whether there is a parameter to train."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The weights of linear layers, which optimizers for matrices may step."""
        linear = [module for module in self.modules() if isinstance(module, nn.Linear)]
        return [module.weight for module in linear if module.weight.requires_grad]  # type: ignore[misc]
