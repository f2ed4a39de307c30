"""Images of codes: the filled grid is what it says, and the optimized one is encoded as its code
where the filled one is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stage1_tokenizer import TokenizerModule, VectorOptions, code_views, to_model_range, to_uint8
from stage1_tokenizer.code_views import (
    GUMBEL_QUANTIZERS,
    check_gumbel,
    gumbel_views,
    naive_views,
    optimize_grids,
)
from tests.helpers.tokenizers import EVERY_KIND, KINDS, tiny_tokenizer

COLOURS = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1]])
"""Red, green and blue in the model's range: codes 0, 1 and 2."""
SAME = torch.eye(3)
TURNED = torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]])
"""Draws red as green, green as blue and blue as red."""
BOTH = pytest.mark.parametrize("quantizer", ["vq", "gumbel"])
RELAXED = [kind for kind in KINDS if KINDS[kind].get("quantizer", "vq") in GUMBEL_QUANTIZERS]


def colours(quantizer: str, drawn: Tensor) -> TokenizerModule:
    """A tokenizer of three colours: each cell of 4x4 pixels is encoded as its nearest colour. The
    decoder draws code i in the colour `drawn` @ COLOURS[i]."""
    options: dict[str, Any] = {"vq": VectorOptions(normalize=False)} if quantizer == "vq" else {}
    tokenizer = tiny_tokenizer(quantizer=quantizer, num_codes=3, code_dim=3, **options)
    weights = torch.eye(3) if quantizer == "vq" else 4 * COLOURS
    encode = nn.Conv2d(3, 3, 1, bias=False)
    decode = nn.Conv2d(3, 3, 1, bias=False)
    with torch.no_grad():
        tokenizer.quantizer.codebook.copy_(COLOURS)  # type: ignore[operator]
        encode.weight.copy_(weights[:, :, None, None])
        decode.weight.copy_(drawn[:, :, None, None])
    tokenizer.encoder = nn.Sequential(nn.AvgPool2d(4), encode)
    tokenizer.decoder = nn.Sequential(decode, nn.Upsample(scale_factor=4))
    return tokenizer.eval()


def common(tokenizer: TokenizerModule) -> Tensor:
    """Codes of all levels, every one 1."""
    return torch.ones(sum(level.length for level in tokenizer.layout), dtype=torch.long)


@BOTH
def test_gumbel_images_are_encoded_as_codes_that_filled_grids_miss(quantizer):
    tokenizer = colours(quantizer, TURNED)
    codes = torch.tensor([2, 0, 1])
    naive = naive_views(tokenizer, codes, common(tokenizer), (4, 4), 0)
    gumbel = gumbel_views(tokenizer, codes, (4, 4))
    assert naive.fractions.tolist() == [0, 0, 0]
    assert gumbel.fractions.tolist() == [1, 1, 1]
    painted = (gumbel.images > 127).flatten(1, 2)
    assert painted.all(1).tolist() == (COLOURS[codes] > 0).tolist()
    assert torch.equal(optimize_grids(tokenizer, codes, (4, 4)).grids[1], torch.full((4, 4), 2))


@BOTH
def test_gumbel_images_keep_what_filled_grids_reach(quantizer):
    tokenizer = colours(quantizer, SAME)
    codes = torch.arange(3)
    naive = naive_views(tokenizer, codes, common(tokenizer), (4, 4), 0)
    gumbel = gumbel_views(tokenizer, codes, (4, 4))
    assert naive.fractions.tolist() == gumbel.fractions.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "changes",
    [KINDS[kind] for kind in RELAXED] + [{"likelihood": "logit_laplace"}],
    ids=[*RELAXED, "logit-Laplace"],
)
def test_the_objective_rises_over_the_steps(changes):
    tokenizer = tiny_tokenizer(**changes)
    objective = optimize_grids(tokenizer, torch.arange(12), (4, 4), steps=30).objective
    assert objective.shape == (30, 12)
    first = objective[:5].mean(0)
    last = objective[-5:].mean(0)
    assert (last > first).float().mean() > 0.8 and last.mean() > first.mean() + 0.2


def test_the_images_follow_from_the_seed():
    tokenizer = tiny_tokenizer()
    codes = torch.arange(12)
    first, again = (gumbel_views(tokenizer, codes, (4, 4), steps=5, seed=3) for _ in range(2))
    other = gumbel_views(tokenizer, codes, (4, 4), steps=5, seed=4)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.fractions, again.fractions)
    assert not torch.equal(first.images, other.images)


