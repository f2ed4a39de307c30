"""Sets of icons: code points, names, aliases, and what is left out."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pipeline.data.builtin.icon_sets import key_index, key_of, key_of_slug, name_of_slug, read_set
from pipeline.data.builtin.svg import render
from tests.helpers.icons import body, write_set

NAMES = {"1f600": "grinning face", "1f9d1-200d-1f373": "cook", "23f0": "alarm clock"}


def test_keys_are_code_points_without_variation_selectors():
    assert key_of("\u2764\ufe0f") == "2764"
    assert key_of("\U0001f469\U0001f3fd\u200d\U0001f373") == "1f469-1f3fd-200d-1f373"


@pytest.mark.parametrize(
    ("slug", "name"),
    [
        ("red-heart", "red heart"),
        ("woman-cook-medium-dark-skin-tone", "woman cook: medium-dark skin tone"),
        ("hand_dark-skin-tone", "hand dark skin tone"),
    ],
)
def test_names_of_sets_are_written_as_words(slug, name):
    assert name_of_slug(slug) == name


def test_icons_are_known_by_the_code_points_of_the_set(tmp_path):
    """Names differ between sets; a name without code points is counted."""
    icons = {"grin": body("red"), "digit-eight": body("blue"), "heart": body("green")}
    path = write_set(tmp_path, "some", icons, {"1f600": "grin", "2764-fe0f": "heart"})
    found = read_set(path, {})
    assert list(found.drawings) == ["1f600", "2764"]
    assert found.own_names == {"1f600": "grin", "2764": "heart"}
    assert (found.style, found.licence, found.author) == ("some", "MIT", "A. Painter")
    assert found.problems == [
        "some: 1 icons, such as digit-eight, have no code points in chars.json and are left out; "
        "add them to it"
    ]


def test_aliases_and_hidden_icons_need_no_code_points(tmp_path):
    icons = {"grin": body("red"), "old": body("blue")}
    aliases = {"smile": {"parent": "grin"}}
    path = write_set(tmp_path, "some", icons, {"1f600": "grin"}, aliases=aliases)
    content = json.loads((path / "icons.json").read_text())
    content["icons"]["old"]["hidden"] = True
    (path / "icons.json").write_text(json.dumps(content))
    found = read_set(path, {})
    assert list(found.drawings) == ["1f600"] and found.problems == []


@pytest.mark.parametrize(
    ("icons", "joined", "kept"),
    [
        ({"grinningface": "red"}, 1, "0 keep names of their own"),
        ({"a": "red", "b": "green", "cook": "blue"}, 1, "2 keep names of their own, such as a"),
    ],
    ids=["all known", "few known"],
)
def test_a_set_without_code_points_is_told_what_its_names_found(tmp_path, icons, joined, kept):
    drawings = {name: body(colour) for name, colour in icons.items()}
    (line,) = read_set(write_set(tmp_path, "own", drawings), key_index(NAMES)).problems
    assert line.startswith(f"own has no chars.json: {joined} icons are joined") and kept in line


def test_without_code_points_aliases_are_looked_up_after_the_names_of_icons(tmp_path):
    icons = {"happy": body("red"), "grinningface": body("blue"), "cookie": body("green")}
    aliases = {
        "cook": {"parent": "happy"},
        "grinning-face": {"parent": "cookie"},  # taken by an icon
        "biscuit": {"parent": "cookie"},
    }
    path = write_set(tmp_path, "own", icons, aliases=aliases)
    found = read_set(path, key_index(NAMES))
    assert found.own_names == {
        "1f9d1-200d-1f373": "happy",
        "1f600": "grinningface",
        "cookie": "cookie",
    }
    assert found.further_names == {
        "cook": "1f9d1-200d-1f373",
        "grinningface": "cookie",
        "biscuit": "cookie",
    }
    (line,) = found.problems
    assert "2 icons are joined" in line and "1 keep names of their own, such as cookie" in line


def test_an_alias_that_has_code_points_is_a_drawing_of_its_own(tmp_path):
    """As the flags of France and of Clipperton Island, where they are the same drawing."""
    chars = {"1f1e8-1f1f5": "clipperton", "1f1eb-1f1f7": "france"}
    aliases = {"france": {"parent": "clipperton"}, "st-martin": {"parent": "france"}}
    icons = {"clipperton": body("red"), "other": body("red")}  # alike, and not the parent
    chars |= {"1f400": "other"}
    path = write_set(tmp_path, "own", icons, chars, aliases=aliases)
    found = read_set(path, {})
    assert found.own_names == {
        "1f1e8-1f1f5": "clipperton",
        "1f1eb-1f1f7": "france",
        "1f400": "other",
    }
    assert found.further_names == {"stmartin": "1f1e8-1f1f5"}


def test_a_set_of_no_emoji_needs_no_code_points(tmp_path):
    assert not read_set(write_set(tmp_path, "mdi", {"a": body("red")}), key_index(NAMES)).problems


def test_without_code_points_names_are_looked_up_in_words_and_as_in_unicode(tmp_path):
    icons = {"grinningface": body("red"), "cook": body("blue"), "Alarm-Clock": body("green")}
    path = write_set(tmp_path, "old", {**icons, "bunnyside": body("black")})
    found = read_set(path, key_index(NAMES))
    assert set(found.drawings) == {*NAMES, "bunnyside"}
    (line,) = found.problems
    assert line == (
        "old has no chars.json: 3 icons are joined with other sets by their names, and 1 keep "
        "names of their own, such as bunnyside; add chars.json if these are emoji"
    )


def test_a_set_that_is_no_emoji_keeps_its_own_names(tmp_path):
    path = write_set(
        tmp_path, "mdi", {"home": body("red"), "cook": body("blue"), "cog": body("red")}
    )
    found = read_set(path, key_index(NAMES))
    assert found.own_names == {"home": "home", "cog": "cog", "1f9d1-200d-1f373": "cook"}


def test_a_word_of_hexadecimal_letters_is_a_name(tmp_path):
    names = ("face", "a0", "bed-01", "cafe-2024", "0bed", "123456")
    path = write_set(tmp_path, "set", {name: body("red") for name in names})
    assert set(read_set(path, {}).drawings) == set(names)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("emoji_u1f600", "1f600"),
        ("1F9D1-200D-1F373", "1f9d1-200d-1f373"),
        ("0023-fe0f-20e3", "23-20e3"),
        ("23-20e3", "23-20e3"),
        ("u1f1e9_1f1ea", "1f1e9-1f1ea"),
    ],
)
def test_names_of_files_that_are_code_points(tmp_path, name, key):
    assert list(read_set(write_set(tmp_path, "set", {name: body("red")}), {}).drawings) == [key]


def test_aliases_are_mirrored_and_turned(tmp_path):
    aliases = {
        "same": {"parent": "left"},
        "right": {"parent": "left", "hFlip": True},
        "low": {"parent": "same", "vFlip": True},
        "turned": {"parent": "left", "rotate": 1},
    }
    path = write_set(tmp_path, "set", {"left": body("red")}, aliases=aliases)
    found = read_set(path, {})
    alpha = {name: render(svg, 8)[..., 3] for name, svg in found.drawings.items()}
    assert set(alpha) == {"left", "right", "low", "turned"}  # "same" is no drawing of its own
    assert np.array_equal(alpha["right"], alpha["left"][:, ::-1])
    assert np.array_equal(alpha["low"], alpha["left"][::-1])
    assert np.array_equal(alpha["turned"], np.rot90(alpha["left"], -1))


def test_icons_may_be_turned_themselves_and_aliases_may_show_another_part(tmp_path):
    """As the format allows: https://iconify.design/docs/types/iconify-alias.html"""
    path = write_set(tmp_path, "set", {"left": body("red")})
    content = json.loads((path / "icons.json").read_text())
    content["icons"]["right"] = content["icons"]["left"] | {"hFlip": True}
    content["aliases"] = {
        "back": {"parent": "right", "hFlip": True},
        "corner": {"parent": "left", "width": 4, "height": 4},
    }
    (path / "icons.json").write_text(json.dumps(content))
    alpha = {n: render(svg, 8)[..., 3] for n, svg in read_set(path, {}).drawings.items()}
    assert np.array_equal(alpha["right"], alpha["left"][:, ::-1])
    assert np.array_equal(alpha["back"], alpha["left"])
    assert alpha["corner"].all() and not alpha["left"].all()


