"""Prefetching of images. The rows of each step are tested in
tests/pipeline/training/test_trainer.py."""

from __future__ import annotations

from threading import Event

import numpy as np
import pytest

from pipeline.data.sampler import prefetch


def test_next_chunk_is_loaded_while_one_is_used():
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


def test_only_one_chunk_is_prefetched():
    asked = []

    def load(part):
        asked.append(part[0])
        return np.array(part)

    given = prefetch(map(load, ([row] for row in range(100))))
    next(given)
    assert len(asked) <= 2
    given.close()


def test_loading_errors_are_raised_and_empty_input_yields_nothing():
    def load(part):
        raise ValueError("cannot be read")

    with pytest.raises(ValueError, match="cannot be read"):
        list(prefetch(map(load, [[0]])))
    assert list(prefetch(map(load, []))) == []
