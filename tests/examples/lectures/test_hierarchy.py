"""Codes of two levels, decoded apart."""

from __future__ import annotations

from pathlib import Path

import torch

from examples.lectures.hierarchy import SIZE, apart, main, tiles, train
from stage1_tokenizer import to_model_range, to_uint8


def test_quarters_have_one_colour_and_blocks_a_pattern():
    images = tiles(20, torch.Generator().manual_seed(0))
    assert images.shape == (20, SIZE, SIZE, 3) and images.dtype == torch.uint8
    quarter = images[:, :8, :8].flatten(1, 2)
    assert all(1 <= len(colours.unique(dim=0)) <= 2 for colours in quarter)
    blocks = images[:, :4, :4, 0].unique(dim=0)
    dark = (blocks < blocks.amax((1, 2), keepdim=True)).sum((1, 2))
    assert set(dark.tolist()) == {0, 4, 8}


def test_levels_are_decoded_apart():
    tokenizer = train(2)
    images = torch.cat(
        [tiles(3, torch.Generator().manual_seed(1)), torch.full((1, 16, 16, 3), 255)]
    )
    images = images.to(torch.uint8)
    every, coarse, fine = apart(tokenizer, images)
    assert torch.equal(every, to_uint8(tokenizer.reconstruct(to_model_range(images))))
    codes = tokenizer.encode(to_model_range(images))
    assert (codes[:3, :4] != codes[3, :4]).any() and (codes[:3, 4:] != codes[3, 4:]).any()
    for decoded, kept in ((coarse, slice(0, 4)), (fine, slice(4, 20))):
        some = codes[3].repeat(4, 1)
        some[:, kept] = codes[:, kept]
        assert torch.equal(decoded, to_uint8(tokenizer.decode(some)))


def test_the_plot_is_written(tmp_path: Path):
    main(tmp_path / "hierarchy.png", steps=1)
    assert (tmp_path / "hierarchy.png").read_bytes().startswith(b"\x89PNG")
