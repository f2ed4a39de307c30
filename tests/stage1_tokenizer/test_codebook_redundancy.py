"""Codes that draw the same are one code, and codes survive an image that is stored and encoded
again only if each draws something of its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor

from stage1_tokenizer import (
    Level,
    TokenizerModule,
    agreement_by_level,
    count_codes,
    distinct_codes,
    reencoding_metrics,
    to_model_range,
    to_uint8,
    unchanged_codes,
)
from stage1_tokenizer import codebook_redundancy as redundancy
from stage1_tokenizer.codebook_redundancy import codes_by_use
from tests.helpers.tokenizers import EVERY_KIND, KINDS, tiny_tokenizer


class Greys:
    """A tokenizer whose code i paints its cell in the grey `greys[i]`; a cell is encoded as the
    first code of the nearest grey."""

    device = torch.device("cpu")
    grid = (4, 4)

    def __init__(self, greys: list[int], factor: int = 4) -> None:
        self.factor = factor
        self.greys = torch.tensor(greys)
        self.own_config = SimpleNamespace(downsample_factor=factor, stride=factor)
        self.quantizer = SimpleNamespace(layout=self.layout)
        self.decoded: list[Tensor] = []

    def require_codes(self, what: str) -> None:
        """It has codes."""

    def layout(self, grid: tuple[int, int]) -> tuple[Level]:
        return (Level(grid=grid, num_codes=len(self.greys)),)

    def decode(self, codes: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        self.decoded.append(codes)
        cells = (
            self.greys[codes].repeat_interleave(self.factor, 1).repeat_interleave(self.factor, 2)
        )
        return to_model_range(cells[..., None].expand(-1, -1, -1, 3).to(torch.uint8))

    def encode(self, pixels: Tensor) -> Tensor:
        cells = (
            to_uint8(pixels)
            .float()
            .unfold(1, self.factor, self.factor)
            .unfold(2, self.factor, self.factor)
        )
        return (cells.mean((3, 4, 5))[..., None] - self.greys).abs().argmin(-1)


def greys(values: list[int], factor: int = 4) -> TokenizerModule:
    return cast(TokenizerModule, Greys(values, factor))


def test_codes_of_equal_patches_count_once():
    counts = torch.tensor([9, 1, 1, 4])
    assert distinct_codes(greys([0, 50, 100, 150]), counts) == {"": 4}
    assert distinct_codes(greys([0, 50, 50, 150]), counts) == {"": 3}
    assert distinct_codes(greys([7, 7, 7, 7]), counts) == {"": 1}


def test_unused_codes_do_not_count():
    assert distinct_codes(greys([0, 50, 100, 150]), torch.tensor([9, 0, 1, 0])) == {"": 2}
    assert distinct_codes(greys([0, 50]), torch.tensor([0, 0])) == {"": 0}


def test_a_code_counts_from_an_rms_difference_of_two_steps():
    assert distinct_codes(greys([100, 101]), torch.tensor([1, 1])) == {"": 1}
    assert distinct_codes(greys([100, 102]), torch.tensor([1, 1])) == {"": 2}


def test_the_count_is_greedy_by_use():
    """In a chain of greys one step apart, those that differ from the most used one count first."""
    chain = [10, 11, 12, 13, 14]
    assert distinct_codes(greys(chain), torch.tensor([5, 4, 3, 2, 1])) == {"": 3}  # 10, 12, 14
    assert distinct_codes(greys(chain), torch.tensor([4, 5, 3, 2, 1])) == {"": 2}  # 11, 13


def test_codes_are_decoded_in_the_middle_of_codes_drawn_by_use():
    tokenizer = Greys([0, 50, 100, 150])
    distinct_codes(cast(TokenizerModule, tokenizer), torch.tensor([3, 900, 4, 0]))
    first, second = tokenizer.decoded
    assert first[:3, 2, 2].tolist() == second[:3, 2, 2].tolist() == [1, 2, 0]
    first[:, 2, 2] = second[:, 2, 2] = 1
    assert (first[:3] == first[0]).all() and (first != 3).all()  # unused codes are nowhere
    even = Greys([0, 50, 100, 150])
    distinct_codes(cast(TokenizerModule, even), torch.ones(4, dtype=torch.long))
    first, second = even.decoded
    assert not torch.equal(first, second)
    assert all(len(grid.unique()) > 2 for grid in (first[0], second[0]))


def test_codes_that_differ_in_one_context_alone_are_two():
    """Code 2 draws as code 1 does, but beside code 0 above it."""

    class InContext(Greys):
        def decode(self, codes: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
            shown = codes.clone()
            shown[(codes == 2) & (codes.roll(1, 1) != 0)] = 1
            return super().decode(shown, grid)

    counts = torch.tensor([1, 1, 1])
    above = [
        int(codes_by_use(counts, (Level(grid=(4, 4), num_codes=3),), seed)[6]) for seed in (0, 1)
    ]
    tokenizer = cast(TokenizerModule, InContext([0, 50, 100]))
    assert distinct_codes(tokenizer, counts) == {"": 3 if 0 in above else 2}
    assert 0 in above and set(above) != {0}


def test_large_codebooks_and_grids_are_decoded_in_part(monkeypatch):
    monkeypatch.setattr(redundancy, "MAX_DECODED_CODES", 3)
    tokenizer = Greys(list(range(0, 250, 10)))
    tokenizer.grid = (64, 32)
    counts = torch.ones(25, dtype=torch.long)
    counts[[20, 7, 9]] = torch.tensor([30, 20, 10])
    assert distinct_codes(cast(TokenizerModule, tokenizer), counts) == {"": 3}
    decoded = tokenizer.decoded[0]
    assert decoded.shape[1:] == (8, 8) and decoded[:3, 4, 4].tolist() == [20, 7, 9]


@pytest.mark.parametrize("kind", ["vq", "residual", "hierarchical"])
def test_an_exact_duplicate_in_the_codebook_is_one_distinct_code_less(kind):
    tokenizer = tiny_tokenizer(**KINDS[kind])
    size = sum(level.num_codes for level in tokenizer.layout)
    before = distinct_codes(tokenizer, torch.ones(size, dtype=torch.long))
    assert before[""] == size
    book = tokenizer.quantizer if kind == "vq" else tokenizer.quantizer.books[1]  # type: ignore[index]
    with torch.no_grad():
        book.codebook[3] = book.codebook[5]  # type: ignore[index, operator]
    after = distinct_codes(tokenizer, torch.ones(size, dtype=torch.long))
    assert after[""] == size - 1
    if kind != "vq":
        assert after["_level_1"] == before["_level_1"]
        assert after["_level_2"] == before["_level_2"] - 1


@EVERY_KIND
def test_every_quantizer_is_measured_per_level(images, kind):
    tokenizer = tiny_tokenizer(**KINDS[kind])
    layout = tokenizer.layout
    codes = tokenizer.encode(to_model_range(images))
    counts = count_codes(codes, layout)
    distinct = distinct_codes(tokenizer, counts)
    drawn = to_uint8(tokenizer.decode(codes))
    metrics = reencoding_metrics(tokenizer, [(codes[:4], drawn[:4]), (codes[4:], drawn[4:])])
    levels = [f"_level_{i}" for i in range(1, len(layout) + 1)] if len(layout) > 1 else []
    assert list(distinct) == ["", *levels]
    names = ("reencode_agreement", "reencode_agreement_jpeg95")
    assert set(metrics) == {f"{name}{level}" for name in names for level in ["", *levels]}
    assert all(0 <= value <= 1 for value in metrics.values())
    if levels:
        assert distinct[""] == sum(distinct[level] for level in levels)
    for level, used in zip(
        levels or [""], counts.split([one.num_codes for one in layout]), strict=True
    ):
        assert 1 <= distinct[level] <= int((used > 0).sum())


def both_agreements(tokenizer: TokenizerModule, codes: Tensor) -> list[float]:
    return list(
        reencoding_metrics(tokenizer, [(codes, to_uint8(tokenizer.decode(codes)))]).values()
    )


def test_a_tokenizer_that_inverts_its_drawing_keeps_every_code():
    codes = torch.arange(16).reshape(1, 4, 4).repeat(3, 1, 1)
    assert both_agreements(greys(list(range(0, 256, 16))), codes) == [1, 1]


def test_doubles_lower_the_agreement_by_their_fraction():
    codes = torch.arange(16).reshape(1, 4, 4)
    values = [0, 0, 0, 0, *range(16, 208, 16)]  # codes 1 to 3 come back as code 0
    assert both_agreements(greys(values), codes) == [13 / 16, 13 / 16]


def test_jpeg_loses_codes_that_eight_bits_keep():
    codes = torch.randint(0, 16, (4, 8, 8), generator=torch.Generator().manual_seed(0))
    eight_bits, jpeg = both_agreements(greys(list(range(100, 116)), factor=1), codes)
    assert eight_bits == 1 and jpeg < 0.9


def test_agreement_of_a_level_is_over_its_own_codes():
    layout = (Level(grid=(1, 1), num_codes=4), Level(grid=(1, 3), num_codes=4))
    unchanged = torch.tensor([[True, False, False, True], [True, True, False, False]])
    assert agreement_by_level(unchanged, layout) == {
        "": 0.5,
        "_level_1": 1.0,
        "_level_2": pytest.approx(1 / 3),
    }
    assert agreement_by_level(unchanged, [Level(grid=(2, 2), num_codes=4)]) == {"": 0.5}


def test_encoding_again_is_that_of_saved_images(images):
    tokenizer = tiny_tokenizer()
    codes = tokenizer.encode(to_model_range(images))
    kept = tokenizer.to_codes(tokenizer.to_images(codes)) == codes
    assert torch.equal(
        unchanged_codes(tokenizer, codes, to_uint8(tokenizer.decode(codes))), kept.flatten(1)
    )
    assert 0 < kept.float().mean() < 1