def test_an_image_does_not_depend_on_the_other_codes():
    tokenizer = tiny_tokenizer()
    together = optimize_grids(tokenizer, torch.arange(12), (4, 4), steps=3).objective
    alone = optimize_grids(tokenizer, torch.tensor([7]), (4, 4), steps=3).objective
    assert torch.allclose(together[:, 7:8], alone, atol=1e-4)


@pytest.mark.parametrize(
    "limit", [("_MAX_LOGITS", 2 * 16 * 3), ("_MAX_PIXELS", 2 * 256), ("_BATCH", 2)]
)
def test_codes_are_optimized_a_few_at_a_time(monkeypatch, limit):
    monkeypatch.setattr(code_views, *limit)
    tokenizer = colours("vq", TURNED)
    sizes = []
    tokenizer.decoder.register_forward_hook(lambda m, given, out: sizes.append(len(given[0])))
    views = gumbel_views(tokenizer, torch.arange(3), (4, 4))
    assert set(sizes) == {2, 1} and views.fractions.tolist() == [1, 1, 1]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", RELAXED)
def test_weights_gradients_and_modes_stay_the_same(kind, training):
    tokenizer = tiny_tokenizer(**KINDS[kind]).train(training)
    tokenizer.quantizer.eval()
    before = tokenizer.fingerprint
    modes = [module.training for module in tokenizer.modules()]
    naive_views(tokenizer, torch.arange(12), common(tokenizer), (4, 4), 0)
    gumbel_views(tokenizer, torch.arange(12), (4, 4), steps=2)
    assert tokenizer.fingerprint == before
    assert [module.training for module in tokenizer.modules()] == modes
    assert all(weight.grad is None and weight.requires_grad for weight in tokenizer.parameters())


@EVERY_KIND
def test_naive_images_hold_one_code_in_all_positions_of_their_level(kind):
    tokenizer = tiny_tokenizer(**KINDS[kind])
    levels = tokenizer.layout
    for number, level in enumerate(levels):
        codes = torch.tensor([3, 0])
        views = naive_views(tokenizer, codes, common(tokenizer), tokenizer.grid, number)
        parts = [torch.ones(2, one.length, dtype=torch.long) for one in levels]
        parts[number] = codes[:, None].expand(-1, level.length)
        filled = torch.cat(parts, 1) if len(levels) > 1 else parts[0].reshape(2, 4, 4)
        drawn = to_uint8(tokenizer.decode(filled))
        again = tokenizer.encode(to_model_range(drawn)).flatten(1)
        own = again.split([one.length for one in levels], 1)[number]
        assert torch.equal(views.images, drawn)
        assert views.fractions.tolist() == (own == codes[:, None]).double().mean(1).tolist()


@pytest.mark.parametrize("kind", RELAXED)
def test_fractions_are_of_the_image_of_8_bits(kind):
    tokenizer = tiny_tokenizer(**KINDS[kind])
    views = gumbel_views(tokenizer, torch.arange(12), (2, 4), steps=3)
    again = tokenizer.encode(to_model_range(views.images)).flatten(1)
    assert views.images.dtype == torch.uint8 and views.images.shape == (12, 8, 16, 3)
    assert torch.equal(views.fractions, (again == torch.arange(12)[:, None]).double().mean(1))


@EVERY_KIND
def test_quantizers_without_gumbel_images_are_refused(kind):
    tokenizer = tiny_tokenizer(**KINDS[kind])
    if kind in RELAXED:
        return check_gumbel(tokenizer)
    name = KINDS[kind]["quantizer"]
    with pytest.raises(ValueError, match=f"is {name}, .* one of vq, gumbel, score_function"):
        gumbel_views(tokenizer, torch.arange(2), (4, 4))


@pytest.mark.parametrize("kind", RELAXED)
def test_the_likeliest_code_of_a_soft_assignment_is_the_code(images, kind):
    tokenizer = tiny_tokenizer(**KINDS[kind])
    pixels = to_model_range(images)
    features = tokenizer.encoder(pixels).detach().requires_grad_()
    log_p = tokenizer.quantizer.log_assignment(features)  # type: ignore[operator]
    assert torch.equal(log_p.argmax(3), tokenizer.encode(pixels))
    assert torch.allclose(log_p.exp().sum(3), torch.ones(log_p.shape[:3]))
    log_p[..., 0].sum().backward()
    assert features.grad is not None and features.grad.abs().sum() > 0


def test_the_soft_assignment_does_not_depend_on_the_scale_of_the_vectors():
    features = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    quantizer = tiny_tokenizer(vq=VectorOptions(normalize=False)).quantizer
    small = quantizer.log_assignment(features)  # type: ignore[operator]
    quantizer.codebook *= 100  # type: ignore[operator, assignment]
    assert torch.allclose(quantizer.log_assignment(100 * features), small, atol=1e-3)  # type: ignore[operator]
