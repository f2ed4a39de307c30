"""A learned prior shrinks the marginal KL alone, and the aggregated posterior brings it to 0."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from examples.lectures.surgery import bars, main, parts_by_prior, train_prior, train_vae
from stage1_tokenizer.quantizers.gaussian import GaussianQuantizer


def test_images_are_black_and_white_bars():
    images = bars(200, torch.Generator().manual_seed(0))
    assert images.shape == (200, 8, 8, 1) and set(images.unique().tolist()) == {0, 255}
    white = (images == 255).float().squeeze(-1)
    by_row = (white.mean(2) > 0.6).sum(1)
    by_column = (white.mean(1) > 0.6).sum(1)
    assert ((by_row == 2) ^ (by_column == 2)).float().mean() > 0.95
    assert 0.3 < (by_row == 2).float().mean() < 0.7


def test_a_learned_prior_shrinks_the_marginal_kl_and_leaves_the_rest_alone():
    vae = train_vae(1)
    assert isinstance(vae.quantizer, GaussianQuantizer)
    with torch.no_grad():  # posteriors far from N(0, I): about N((1.5, -1), 0.2^2)
        vae.quantizer.to_vector.bias.copy_(torch.tensor([1.5, -1.0, -1.5, -1.5]))
    prior = train_prior(vae, 60)
    parts = parts_by_prior(vae, prior, bars(50, torch.Generator().manual_seed(1)))
    fixed, learned, best = parts.values()
    assert list(parts) == ["N(0, I)", "RealNVP", "q_agg"]
    assert best.marginal_kl == pytest.approx(0, abs=1e-9)
    assert abs(learned.marginal_kl) < 0.2 and fixed.marginal_kl > 1
    for other in (learned, best):
        assert other.reconstruction == fixed.reconstruction
        assert other.mutual_information == fixed.mutual_information


def test_the_plot_is_written(tmp_path: Path):
    main(tmp_path / "surgery.png", steps=2, images=20)
    assert (tmp_path / "surgery.png").read_bytes().startswith(b"\x89PNG")