def test_an_icon_that_is_turned_a_quarter_is_as_wide_as_it_was_high(tmp_path):
    path = write_set(tmp_path, "set", {"bar": body("red")})
    content = json.loads((path / "icons.json").read_text())
    content["icons"]["bar"] |= {"body": '<rect width="8" height="4"/>', "height": 4, "rotate": 1}
    (path / "icons.json").write_text(json.dumps(content))
    alpha = render(read_set(path, {}).drawings["bar"], 8)[..., 3]
    assert (alpha[:, 2:6] == 255).all() and not alpha[:, [0, 1, 6, 7]].any()


def test_an_alias_whose_changes_cancel_draws_the_same(tmp_path):
    aliases = {
        "mirrored": {"parent": "cook", "hFlip": True},
        "chef": {"parent": "mirrored", "hFlip": True, "vFlip": False, "rotate": 4},
    }
    path = write_set(tmp_path, "set", {"cook": body("red")}, {"1f9d1": "cook"}, aliases=aliases)
    assert read_set(path, {}).further_names == {"chef": "1f9d1"}


@pytest.mark.parametrize(
    ("alias", "reason"),
    [
        ({"parent": "missing"}, "it is an alias of 'missing', which the set lacks"),
        ({"parent": "loop"}, "it is an alias of more than 10 aliases"),
        ({}, "it is an alias without a text `parent`"),
        ({"parent": 3}, "it is an alias without a text `parent`"),
        ("text", "it is no object"),
        ({"parent": "a", "rotate": "x"}, "invalid literal"),
        ({"parent": "a", "rotate": 1e400}, "cannot convert float infinity"),
    ],
)
def test_an_alias_that_leads_nowhere_is_skipped_and_named(tmp_path, alias, reason):
    path = write_set(tmp_path, "set", {"a": body("red")}, aliases={"loop": alias})
    found = read_set(path, {})
    assert list(found.drawings) == ["a"]
    (line,) = found.problems
    assert line.startswith(f"set:loop is left out: {reason}")


