"""Metrics of a histogram of codes, and which quantizer a configuration names."""

from __future__ import annotations

import pytest
import torch

from stage1_tokenizer import Level, build_quantizer, codebook_statistics, statistics_by_level
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
def test_usage_statistics_match_hand_computation(counts, usage, perplexity, dead):
    metrics = codebook_statistics(torch.tensor(counts))
    assert metrics.usage == usage and metrics.dead == dead
    assert metrics.perplexity == pytest.approx(perplexity)


def test_without_codes_all_are_dead():
    metrics = codebook_statistics(torch.zeros(4, dtype=torch.long))
    assert (metrics.usage, metrics.perplexity, metrics.dead) == (0.0, 1.0, 4)


def test_large_counts_stay_exact():
    counts = torch.full((1000,), 2**40)
    assert codebook_statistics(counts).perplexity == pytest.approx(1000)


def test_a_code_of_several_levels_counts_among_those_of_its_own_level():
    """Four codes of a level that uses one have an entropy of 0, twelve of an even level log 4."""
    counts = torch.tensor([4, 0, 3, 3, 3, 3])
    layout = (Level(grid=(1, 1), num_codes=2), Level(grid=(1, 3), num_codes=4))
    found = statistics_by_level(counts, layout)
    assert found["_level_1"] == codebook_statistics(counts[:2])
    assert found["_level_2"] == codebook_statistics(counts[2:])
    assert (found[""].usage, found[""].dead) == (5 / 6, 1)
    assert found[""].perplexity == pytest.approx(4 ** (12 / 16))
    assert set(statistics_by_level(counts, (Level(grid=(1, 4), num_codes=6),))) == {""}


def test_levels_used_alike_have_the_perplexity_of_one():
    even = torch.full((8,), 5)
    assert codebook_statistics(even, even, even).perplexity == pytest.approx(8)


def test_quantizer_is_built_from_its_name():
    assert isinstance(build_quantizer(tiny_config(quantizer="vq")), VectorQuantizer)
    assert isinstance(build_quantizer(tiny_config(quantizer="gumbel")), GumbelQuantizer)
