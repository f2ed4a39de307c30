"""Figures of a histogram of codes, and which quantizer a configuration names."""

from __future__ import annotations

import pytest
import torch

from stage1_tokenizer import build_quantizer, codebook_statistics
from stage1_tokenizer.quantizers import GumbelQuantizer, VectorQuantizer
from tests.helpers.tokenizers import tiny_config


@pytest.mark.parametrize(
    ("counts", "usage", "perplexity", "dead"),
    [
        ([5, 5, 5, 5], 1.0, 4.0, 0),
        ([7, 0, 0, 0], 0.25, 1.0, 3),
        ([1, 1, 0, 0], 0.5, 2.0, 2),
        ([2, 1, 1, 0], 0.75, 2**1.5, 1),
    ],
)
def test_by_hand(counts, usage, perplexity, dead):
    figures = codebook_statistics(torch.tensor(counts))
    assert figures.usage == usage and figures.dead == dead
    assert figures.perplexity == pytest.approx(perplexity)


def test_no_codes_at_all_are_all_dead():
    figures = codebook_statistics(torch.zeros(4, dtype=torch.long))
    assert (figures.usage, figures.perplexity, figures.dead) == (0.0, 1.0, 4)


def test_large_counts_lose_nothing():
    counts = torch.full((1000,), 2**40)
    assert codebook_statistics(counts).perplexity == pytest.approx(1000)


def test_a_configuration_names_its_quantizer():
    assert isinstance(build_quantizer(tiny_config(quantizer="vq")), VectorQuantizer)
    assert isinstance(build_quantizer(tiny_config(quantizer="gumbel")), GumbelQuantizer)
