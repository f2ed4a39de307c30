"""The exponential moving average (EMA) of weights, which is evaluated and exported. Knows
parameters; knows no loop."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pipeline.config.train import TrainConfig


def ema_decay(step: int, config: TrainConfig) -> float:
    """Decay of the EMA: small at first, so that the random initialisation is forgotten."""
    return min(config.ema_decay, (1 + step) / (10 + step))


class EMA:
    """Exponential moving average of every trainable parameter, but for those that a module's
    `ema_excluded_parameters` names, which are copied. Buffers are not averaged: codebook
    statistics are averages already."""

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        self.parameters: list[Tensor] = [
            p for network in networks.values() for p in network.parameters() if p.requires_grad
        ]
        self.shadow = [p.detach().clone() for p in self.parameters]
        modules = (module for network in networks.values() for module in network.modules())
        jumping = {
            id(p) for module in modules for p in getattr(module, "ema_excluded_parameters", list)()
        }
        self._jumping = [i for i, p in enumerate(self.parameters) if id(p) in jumping]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        torch._foreach_lerp_(self.shadow, self.parameters, 1 - decay)
        for i in self._jumping:
            self.shadow[i].copy_(self.parameters[i])

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the averaged weights with the trained ones; a second call undoes it."""
        for parameter, average in zip(self.parameters, self.shadow, strict=True):
            held = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(held)
