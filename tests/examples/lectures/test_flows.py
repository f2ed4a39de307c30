"""A flow of two moons gains nats by training, and its samples lie near the moons."""

from __future__ import annotations

from pathlib import Path

import torch

from examples.lectures.flows import fit, main, two_moons


def test_the_moons_are_centred_and_reach_into_each_other():
    points = two_moons(20_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(points.mean(0), torch.zeros(2), atol=0.05, rtol=0)
    assert points.abs().max() < 3


def test_training_lowers_the_nats_per_point():
    _, history = fit(40)
    assert len(history) == 40 and sum(history[-5:]) < sum(history[:5]) - 1
    again, _ = fit(1)
    other, _ = fit(1)
    points = two_moons(10, torch.Generator().manual_seed(1))
    assert torch.equal(again.log_prob(points), other.log_prob(points))


def test_the_plot_is_written(tmp_path: Path):
    main(tmp_path / "flows.png", steps=1)
    assert (tmp_path / "flows.png").read_bytes().startswith(b"\x89PNG")
