"""`image_table`: images of labelled rows and columns."""

from __future__ import annotations

import numpy as np

from pipeline.runtime.image_table import image_table


def test_each_image_is_in_its_row_and_column():
    colours = np.array(
        [[[250, 0, 0], [0, 250, 0], [0, 0, 250]], [[9, 9, 9], [0, 99, 99], [1, 2, 3]]]
    )
    rows = {
        name: np.broadcast_to(colours[i][:, None, None], (3, 32, 32, 3)).astype(np.uint8)
        for i, name in enumerate(("first", "a longer label"))
    }
    sheet = np.asarray(image_table(rows, ["one", "two", "a long caption that is wrapped"]))
    firsts = []
    for colour in colours.reshape(-1, 3):
        places = np.argwhere((sheet == colour).all(-1))
        top, left = places.min(0)
        assert (sheet[top : top + 96, left : left + 96] == colour).all()
        assert len(places) == 96 * 96
        firsts.append((int(top), int(left)))
    tops = [top for top, _ in firsts]
    lefts = [left for _, left in firsts]
    assert tops[0] == tops[1] == tops[2] < tops[3] == tops[4] == tops[5]
    assert lefts[:3] == lefts[3:] == sorted(lefts[:3]) and len(set(lefts)) == 3


def test_labels_are_drawn_beside_the_images():
    images = np.full((1, 96, 96, 3), 255, np.uint8)
    with_label = np.asarray(image_table({"a row": images}, ["a column"]))
    assert (with_label < 128).all(-1).sum() > 50
    assert (np.asarray(image_table({"     ": images}, ["        "])) == 255).all()
