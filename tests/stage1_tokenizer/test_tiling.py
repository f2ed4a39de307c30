"""Tiles of large images fit together, and equal the untiled image."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from stage1_tokenizer.tiling import by_tiles
from tests.helpers.tokenizers import ALL_KINDS, tiny_tokenizer


def pixels(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("shape", [(1, 3, 48, 80), (2, 1, 40, 40), (1, 1, 8, 72)])
@pytest.mark.parametrize("tile", [8, 17, 64, 500])
def test_tiling_is_exact_if_margin_covers_the_receptive_field(shape, tile):
    x, kernel = pixels(*shape), torch.full((shape[1], 1, 5, 5), 0.04)
    blur = lambda v: F.conv2d(v, kernel, padding=2, groups=v.shape[1])  # noqa: E731
    torch.testing.assert_close(by_tiles(x, blur, tile=tile, margin=2, stride=8), blur(x))
    if tile < min(shape[2:]):
        assert not torch.allclose(by_tiles(x, blur, tile=tile, margin=0, stride=8), blur(x))


def test_windows_are_multiples_of_the_stride():
    seen = []
    by_tiles(
        pixels(1, 1, 48, 64), lambda v: seen.append(v.shape[2:]) or v, tile=20, margin=5, stride=8
    )
    assert (
        seen
        and all(side % 8 == 0 for shape in seen for side in shape)
        and max(max(shape) for shape in seen) <= 16 + 2 * 8
    )


@pytest.mark.parametrize("kind", ["vq", "gumbel", "residual", "hierarchical", "fsq", "gaussian"])
def test_tiled_image_equals_the_untiled_one(kind):
    """The tiny networks reach less than 64 pixels."""
    tokenizer, x = tiny_tokenizer(**ALL_KINDS[kind]), pixels(1, 3, 96, 200)
    whole = tokenizer.reconstruct(x)
    torch.testing.assert_close(tokenizer.reconstruct(x, tile=48), whole, atol=1e-5, rtol=0)
    assert torch.equal(tokenizer.reconstruct(x, tile=200), whole)
    assert not torch.allclose(tokenizer.reconstruct(x, tile=48, margin=0), whole, atol=1e-3)


def test_photo_of_512_by_768_round_trips():
    tokenizer = tiny_tokenizer(downsample_factor=8, image_size=64)
    assert tokenizer.reconstruct(pixels(1, 3, 768, 512), tile=256).shape == (1, 3, 768, 512)
    with pytest.raises(ValueError, match=r"pixels are 500x768 .* nearest that fits is 496x768"):
        tokenizer.reconstruct(pixels(1, 3, 768, 500), tile=256)
