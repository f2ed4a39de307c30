"""Codes of two levels, decoded apart."""

from __future__ import annotations

from pathlib import Path

import torch

from examples.lectures.hierarchy import apart, main, scenes, train
from stage1_tokenizer import to_model_range, to_uint8


def test_levels_are_decoded_apart():
    tokenizer = train(2, batch=8)
    images = torch.from_numpy(scenes("held_out").images(range(3)))
    white = torch.full_like(images[:1], 255)
    every, coarse, fine = apart(tokenizer, torch.cat([images, white]))
    through = to_uint8(tokenizer.reconstruct(to_model_range(torch.cat([images, white]))))
    assert torch.equal(every, through)
    assert torch.equal(coarse[3], every[3]) and torch.equal(fine[3], every[3])
    assert not torch.equal(coarse, fine)


def test_the_plot_is_written(tmp_path: Path):
    main(tmp_path / "hierarchy.png", steps=1)
    assert (tmp_path / "hierarchy.png").read_bytes().startswith(b"\x89PNG")
