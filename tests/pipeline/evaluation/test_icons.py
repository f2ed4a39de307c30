"""Metrics of icons: what counts as right, among which candidates."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.config.builtin import IconOptions
from pipeline.config.data import DataConfig
from pipeline.data.builtin.icon_captions import styled_captions
from pipeline.data.builtin.icon_split import cell_of
from pipeline.data.builtin.icons import Icon, IconSource
from pipeline.data.readers.transparency import composed
from pipeline.evaluation import icons
from pipeline.evaluation.evaluate import held_out_source
from pipeline.evaluation.icons import SIBLINGS, icon_metrics, judged, some
from tests.helpers.icons import write_styles

TONES = ("1f3fb", "1f3fd", "1f3ff")


def icon(style: str, key: str, value: int) -> Icon:
    image = np.full((4, 4, 4), 255, np.uint8)
    image[..., :3] = value
    return Icon(style, key, key, image)


@pytest.fixture
def family() -> list[Icon]:
    """Two people in two styles, in three tones each."""
    keys = [f"{person}-{tone}" for person in ("1f468", "1f469") for tone in TONES]
    return [icon(s, k, 20 * i + 5 * j) for j, s in enumerate("ab") for i, k in enumerate(keys)]


def drawn(*chosen: Icon) -> np.ndarray:
    return np.stack([composed(one.image, "white") for one in chosen])


def test_what_is_drawn_as_it_is_is_right_everywhere(family):
    metrics = judged(drawn(*family), family, family)
    names = ("retrieval_at_1_of_100", "own_among_siblings", "style", "tone", "all_siblings")
    for name in names:
        assert (metrics[name].correct, metrics[name].count) == (12, 12), name
    chances = {"own_among_siblings": 1 / 6, "style": 1 / 2, "tone": 1 / 3, "all_siblings": 1 / 12}
    assert {name: metrics[f"{name}_chance"] for name in chances} == pytest.approx(chances)


def test_another_style_is_wrong_in_what_compares_styles_alone(family):
    metrics = judged(drawn(family[6]), [family[0]], family)
    right = {name for name in metrics if name in (*SIBLINGS, "retrieval_at_1_of_100")}
    right = {name for name in right if metrics[name].correct}
    assert right == {"retrieval_at_1_of_100", "own_among_siblings", "tone"}


@pytest.mark.parametrize("instead", [1, 3], ids=["tone", "sex"])
def test_another_tone_and_another_sex_are_wrong_among_siblings(family, instead):
    metrics = judged(drawn(family[instead]), [family[0]], family)
    for name in ("retrieval_at_1_of_100", "own_among_siblings", "tone", "all_siblings"):
        assert metrics[name].correct == 0, name


def test_an_icon_without_siblings_has_no_sibling_metrics(family):
    alone = icon("a", "house", 7)
    metrics = judged(drawn(alone), [alone], [*family, alone])
    assert set(metrics) == {"retrieval_at_1_of_100"}


def test_the_hundred_are_of_the_same_style_and_hold_the_own_one():
    everything = [icon(style, f"{0x20000 + i:x}", i) for style in "ab" for i in range(150)]
    among = icons._hundred(everything[3], everything)
    assert len(set(among)) == 100 and among[0] is everything[3]
    assert {one.style for one in among} == {"a"}
    assert among == icons._hundred(everything[3], everything[::-1])


def test_cells_are_chosen_by_name_whatever_else_there_is(family):
    assert some(family, 3) == some(family[::-1], 3)
    assert len(some(family, 100)) == len(family)


@pytest.mark.parametrize(("names", "kind"), [(60, "reported"), (2, "held_out")])
def test_images_that_metrics_are_of_chose_no_setting_where_there_are_any(tmp_path, names, kind):
    sets = write_styles(tmp_path, styles=3, names=names)
    own = IconOptions(folder=str(tmp_path), sets=sets)
    data = DataConfig(source="icons", image_size=16, icons=own)
    experiment = SimpleNamespace(data=data, folder=tmp_path, sees_captions=True)
    source = held_out_source(experiment)  # type: ignore[arg-type]
    expected = IconSource(data, kind)
    assert len(source) and source.names(range(len(source))) == expected.names(range(len(expected)))
    if kind == "reported":
        cells = [cell_of(icon.key, icon.style) for icon in expected.icons]
        assert all(cell.kind != "train" and not cell.tuning for cell in cells)
        first = [(icon.style, cell.kind) for icon, cell in zip(expected.icons, cells, strict=True)]
        half = first[: len(first) // 2]  # metrics are of the first so many
        assert len({style for style, _ in half}) == 3 and len({kind for _, kind in half}) > 1


def test_prompts_are_the_first_wording_of_cells_that_are_reported(tmp_path, monkeypatch):
    sets = write_styles(tmp_path, styles=3, names=60)
    own = IconOptions(folder=str(tmp_path), sets=sets)
    data = DataConfig(source="icons", image_size=16, icons=own)
    asked: list[str] = []

    def sampled(pipe, prompts):
        asked.extend(prompts)
        return np.zeros((len(prompts), 16, 16, 3), np.uint8)

    monkeypatch.setattr(icons, "sampled", sampled)
    metrics = icon_metrics(None, SimpleNamespace(data=data), limit=4)  # type: ignore[arg-type]
    assert any(name.startswith("style_cell") for name in metrics)
    cells = {
        styled_captions(icon.name, icon.style)[0]: cell_of(icon.key, icon.style)
        for icon in IconSource(data, "train").everything
    }
    assert asked
    for prompt in asked:
        assert cells[prompt].kind != "train" and not cells[prompt].tuning
