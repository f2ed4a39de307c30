"""The split of icons: a pure function of code points and style."""

from __future__ import annotations

from collections import Counter

import pytest

from pipeline.data.builtin.icon_split import Cell, base_of, cell_of, tone_of, without_tones

TONES = ("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff")


@pytest.mark.parametrize(
    ("key", "base"),
    [
        ("1f600", "1f600"),
        ("1f44b-1f3fd", "1f44b"),
        ("1f469-1f3fd-200d-1f373", "1f9d1-200d-1f373"),
        ("1f468-200d-1f373", "1f9d1-200d-1f373"),
        ("1f3c3-1f3fb-200d-2640", "1f3c3"),
        ("1f3fd", "1f3fd"),
        ("house", "house"),
    ],
)
def test_siblings_share_a_base(key, base):
    assert base_of(key) == base


def test_a_tone_is_that_of_one_person():
    assert tone_of("1f44b-1f3fd") == 2 and without_tones("1f44b-1f3fd") == "1f44b"
    assert tone_of("1f44b") is None
    assert tone_of("1f9d1-1f3fb-200d-1f91d-200d-1f9d1-1f3ff") is None
    assert tone_of("1f3fd") is None and without_tones("1f3fd") == "1f3fd"


def test_the_split_stays_as_it_is():
    """Weights are compared over releases: a changed hash would train on what is held out."""
    assert cell_of("1f34b", "noto") == Cell("cell", False)
    assert cell_of("1f34b", "twemoji") == Cell("train")
    assert cell_of("1f428", "noto").kind == cell_of("1f428", "anything").kind == "name"


def test_fractions_are_as_described():
    keys = [f"{0x20000 + i:x}" for i in range(5000)]
    kinds = Counter(cell_of(key, "style").kind for key in keys)
    assert 0.04 < kinds["cell"] / len(keys) < 0.06
    assert 0.015 < kinds["name"] / len(keys) < 0.025
    tuning = [cell_of(key, "style").tuning for key in keys if cell_of(key, "style").kind != "train"]
    assert 0.2 < sum(tuning) / len(tuning) < 0.3


def test_at_most_one_tone_of_a_family_is_a_tone_cell():
    families = [f"{0x30000 + i:x}" for i in range(1000)]
    tones = [sum(cell_of(f"{one}-{t}", "s").kind == "tone" for t in TONES) for one in families]
    assert set(tones) == {0, 1}
    assert 0.2 < sum(tones) / len(tones) < 0.3


def test_a_held_out_name_is_so_in_all_styles_tones_and_sexes():
    keys = [f"{0x30000 + i:x}" for i in range(1000)]
    names = [key for key in keys if cell_of(key, "a").kind == "name"]
    assert names
    for name in names:
        for other in (name, *(f"{name}-{tone}" for tone in TONES), f"{name}-200d-2640"):
            assert cell_of(other, "b") == cell_of(name, "a")  # tuning in all of them, or in none
    assert {cell_of(name, "a").tuning for name in names} == {True, False}
