"""The source `icons`: captions, splits, and what is kept between runs."""

from __future__ import annotations

import logging
from collections import Counter

import numpy as np
import pytest

from pipeline.config.builtin import IconOptions
from pipeline.config.data import DataConfig, data_settings
from pipeline.config.experiment import to_dict
from pipeline.data.builtin import emoji, icons
from pipeline.data.builtin.icon_captions import captions_of_icon
from pipeline.data.builtin.icon_split import Cell, cell_of
from pipeline.data.builtin.icons import load_icons, locate_set, reported
from pipeline.data.builtin.svg_process import Renderers, TooSlow
from pipeline.data.load import load_sources
from pipeline.data.readers import images
from tests.helpers.icons import body, write_names, write_set, write_styles


def config(folder, sets, **more) -> DataConfig:
    if not (folder / "names").is_dir():
        write_names(folder / "names", {"\U0001f9ff": "nazar amulet"})
    own = IconOptions(folder=str(folder), sets=sets, annotations=str(folder / "names"))
    return DataConfig(source="icons", image_size=16, icons=own, **more)


@pytest.fixture
def two_styles(tmp_path) -> DataConfig:
    write_names(tmp_path / "names", {"\U0001f400": "grey rat"})
    return config(tmp_path, write_styles(tmp_path))


def test_names_are_those_of_the_cldr_and_else_of_the_first_set(two_styles):
    train, _ = load_sources(two_styles)
    names = {icon.key: icon.name for icon in train.everything}
    assert names["1f400"] == "grey rat" and names["1f401"] == "thing 1"


def test_without_english_names_icons_are_called_as_in_their_sets_and_that_is_said(
    two_styles, tmp_path, monkeypatch
):
    monkeypatch.setattr(emoji, "names_of_package", dict)
    monkeypatch.setattr(emoji, "ANNOTATIONS", str(tmp_path / "none"))
    two_styles.icons.annotations = None
    train, _ = load_sources(two_styles)
    assert {icon.key: icon.name for icon in train.everything}["1f400"] == "thing 0"
    assert any("no English names of emoji are installed" in line for line in train.problems)
    write_set(tmp_path, "logos", {f"logo-{i}": body("red", i) for i in range(3)})
    two_styles.icons.sets = ["logos"]
    train, _ = load_sources(two_styles)
    assert not any("English names" in line for line in train.problems)


def test_captions_name_the_style_in_several_wordings_and_once_in_33_not_at_all():
    styled = [
        "red heart, twemoji style",
        "a red heart, twemoji style",
        "twemoji red heart",
        "a red heart in twemoji style",
    ]
    assert captions_of_icon("red heart", "twemoji") == [*styled * 8, "red heart"]
    assert captions_of_icon("owl", "noto")[1] == "an owl, noto style"


def test_drawings_are_joined_by_the_aliases_of_an_earlier_set(tmp_path):
    """Else a name that is held out in one set is trained on in another, as something else."""
    aliases = {"old-cap": {"parent": "cap"}, "hat": {"parent": "cap", "hFlip": True}}
    write_set(tmp_path, "first", {"cap": body("red")}, {"1f472": "cap"}, aliases=aliases)
    write_set(tmp_path, "second", {"old-cap": body("blue"), "hat": body("green")})
    write_names(tmp_path / "names", {"\U0001f472": "person with skullcap"})
    found, _ = load_icons(str(tmp_path), ("first", "second"), str(tmp_path / "names"), 16, 1)
    assert {(icon.style, icon.key, icon.name) for icon in found} == {
        ("first", "1f472", "person with skullcap"),
        ("second", "1f472", "person with skullcap"),
        ("second", "hat", "hat"),  # which is another drawing in the first
    }


