"""Shared by the scripts: trains a small tokenizer on images that a function draws."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stage1_tokenizer import ImageTokenizer, ObjectiveConfig, TokenizerConfig
from stage1_tokenizer.objective import TokenizerObjective

Draw = Callable[[torch.Generator], Tensor]


def train_tokenizer(
    model: TokenizerConfig, config: ObjectiveConfig, draw: Draw, steps: int
) -> ImageTokenizer:
    """A tokenizer after some steps of Adam on batches uint8 (B,H,W,C) of `draw`."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    tokenizer = ImageTokenizer(model)
    objective = TokenizerObjective(tokenizer, config)
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=3e-3)
    for step in range(steps):
        (loss,) = objective.losses(draw(generator), step)
        optimizer.zero_grad()
        loss.value.backward()
        torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
        optimizer.step()
    return tokenizer.eval()
