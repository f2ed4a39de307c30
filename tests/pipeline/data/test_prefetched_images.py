"""Images loaded ahead; which rows per step sees is tested with training,
tests/pipeline/training/test_trainer.py."""

from __future__ import annotations

from threading import Event

import numpy as np
import pytest

from pipeline.data.sampler import prefetch


def test_every_part_comes_with_its_pictures_and_the_next_is_loaded_meanwhile():
    loaded = {row: Event() for row in range(3)}

    def load(part):
        loaded[part[0]].set()
        return np.array(part)

    seen = []
    for images in prefetch(map(load, [[0, 5], [1], [2, 7, 9]])):
        seen.append(images.tolist())
        if images[0] < 2:
            assert loaded[images[0] + 1].wait(timeout=30)
    assert seen == [[0, 5], [1], [2, 7, 9]]


def test_no_more_than_the_next_is_held():
    asked = []

    def load(part):
        asked.append(part[0])
        return np.array(part)

    given = prefetch(map(load, ([row] for row in range(100))))
    next(given)
    assert len(asked) <= 2
    given.close()


def test_what_goes_wrong_in_loading_is_raised_and_nothing_to_load_gives_nothing():
    def load(part):
        raise ValueError("cannot be read")

    with pytest.raises(ValueError, match="cannot be read"):
        list(prefetch(map(load, [[0]])))
    assert list(prefetch(map(load, []))) == []
