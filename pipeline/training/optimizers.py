"""Which optimizer steps which parameter, and at what rate. Knows parameters and steps; knows no
loop."""

from __future__ import annotations

import math

import torch
from torch import nn

from pipeline.config.train import TrainConfig
from pipeline.training.muon import Muon


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then down to `min_lr_ratio` of the peak by the schedule. `wsd` is there at
    the last step, `steps` - 1, and the cosine one step later."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    floor = config.min_lr_ratio
    if config.schedule == "wsd":
        falling = max(round(config.decay_ratio * config.steps), 1)
        left = min(max(config.steps - 1 - step, 0) / falling, 1.0)
        return config.learning_rate * (floor + (1 - floor) * left)
    span = max(config.steps - config.warmup_steps, 1)
    progress = min((step - config.warmup_steps) / span, 1.0)
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def optimizers_for(
    group: str, network: nn.Module, config: TrainConfig
) -> dict[str, torch.optim.Optimizer]:
    """A group's optimizers by name, `GROUP/KIND`. AdamW decays tensors of two or more dimensions
    only, and none that is marked `no_weight_decay`."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizers: dict[str, torch.optim.Optimizer] = {}
    if config.optimizer == "muon":
        matrices = network.hidden_matrices()  # type: ignore[operator]
        chosen = {id(p) for p in matrices}
        parameters = [p for p in parameters if id(p) not in chosen]
        if matrices:
            optimizers[f"{group}/muon"] = Muon(
                matrices, lr=config.learning_rate, weight_decay=config.weight_decay
            )
    decayed = [p for p in parameters if p.ndim >= 2 and not hasattr(p, "no_weight_decay")]
    chosen = {id(p) for p in decayed}
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if id(p) not in chosen], "weight_decay": 0.0},
    ]
    optimizers[f"{group}/adamw"] = torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=config.betas, fused=True
    )
    return optimizers