def test_an_alias_of_an_earlier_set_gives_way_to_a_name_of_the_set_itself(tmp_path):
    aliases = {"thing": {"parent": "a-thing"}}
    write_set(tmp_path, "first", {"a-thing": body("red")}, {"1f400": "a-thing"}, aliases=aliases)
    write_set(tmp_path, "second", {"thing": body("blue")}, {"1f401": "thing"})
    write_set(tmp_path, "third", {"thing": body("green")})
    write_names(tmp_path / "names", {"\U0001f402": "ox"})
    sets = ("first", "second", "third")
    found, _ = load_icons(str(tmp_path), sets, str(tmp_path / "names"), 16, 1)
    assert {(icon.style, icon.key) for icon in found} == {
        ("first", "1f400"),
        ("second", "1f401"),
        ("third", "1f401"),
    }


def test_drawings_that_are_the_same_pixels_count_once_by_their_shortest_name(tmp_path):
    chars = {"1f1e8-1f1f5": "clipperton", "1f1eb-1f1f7": "france", "1f400": "rat"}
    drawings = {"clipperton": body("red"), "france": body("red"), "rat": body("grey")}
    write_set(tmp_path, "own", drawings, chars)
    names = {
        "\U0001f1e8\U0001f1f5": "flag: Clipperton Island",
        "\U0001f1eb\U0001f1f7": "flag: France",
    }
    write_names(tmp_path / "names", names)
    found, _ = load_icons(str(tmp_path), ("own",), str(tmp_path / "names"), 16, 1)
    assert [icon.name for icon in found] == ["flag: France", "rat"]


def test_no_cell_is_in_two_splits(two_styles):
    train, held_out = load_sources(two_styles)
    tested = reported(two_styles)
    labels = [
        set(train.names(range(len(train)))),
        set(held_out.names(range(len(held_out)))),
        {icon.label for kind in tested.values() for icon in kind},
    ]
    assert all(labels)
    assert not labels[0] & labels[1] | labels[0] & labels[2] | labels[1] & labels[2]
    for icon in train.icons:
        assert cell_of(icon.key, icon.style).kind == "train"
    for kind, cells in tested.items():
        assert {cell_of(icon.key, icon.style).kind for icon in cells} <= {kind}
    trained = {icon.key for icon in train.icons}
    assert all(icon.key in trained for icon in tested["cell"])


def test_untoned_repeats_are_for_training_drawings_without_a_skin_tone(tmp_path, monkeypatch):
    keys = ["1f44d", "1f44d-1f3fb", "1f44d-1f3ff", "1f91d-1f3fb-200d-1f91d-1f3ff", "1f400"]
    write_set(
        tmp_path,
        "own",
        {f"a{i}": body("red", i) for i in range(5)},
        {key: f"a{i}" for i, key in enumerate(keys)},
    )
    monkeypatch.setattr(icons, "cell_of", lambda key, style: Cell("train"))
    once = config(tmp_path, ["own"])
    often = config(tmp_path, ["own"])
    often.icons.untoned_repeats = 3
    (train, held_out), (repeated, as_before) = load_sources(once), load_sources(often)
    untoned = {"1f44d", "1f400"}
    assert Counter(icon.key for icon in repeated.icons) == {
        icon.key: 3 if icon.key in untoned else 1 for icon in train.icons
    }
    assert [icon.key for icon in as_before.icons] == [icon.key for icon in held_out.icons]
    assert len(repeated) == len(repeated.icons) and repeated.fingerprint != train.fingerprint


def test_untoned_repeats_below_one_are_refused(two_styles):
    two_styles.icons.untoned_repeats = 0
    said = "\n".join(two_styles.icons.problems())
    assert "data.icons.untoned_repeats" in said and "0" in said


def test_images_are_laid_on_the_background_that_is_asked_for(two_styles):
    train, _ = load_sources(two_styles)
    assert train.images([0]).shape == (1, 16, 16, 3)
    assert train.images([0])[0, 15, 15].tolist() == [255, 255, 255]
    two_styles.alpha = "#102030"
    other, _ = load_sources(two_styles)
    assert other.images([0])[0, 15, 15].tolist() == [16, 32, 48]
    assert other.fingerprint != train.fingerprint


