"""Bits of a pixel by a density, by a mass, and by dequantization."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from examples.lectures.dequantization import costs, main


@pytest.mark.parametrize("std", [0.02, 0.1, 0.3, 1.0])
def test_the_density_claims_less_than_the_exact_bits_and_dequantization_more(std):
    at_value, exact, bound = costs(std, 4000, torch.Generator().manual_seed(0))
    assert at_value < exact <= bound and exact >= 0


def test_a_density_has_no_least_number_of_bits():
    claims = [costs(std, 1, torch.Generator().manual_seed(0))[0] for std in (0.1, 0.05, 0.025)]
    assert claims[0] < 0 and claims[0] - claims[1] == pytest.approx(1, abs=1e-6)
    assert claims[1] - claims[2] == pytest.approx(1, abs=1e-6)


def test_the_plot_is_written(tmp_path: Path):
    main(tmp_path / "dequantization.png", samples=20)
    assert (tmp_path / "dequantization.png").read_bytes().startswith(b"\x89PNG")
