"""The hierarchy of VQ-VAE-2: order of the stream, conditioning, round trips at any size."""

from __future__ import annotations

import pytest
import torch

from stage1_tokenizer import HierarchicalOptions, Level, VectorOptions
from stage1_tokenizer.quantizers import HierarchicalQuantizer

LEVELS = pytest.mark.parametrize("levels", [2, 3])


def quantizer(levels: int = 2, coarse_codes: tuple[int, ...] = ()) -> HierarchicalQuantizer:
    torch.manual_seed(0)
    return HierarchicalQuantizer(
        8,
        4,
        HierarchicalOptions(levels=levels, width=6, coarse_codes=coarse_codes),
        VectorOptions(),
    ).eval()


def features(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(10))


@LEVELS
@pytest.mark.parametrize("grid", [(8, 8), (4, 12)])
def test_the_coarsest_level_comes_first_and_codes_embed_to_what_the_decoder_saw(levels, grid):
    hierarchy = quantizer(levels)
    layout = hierarchy.layout(grid)
    assert layout[-1] == Level(grid=grid, num_codes=8) and len(layout) == levels
    assert layout[0].grid == (grid[0] >> (levels - 1), grid[1] >> (levels - 1))
    result = hierarchy(features(2, 6, *grid))
    assert result.codes.shape == (
        2,
        sum(level.length for level in layout),
    ) and result.latents.shape == (2, 4, *grid)
    torch.testing.assert_close(hierarchy.embed(result.codes, grid), result.latents)
    assert hierarchy.vectors().shape == (8 * levels, 4)


def test_levels_may_have_codebooks_of_different_sizes():
    hierarchy = quantizer(3, (2, 5))
    assert [level.num_codes for level in hierarchy.layout((8, 8))] == [2, 5, 8]
    assert hierarchy.vectors().shape == (15, 4) and [len(use) for use in hierarchy.usage()] == [
        2,
        5,
        8,
    ]
    result = hierarchy(features(16, 6, 8, 8))
    parts = result.codes.split([4, 16, 64], dim=1)
    assert (
        all(int(part.max()) < size for part, size in zip(parts, [2, 5, 8], strict=True))
        and int(parts[2].max()) >= 5
    )
    torch.testing.assert_close(hierarchy.embed(result.codes, (8, 8)), result.latents)


def test_fine_levels_are_conditioned_on_coarse_ones_only():
    """Features that change within one 2x2 cell change that cell's top code only; a changed top code
    changes what the bottom quantizes."""
    hierarchy, x = quantizer(), features(1, 6, 4, 4)
    other = x.clone()
    # One place at the bottom, in the first cell of the top
    other[:, :, 0, 0] += 20 * features(1, 6)
    one, two = hierarchy(x).codes, hierarchy(other).codes
    assert torch.equal(one[:, 1:4], two[:, 1:4]) and not torch.equal(one[:, :4], two[:, :4])
    seen = []
    hierarchy.books[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    hierarchy(x)
    hierarchy.books[0].codebook.neg_()
    hierarchy(x)
    assert not torch.allclose(seen[0], seen[1])


@LEVELS
def test_gradients_reach_every_layer_and_all_features(levels):
    hierarchy = quantizer(levels).train()
    x = features(16, 6, 8, 8).requires_grad_()
    result = hierarchy(x)
    (result.latents.square().sum() + result.loss).backward()
    assert all(p.grad is not None and p.grad.any() for p in hierarchy.parameters())
    assert x.grad.any(dim=1).all()


def test_losses_are_summed_and_metrics_named_per_level():
    hierarchy = quantizer().train()
    result = hierarchy(features(8, 6, 4, 4))
    torch.testing.assert_close(
        result.loss.detach(),
        0.25 * (result.metrics["commitment_level_1"] + result.metrics["commitment_level_2"]),
    )


def test_a_grid_that_cannot_be_halved_is_refused():
    with pytest.raises(
        ValueError, match="a grid of 4x6 codes cannot be halved 2 times; make both a multiple of 4"
    ):
        quantizer(3)(features(1, 6, 4, 6))
