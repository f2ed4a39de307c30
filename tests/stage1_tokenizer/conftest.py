"""A tokenizer small enough to check exhaustively: 16x16 pictures, 4x4 codes of a book of 12."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stage1_tokenizer import ImageTokenizer, TokenizerConfig


def tiny_config(**changes: Any) -> TokenizerConfig:
    values = {
        "image_size": 16, "factor": 4, "width": 32, "encoder_depth": 1, "decoder_depth": 1, "num_codes": 12, "code_dim": 4,
    } | changes  # fmt: skip
    return TokenizerConfig(**values)


def tiny_tokenizer(**changes: Any) -> ImageTokenizer:
    """With weights that are not at their partly zero start."""
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(tiny_config(**changes))
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            if parameter.ndim == 4:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return tokenizer.eval()


@pytest.fixture
def tokenizer() -> ImageTokenizer:
    return tiny_tokenizer()


@pytest.fixture
def pictures() -> Tensor:
    """uint8 (6,16,16,3)."""
    return torch.randint(0, 256, (6, 16, 16, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