def test_that_transparency_is_laid_on_a_background_is_said_once(two_styles, monkeypatch, caplog):
    monkeypatch.setattr(images, "_laid_on_background", [])
    caplog.set_level(logging.INFO)
    two_styles.alpha = "keep"
    load_sources(two_styles)
    assert "is laid on" not in caplog.text
    two_styles.alpha = "#102030"
    load_sources(two_styles)
    assert caplog.text.count("transparency, which is laid on #102030; data.alpha=keep") == 1


@pytest.mark.parametrize("changed", ["RENDER_VERSION", "version"])
def test_images_of_another_renderer_are_not_read_again(two_styles, monkeypatch, caplog, changed):
    load_sources(two_styles)
    load_icons.cache_clear()
    monkeypatch.setattr(icons, changed, 99 if changed == "RENDER_VERSION" else lambda _: "99.0")
    caplog.set_level(logging.INFO)
    load_sources(two_styles)
    assert caplog.text.count("rendering 40 icons") == 2


def test_rendered_images_are_kept_and_read_again(two_styles, monkeypatch, caplog):
    first, _ = load_sources(two_styles)
    load_icons.cache_clear()
    monkeypatch.setattr(icons, "Renderers", None)
    caplog.set_level(logging.INFO)
    again, _ = load_sources(two_styles)
    assert again.fingerprint == first.fingerprint
    assert np.array_equal(again.images([3]), first.images([3]))
    assert "rendering" not in caplog.text


