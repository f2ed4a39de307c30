"""Sheets of captioned images: near square, several where there are many."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.runtime.contact_sheet import contact_sheets, sheet_names


def images(count: int, height: int = 64, width: int = 64) -> list[np.ndarray]:
    return [np.full((height, width, 3), (i % 256, 40, 40), np.uint8) for i in range(count)]


@pytest.mark.parametrize(("count", "together"), [(4, 1), (9, 1), (100, 1), (40, 4), (64, 8)])
def test_sheets_are_near_square(count, together):
    (sheet,) = contact_sheets(images(count), ["a red circle"] * count, together=together)
    assert 0.5 < sheet.width / sheet.height < 2


def test_many_images_are_spread_over_sheets():
    sheets = contact_sheets(images(230), ["a"] * 230)
    assert len(sheets) == 3 and sheet_names(230) == ["grid-1.png", "grid-2.png", "grid-3.png"]
    assert sheets[0].size == sheets[1].size
    assert sheet_names(100) == ["grid.png"] and len(contact_sheets(images(100), ["a"] * 100)) == 1


def test_images_of_a_prompt_are_in_one_row():
    (sheet,) = contact_sheets(images(12), [""] * 12, together=3)
    pixels = np.asarray(sheet)
    firsts = [np.argwhere(pixels[:, :, 0] == i)[0] for i in range(12)]
    assert all(len({firsts[3 * k + i][0] for i in range(3)}) == 1 for k in range(4))


def test_each_image_is_on_the_sheet_above_its_caption():
    (sheet,) = contact_sheets(images(2), ["", "a caption of some words that is wrapped"])
    pixels = np.asarray(sheet)
    shown = np.argwhere((pixels == (1, 40, 40)).all(2))
    assert len(shown) == 128 * 128  # enlarged
    below = pixels[shown[:, 0].max() + 1 :, shown[:, 1].min() : shown[:, 1].max()]
    beside = pixels[shown[:, 0].max() + 1 :, : shown[:, 1].min() - 8]
    assert (below < 100).any() and not (beside < 100).any()


@pytest.mark.parametrize(
    "caption",
    ["", " ", "\n\x00\x1b[31m", "\u8d64\u3044\u5186", "x" * 5000, "\U0001f31e \u0627", "\udcff"],
)
@pytest.mark.parametrize("size", [(8, 600), (600, 8), (16, 16)])
def test_odd_captions_and_sizes_are_drawn(caption, size):
    (sheet,) = contact_sheets(images(3, *size), [caption] * 3)
    assert max(sheet.size) < 1500
