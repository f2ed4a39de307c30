"""Heat maps: colours rise with the numbers, and panels are where they belong."""

from __future__ import annotations

import numpy as np

from pipeline.runtime.heat_map import beside_heat_maps, colours


def test_colours_become_brighter_with_the_number():
    drawn = colours(np.linspace(0, 1, 50)[None])
    assert drawn.shape == (1, 50, 3) and drawn.dtype == np.uint8
    brightness = drawn.astype(int).sum(-1)[0]
    assert (np.diff(brightness) >= 0).all() and brightness[0] < 10 < 500 < brightness[-1]


def test_the_image_and_its_maps_are_side_by_side_at_one_size():
    image = np.full((64, 64, 3), (10, 200, 30), np.uint8)
    codes = np.zeros((8, 8))
    codes[0, 7] = 3.0
    codes[7, 0] = 1.5
    sheet = np.asarray(beside_heat_maps(image, "image", [("codes", codes), ("none", 0 * codes)]))
    side = 256
    left = [12 + number * (side + 12) for number in range(3)]
    top = 34
    panels = [sheet[top : top + side, x : x + side] for x in left]
    assert sheet.shape[1] == left[2] + side + 12
    assert (panels[0] == (10, 200, 30)).all()
    bright = (panels[1] == colours(np.ones((1, 1)))).all(-1)
    assert bright[:32, -32:].all() and bright.sum() == 32 * 32
    assert (panels[1][-32:, :32] == colours(np.full((1, 1), 0.5))).all()
    assert (panels[2] == colours(np.zeros((1, 1)))).all()
    assert (sheet[:top, left[1] :].min(axis=(0, 2)) < 128).any()  # a title