@pytest.mark.parametrize("damage", ["empty", "truncated", "text"])
def test_damaged_kept_images_are_rendered_again(two_styles, tmp_path, caplog, damage):
    first, _ = load_sources(two_styles)
    load_icons.cache_clear()
    kept = sorted((tmp_path / ".rendered").glob("*.npz"))
    whole = kept[0].read_bytes()
    damaged = {"empty": b"", "truncated": whole[: len(whole) // 2], "text": b"no archive"}
    kept[0].write_bytes(damaged[damage])
    caplog.set_level(logging.INFO)
    again, _ = load_sources(two_styles)
    assert again.fingerprint == first.fingerprint
    assert "; its icons are rendered again" in caplog.text
    assert kept[0].read_bytes() == whole


def test_a_folder_that_cannot_be_written_keeps_no_images_and_says_so(
    two_styles, monkeypatch, caplog
):
    load_icons.cache_clear()

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(icons, "atomic_write", full)
    train, _ = load_sources(two_styles)
    assert len(train) > 0
    assert "rendered icons are not kept for the next run" in caplog.text


@pytest.mark.parametrize(
    ("drawings", "reason"), [({}, ""), ({"a": "<script/>"}, " (bare: the drawing of a is left out")]
)
def test_a_style_without_a_usable_drawing_is_refused(two_styles, tmp_path, drawings, reason):
    write_set(tmp_path, "bare", drawings)
    two_styles.icons.sets.append("bare")
    with pytest.raises(ValueError) as caught:
        load_sources(two_styles)
    said = str(caught.value)
    assert said.startswith(f"the style bare has no drawing that can be rendered{reason}")
    assert said.endswith("mend its set, or leave it out of data.icons.sets")


@pytest.mark.parametrize("count", [2, 6, 45])
def test_of_few_drawings_some_are_held_out_and_not_trained_on(tmp_path, monkeypatch, count):
    drawings = {f"logo-{i}": body(f"#{i * 5:02x}8040") for i in range(count)}
    write_set(tmp_path, "own", drawings)
    monkeypatch.setattr(icons, "cell_of", lambda key, style: Cell("train"))
    train, held_out = load_sources(config(tmp_path, ["own"]))
    assert len(held_out) == max(count // 20, 1)
    assert len(train) + len(held_out) == count
    assert not {icon.key for icon in train.icons} & {icon.key for icon in held_out.icons}


def test_the_images_are_known_by_content_and_not_by_folder(two_styles, tmp_path):
    moved = tmp_path / "moved"
    write_styles(moved)
    write_names(moved / "names", {"\U0001f400": "grey rat"})
    other = config(moved, two_styles.icons.sets)
    assert load_sources(other)[0].fingerprint == load_sources(two_styles)[0].fingerprint
    assert data_settings(to_dict(other)) == data_settings(to_dict(two_styles))


def test_what_cannot_be_drawn_is_named(tmp_path):
    drawings = {f"a{i}": body("red", i) for i in range(3)}
    write_set(tmp_path, "set", {**drawings, "bad": "<script/>", "cut": "<g>"}, licence=None)
    train, _ = load_sources(config(tmp_path, ["set"]))
    assert len(train.everything) == 3
    problems = "\n".join(train.problems)
    assert "set states no licence" in problems
    assert "set: the drawing of bad is left out (it has an element <script>" in problems
    assert "set: the drawing of cut is left out (it is no XML" in problems
    assert problems.count("); save it as a plain SVG") == 2


def test_equal_drawings_of_a_style_count_once(tmp_path):
    write_set(tmp_path, "set", {"a": body("red"), "b": body("red"), "c": body("blue")})
    train, _ = load_sources(config(tmp_path, ["set"]))
    assert [icon.name for icon in train.everything] == ["a", "c"]


def test_a_set_that_is_not_there_says_which_are(two_styles, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        locate_set(tmp_path, "twemojj")
    assert "it has names, style0, style1" in str(caught.value)
    assert "`make icons`" in str(caught.value)


def test_two_sets_of_one_style_are_refused(two_styles):
    two_styles.icons.sets.append("style0")
    with pytest.raises(ValueError, match="has the style style0 twice"):
        load_sources(two_styles)


def test_without_sets_the_error_says_so():
    with pytest.raises(ValueError, match=r"data\.icons\.sets is empty"):
        DataConfig(source="icons", icons=IconOptions(sets=[]))


def test_without_the_renderer_the_error_says_what_to_install(two_styles, monkeypatch):
    load_icons.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "resvg_py", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mini-dalle\[icons\]'"):
        load_sources(two_styles)


def test_a_drawing_that_took_too_long_is_tried_again(two_styles, monkeypatch):
    render = Renderers.render

    def slow_once(self: Renderers, svg: str) -> np.ndarray:
        monkeypatch.setattr(Renderers, "render", render)
        raise TooSlow("it took more than 20 s")

    monkeypatch.setattr(Renderers, "render", slow_once)
    two_styles.workers = 1
    found, _ = load_sources(two_styles)
    assert len(found.everything) == 80


def test_names_in_a_script_of_no_latin_letters_are_not_joined(tmp_path):
    write_set(tmp_path, "first", {"狗": body("red"), "树": body("blue")})
    write_set(tmp_path, "second", {"家": body("green"), "树": body("grey")})
    names = str(write_names(tmp_path / "names", {"\U0001f400": "rat"}))
    found, _ = load_icons(str(tmp_path), ("first", "second"), names, 16, 1)
    assert sorted(icon.name for icon in found if icon.style == "second") == ["家", "树"]


def test_why_nothing_can_be_drawn_is_said_and_not_how_names_are_joined(tmp_path):
    write_set(tmp_path, "mine", {"cup": "<text>no</text>"})
    with pytest.raises(ValueError, match="that can be rendered \\(mine: the drawing of cup"):
        load_sources(config(tmp_path, ["mine"]))


def test_an_entry_that_begins_with_a_dot_is_a_path(two_styles, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert icons.locate_set(tmp_path / "sets", "./style0") == tmp_path / "style0"
    with pytest.raises(FileNotFoundError):
        icons.locate_set(tmp_path, "./style9")
    monkeypatch.chdir(tmp_path / "style0")
    assert icons.locate_set(tmp_path, ".") == tmp_path / "style0"
