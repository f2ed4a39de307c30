"""Transparent images are shown on a checkerboard, and nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.runtime.checkerboard import on_checkerboard
from pipeline.runtime.contact_sheet import contact_sheets
from pipeline.runtime.heat_map import beside_heat_maps
from pipeline.runtime.image_grid import make_grid
from pipeline.runtime.image_table import image_table

RED = (200, 10, 20)


def half_clear(side: int = 16) -> np.ndarray:
    """Red on the left, clear on the right."""
    image = np.zeros((side, side, 4), np.uint8)
    image[:, : side // 2] = (*RED, 255)
    return image


def test_only_transparent_pixels_show_the_checkerboard():
    shown = on_checkerboard(half_clear())
    assert shown.shape == (16, 16, 3)
    assert (shown[:, :8] == RED).all()
    right = shown[:, 8:]
    assert (right == right[..., :1]).all()
    assert sorted(set(right.flatten().tolist())) == [216, 255]
    assert right[0, 0, 0] != right[0, 2, 0] and right[0, 0, 0] == right[2, 2, 0]


def test_half_transparent_pixels_let_the_checkerboard_through():
    image = np.zeros((16, 16, 4), np.uint8)
    image[...] = (0, 0, 0, 128)
    assert sorted(set(on_checkerboard(image).flatten().tolist())) == [108, 127]


@pytest.mark.parametrize("channels", [1, 3])
def test_other_images_stay_as_they_are(channels):
    image = np.random.default_rng(0).integers(0, 256, (8, 8, channels), dtype=np.uint8)
    assert on_checkerboard(image) is image


def test_every_preview_lays_transparency_on_the_checkerboard():
    image = half_clear(96)
    shown = on_checkerboard(image)
    assert np.array_equal(make_grid([image], columns=1, gap=2)[2:-2, 2:-2], shown)
    sheet = np.asarray(contact_sheets([image], ["a red half"])[0])
    table = np.asarray(image_table({"row": image[None]}, ["column"]))
    panels = np.asarray(beside_heat_maps(image, "image", []))
    for preview in (sheet, table, panels):
        assert preview.shape[2] == 3
        for value in (216, 255):
            squares = (preview == value).all(-1).sum()
            assert squares >= (shown == value).all(-1).sum()
        assert (preview == RED).all(-1).sum() >= 96 * 48


def test_opaque_images_of_four_channels_are_shown_as_those_of_three():
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    opaque = np.concatenate([image, np.full((8, 8, 1), 255, np.uint8)], axis=-1)
    assert np.array_equal(make_grid([opaque], columns=1), make_grid([image], columns=1))
