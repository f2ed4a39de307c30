"""A prior small enough to check exhaustively, with weights that are not at their (partly zero)
start."""

from __future__ import annotations

import pytest
import torch

from stage2_prior import PriorModule
from tests.helpers.priors import tiny_prior


@pytest.fixture
def prior() -> PriorModule:
    return tiny_prior()


@pytest.fixture
def text_ids() -> torch.Tensor:
    """Three captions of 3, 1 and 4 words: (3,6)."""
    return torch.tensor([[1, 5, 6, 7, 2, 0], [1, 9, 2, 0, 0, 0], [1, 5, 11, 12, 13, 2]])


@pytest.fixture
def codes() -> torch.Tensor:
    return torch.randint(0, 11, (3, 9), generator=torch.Generator().manual_seed(1))
