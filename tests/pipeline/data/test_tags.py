"""Lists of tags vary by the seed, the step and the row alone."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.config.data import DataConfig, TagOptions, data_settings, tag_settings
from pipeline.config.experiment import to_dict
from pipeline.data.tags import varied_tags

TAGS = [f"tag {k}" for k in range(12)]
CAPTION = ", ".join(TAGS)


def tags(seed: int = 0, step: int = 0, row: int = 0, **options: object) -> list[str]:
    return varied_tags([CAPTION], [row], TagOptions(**options), seed, step)[0].split(", ")


def test_without_options_captions_stay_as_they_are():
    assert varied_tags(["b,a ,c"], [0], TagOptions(), 0, 0) == ["b,a ,c"]


def test_shuffled_tags_are_the_same_tags_in_an_order_of_their_own():
    orders = [
        tuple(tags(*place, shuffle=True)) for place in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    assert all(sorted(order) == sorted(TAGS) for order in orders) and len(set(orders)) == 4
    assert tags(4, 5, 6, shuffle=True) == tags(4, 5, 6, shuffle=True)


def test_a_row_varies_alike_in_any_batch():
    options = TagOptions(shuffle=True, dropout=0.5)
    together = varied_tags([CAPTION] * 3, [7, 8, 9], options, 1, 2)
    apart = [varied_tags([CAPTION], [row], options, 1, 2)[0] for row in (7, 8, 9)]
    assert together == apart and len(set(apart)) == 3


def test_dropout_keeps_the_order_and_its_share_of_tags():
    kept = [tags(step=step, dropout=0.25) for step in range(400)]
    assert all(one == [tag for tag in TAGS if tag in one] for one in kept)
    assert np.mean([len(one) for one in kept]) == pytest.approx(9, abs=0.3)


def test_first_tags_stay_and_one_tag_is_left_at_least():
    for step in range(50):
        assert tags(step=step, shuffle=True, dropout=0.5, keep_first=2)[:2] == TAGS[:2]
        assert len(tags(step=step, dropout=0.99)) >= 1 and tags(step=step, dropout=0.99) != [""]
    assert tags(shuffle=True, keep_first=20) == TAGS


def test_a_separator_is_found_with_and_without_spaces():
    options = TagOptions(shuffle=True, separator="; ")
    assert sorted(varied_tags(["a;b ; c;"], [0], options, 0, 0)[0].split("; ")) == ["a", "b", "c"]
    assert varied_tags(["a, b"], [0], options, 0, 0) == ["a, b"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 1.0}, r"data\.tags\.dropout is 1\.0; it must be in \[0, 1\)"),
        ({"keep_first": -1}, r"data\.tags\.keep_first is -1; it must be 0 or more"),
        ({"separator": " "}, r"data\.tags\.separator is ' '; it needs a character"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(source="x", tags=TagOptions(**options))


def test_new_settings_at_their_defaults_are_unknown_to_what_was_made_before():
    """Fingerprints and settings of earlier runs have none of them; tags change no code."""
    plain = data_settings(to_dict(DataConfig(source="x")))
    assert not {"tags", "caption_lines", "delimiter"} & set(plain)
    shuffled = DataConfig(source="x", tags=TagOptions(shuffle=True), caption_lines="first")
    assert data_settings(to_dict(shuffled)) == plain | {"caption_lines": "first"}
    assert tag_settings(DataConfig(source="x")) is None
    assert tag_settings(shuffled) == {
        "separator": ", ", "shuffle": True, "dropout": 0.0, "keep_first": 0
    }  # fmt: skip
