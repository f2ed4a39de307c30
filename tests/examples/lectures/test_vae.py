"""A tiny VAE learns discs."""

from __future__ import annotations

from pathlib import Path

import torch

from examples.lectures.vae import SIZE, discs, main, train
from stage1_tokenizer import to_model_range


def test_discs_are_where_their_centres_say():
    images, centres = discs(50, torch.Generator().manual_seed(0))
    assert images.shape == (50, SIZE, SIZE, 3) and images.dtype == torch.uint8
    ink = 255 - images[..., 0].float()
    axis = torch.arange(SIZE) - (SIZE - 1) / 2
    found = torch.stack([ink.sum(2) @ axis, ink.sum(1) @ axis], dim=1) / ink.sum((1, 2))[:, None]
    torch.testing.assert_close(found / 5, centres, atol=0.03, rtol=0)


def test_a_few_steps_lower_the_squared_error():
    images = to_model_range(discs(64, torch.Generator().manual_seed(1))[0])
    errors = [
        float((vae.decode_latents(vae.posterior(images).mean) - images).square().mean())
        for vae in (train(1), train(60))
    ]
    assert errors[1] < errors[0] / 2


def test_the_plot_is_written(tmp_path: Path):
    main(tmp_path / "vae.png", steps=1)
    assert (tmp_path / "vae.png").read_bytes().startswith(b"\x89PNG")
