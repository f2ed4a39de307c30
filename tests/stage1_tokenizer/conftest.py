"""A tokenizer small enough to check exhaustively: 16x16 images, 4x4 codes of a codebook of 12."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stage1_tokenizer import TokenizerModule
from tests.helpers.tokenizers import tiny_tokenizer


@pytest.fixture
def tokenizer() -> TokenizerModule:
    return tiny_tokenizer()


@pytest.fixture
def images() -> Tensor:
    """uint8 (6,16,16,3)."""
    return torch.randint(
        0, 256, (6, 16, 16, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    )