def test_icons_that_are_no_objects_are_skipped_and_named(tmp_path):
    path = write_set(tmp_path, "set", {"a": body("red")})
    content = json.loads((path / "icons.json").read_text())
    content["icons"] |= {"text": "<rect/>", "none": None}
    (path / "icons.json").write_text(json.dumps(content | {"aliases": None}))
    found = read_set(path, {})
    assert list(found.drawings) == ["a"]
    assert found.problems == [
        "set:text is left out: it is no object",
        "set:none is left out: it is no object",
    ]


def test_an_icon_without_a_drawing_is_skipped_and_named(tmp_path):
    path = write_set(tmp_path, "set", {"a": body("red")})
    content = json.loads((path / "icons.json").read_text())
    content["icons"]["empty"] = {}
    (path / "icons.json").write_text(json.dumps(content))
    assert read_set(path, {}).problems == ["set:empty is left out: it has no text `body`"]


def test_code_points_are_read_where_the_advice_says(tmp_path):
    icons = {"grinningface": body("red"), "cook": body("blue"), "odd": body("green")}
    whole = write_set(tmp_path, "old", icons) / "icons.json"
    own = tmp_path / "own.json"
    own.write_text(whole.read_text())
    (line,) = read_set(own, key_index(NAMES)).problems
    assert line.startswith("old has no `chars`: ") and line.endswith(
        "; add `chars` if these are emoji"
    )
    chars = {"1f600": "grinningface", "1f9d1-200d-1f373": "cook", "1f4a9": "odd"}
    own.write_text(json.dumps(json.loads(own.read_text()) | {"chars": chars}))
    assert set(read_set(own, {}).drawings) == set(chars)
    folder = tmp_path / "svgs"
    folder.mkdir()
    for name in icons:
        (folder / f"{name}.svg").write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg">{icons[name]}</svg>'
        )
    (line,) = read_set(folder, key_index(NAMES)).problems
    assert line.endswith("; add chars.json if these are emoji")
    (folder / "chars.json").write_text(json.dumps(chars))
    found = read_set(folder, {})
    assert set(found.drawings) == set(chars) and not found.problems


def test_code_points_without_a_name_are_left_out(tmp_path):
    path = write_set(tmp_path, "set", {"a": body("red")}, {"1f600": ["a"], "1f601": "a"})
    assert list(read_set(path, {}).drawings) == ["1f601"]


def test_a_folder_of_svgs_is_a_set(tmp_path):
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8">{body("red")}</svg>'
    folder = tmp_path / "My Drawings"
    folder.mkdir()
    for name in ("emoji_u1f600", "red-house", "1F9D1-200D-1F373", "23f0"):
        (folder / f"{name}.{'SVG' if name == '23f0' else 'svg'}").write_text(svg)
    (folder / "broken.svg").write_bytes(b"\xff\xfe\x00")
    found = read_set(folder, key_index(NAMES))
    assert found.style == "my drawings" and found.licence is None
    assert set(found.drawings) == {*NAMES, "red-house"}
    assert any("broken.svg is left out" in line for line in found.problems)
    assert any("red-house" in line for line in found.problems)
    terms = {"license": {"spdx": "MIT"}, "author": {"name": "A. Painter"}}
    (folder / "info.json").write_text(json.dumps(terms))
    found = read_set(folder, {})
    assert (found.licence, found.author) == ("MIT", "A. Painter")


@pytest.mark.parametrize("prefix", ["../outside", "/tmp/outside", "", "a\nb", "x" * 101])
def test_a_prefix_that_is_no_name_is_refused(tmp_path, prefix):
    """It becomes a part of the name of a file."""
    path = tmp_path / "icons.json"
    path.write_text(json.dumps({"prefix": prefix, "icons": {"a": {"body": body("red")}}}))
    with pytest.raises(ValueError, match="write one of at most 100 letters, digits, underscores"):
        read_set(path, {})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "cannot be read"),
        ("[1]", "holds no JSON object"),
        ("{}", "is no Iconify set"),
        (json.dumps({"prefix": 1, "icons": {}}), "is no Iconify set"),
        ('{"a":' * 200 + "1" + "}" * 200, "cannot be read"),
    ],
)
def test_a_corrupted_set_is_one_clear_error(tmp_path, text, reason):
    (tmp_path / "icons.json").write_text(text)
    with pytest.raises(ValueError, match=reason) as caught:
        read_set(tmp_path, {})
    assert "replace it by a whole copy, which `make icons` does" in str(caught.value)


def test_an_empty_folder_says_what_a_set_is(tmp_path):
    with pytest.raises(FileNotFoundError, match="give an Iconify JSON file, a folder with icons"):
        read_set(tmp_path, {})


def test_names_of_other_scripts_are_compared_by_their_own_letters(tmp_path):
    index = key_index({"1f436": "狗", "1f3e0": "家"})
    assert key_of_slug("家", index) == "1f3e0"
    assert key_of_slug("树", index) is None
    assert key_of_slug("...", index | {"": "1f436"}) is None
    assert key_of_slug("かぎ", key_index({"1f511": "かき"})) is None


@pytest.mark.parametrize(
    ("slug", "key"),
    [
        ("\u2764\ufe0f", "2764"),
        ("\U0001f469\U0001f3fd\u200d\U0001f373", "1f469-1f3fd-200d-1f373"),
        ("1\ufe0f\u20e3", "31-20e3"),
        ("7", None),
        ("", None),
    ],
)
def test_a_drawing_may_be_named_by_its_emoji(slug, key):
    assert key_of_slug(slug, {}) == key


def test_code_points_that_each_font_uses_as_it_likes_join_nothing(tmp_path):
    icons = {name: body("red") for name in ("music", "cook", "alarm-clock", "alarmclock")}
    chars = {"f001": "music", "f002": "cook", "f003": "alarm-clock", "23f0": "alarmclock"}
    found = read_set(write_set(tmp_path, "font", icons, chars), key_index(NAMES))
    assert found.own_names == {
        "23f0": "alarmclock",
        "f001-music": "music",
        "1f9d1-200d-1f373": "cook",
        "f003-alarm-clock": "alarm clock",
    }


def test_what_lies_beside_svgs_and_is_not_read_is_named(tmp_path):
    drawing = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8">{body("red")}</svg>'
    (tmp_path / "more").mkdir()
    for name in ("cup.svg", "cup.SVG", "dog.svgz", "more/cat.svg"):
        (tmp_path / name).write_text(drawing)
    (tmp_path / "tea.svg").write_bytes(drawing.encode("utf-16"))
    found = read_set(tmp_path, {})
    assert len(found.drawings) == 1
    wanted = (
        "1 files, such as dog.svgz",
        "SVGs in 1 folders, such as more/",
        "another file has its",
    )
    for words in (*wanted, "tea.svg is left out: it is no UTF-8 (byte 0); save it as UTF-8"):
        assert any(words in problem for problem in found.problems), words


def test_an_icon_with_half_a_letter_is_left_out_and_others_are_kept(tmp_path):
    icons = {"cook": body("red"), "pot": "<g>\ud800</g>", "\ud800": body("red")}
    found = read_set(write_set(tmp_path, "some", icons), {})
    assert list(found.own_names.values()) == ["cook"]
    assert len([one for one in found.problems if "is left out: 'utf-8' codec" in one]) == 2


def test_a_file_that_is_no_json_is_told_what_a_set_is(tmp_path):
    path = tmp_path / "heart.svg"
    path.write_text("<svg/>")
    with pytest.raises(ValueError, match="is no Iconify JSON file; give one, or a folder of"):
        read_set(path, {})
