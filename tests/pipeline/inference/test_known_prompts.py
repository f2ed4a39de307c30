"""What no training saw of a prompt is reported, with the nearest that exist, and still drawn."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from pipeline.cli.main import main
from pipeline.inference.known_prompts import FILE, MAX_BYTES, KnownPrompts, as_json
from pipeline.inference.pipeline import TextToImagePipeline
from tests.helpers.pipelines import tiny_icons_pipeline

KNOWN = KnownPrompts(
    ("blob", "fluent", "noto"),
    ("A button (blood type)", "man in suit: dark skin tone", "red heart", "red star", "kiss: man"),
)


@pytest.mark.parametrize(
    "prompt",
    [
        "red heart",
        "a red heart, noto style",
        "A  RED heart, Blob style.",
        "noto red heart",
        "a red heart in fluent style",
        "a button (blood type), noto style",
        "man in suit: dark skin tone in noto style",
        "a red heart with noto style",
        "red heart noto style",
        "red heart, noto",
        "a red heart in the style of noto",
        "a red heart, in the style of noto",
        "a noto red heart",
        "noto style red heart",
        "noto-style red heart",
        "red heart, noto-style",
        "red heart in the style of the noto",
        "a red heart drawn in noto style",
        "red heart noto",
        "a red heart in noto",
        "red heart,noto style",
        "red heart , noto style",
        "red-heart, noto-style!",
        "red heart, style of noto",
        "red heart in the style of noto style",
        "the noto style",
        "",
    ],
)
def test_trained_wordings_are_no_problem(prompt):
    assert KNOWN.problems(prompt) == []


def test_a_style_that_was_not_trained_is_named_with_all_styles_the_nearest_first():
    (line,) = KNOWN.problems("a red heart, notto style")
    assert "the style 'notto' was not trained" in line
    assert line.endswith("the nearest first: noto, blob, fluent")


@pytest.mark.parametrize(
    "prompt", ["a red heart with pixel style", "a red heart drawn in the style of pixel"]
)
def test_an_unknown_style_is_told_from_the_name_in_other_wordings(prompt):
    (line,) = KNOWN.problems(prompt)
    assert line.startswith("the style 'pixel' was not trained, and some other is drawn")


def test_a_style_that_was_not_trained_is_told_by_a_comma_alone():
    (line,) = KNOWN.problems("a red heart, pixel")
    assert line.startswith("the style 'pixel' was not trained, and some other is drawn")


def test_of_styles_that_end_alike_the_longest_is_meant():
    known = KnownPrompts(("heart", "my heart", "big my heart"), ("red",))
    assert known.problems("red, big my heart style") == []
    assert known.problems("red my heart") == []
    assert known.problems("red in the style of my heart") == []


def test_a_name_may_end_as_a_style_is_called():
    known = KnownPrompts(("ink",), ("bottle of ink", "bottle"))
    assert known.problems("a bottle of ink") == []
    assert known.as_trained("a bottle of ink, ink style!") == "bottle of ink, ink style"


def test_a_name_that_no_set_has_is_named_with_the_nearest():
    (line,) = KNOWN.problems("a red hart, noto style")
    assert line.startswith("no icon is named 'red hart'; the nearest names: 'red heart'")
    (line,) = KNOWN.problems("buton")
    assert "'A button (blood type)'" in line


def test_a_comma_before_the_style_is_no_part_of_the_name():
    assert KNOWN.problems("a red heart, in the noto style") == []


def test_a_name_keeps_letters_that_look_like_an_article():
    (line,) = KNOWN.problems("a woman with a kite")
    assert line.startswith("no icon is named 'woman with a kite'; the nearest names: ")


def test_a_name_that_resembles_none_has_no_nearest():
    (line,) = KNOWN.problems("\u57ce")
    assert line == "no icon is named '\u57ce'; the image may show anything"


def test_thousands_of_names_are_compared_without_an_edit_distance(monkeypatch):
    def refused(*arguments: object) -> None:
        raise AssertionError("an edit distance takes a second for 4,000 names")

    monkeypatch.setattr("difflib.SequenceMatcher.ratio", refused)
    known = KnownPrompts(("noto",), tuple(f"name {i}" for i in range(50)))
    (line,) = known.problems("quetzalcoatl, noto style")
    assert line.startswith("no icon is named 'quetzalcoatl'")


def test_both_are_two_lines():
    assert len(KNOWN.problems("a dragon in pixel art style")) == 2


def test_names_are_not_checked_without_any():
    assert KnownPrompts(("noto",), ()).problems("a dragon, noto style") == []


def test_a_bundle_keeps_its_prompts_and_says_once_per_prompt_what_is_new(tmp_path):
    tiny_icons_pipeline(KNOWN).save_pretrained(tmp_path / "bundle")
    pipe = TextToImagePipeline.from_pretrained(tmp_path / "bundle")
    assert pipe.known_prompts == KNOWN
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = pipe(["red heart, pixar style"] * 2)
    assert len(output.images) == 2
    assert [str(one.message)[:30] for one in caught] == ["the style 'pixar' was not trai"]


def test_generate_notes_what_is_new_and_draws(tmp_path, capsys):
    tiny_icons_pipeline(KNOWN).save_pretrained(tmp_path / "bundle")
    command = ["generate", "--bundle", str(tmp_path / "bundle"), "a red hart", "--num-images", "1"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    assert "note: no icon is named 'red hart'; the nearest names: 'red heart'" in (
        capsys.readouterr().out
    )
    assert (tmp_path / "out" / "00000-a-red-hart.png").is_file()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "truncated or corrupted"),
        ('{"styles": ["noto"]}', "names is None"),
        ('{"styles": [1], "names": []}', "styles.0 is 1"),
        (" " * (MAX_BYTES + 1), "bytes"),
    ],
)
def test_damaged_prompts_are_refused(tmp_path, content, message):
    tiny_icons_pipeline(KNOWN).save_pretrained(tmp_path / "bundle")
    (tmp_path / "bundle" / FILE).write_text(content)
    with pytest.raises(ValueError, match=message):
        TextToImagePipeline.from_pretrained(tmp_path / "bundle")


def test_too_many_names_are_left_out():
    names = tuple(f"name {number} of very many" for number in range(20_000))
    content = as_json(KnownPrompts(("noto",), names))
    assert json.loads(content) == {"styles": ["noto"], "names": []}


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("red heart, noto style", "red heart, noto style"),
        ("a red heart in noto style", "a red heart in noto style"),
        ("noto red heart", "noto red heart"),
        ("a red heart in the style of noto", "red heart, noto style"),
        ("THE red-heart drawn in noto style.", "red heart, noto style"),
        ("a button (blood type) , blob", "A button (blood type), blob style"),
        ("a red heart", "red heart"),
        ("a red heart, pixel style", "a red heart, pixel style"),
        ("two red hearts, noto style", "two red hearts, noto style"),
        ("noto style", "noto style"),
        ("", ""),
    ],
)
def test_prompts_are_read_in_the_words_of_training(prompt, read):
    assert KNOWN.as_trained(prompt) == read


def test_a_pipeline_reads_prompts_in_the_words_of_training():
    pipe = tiny_icons_pipeline(KNOWN)
    ids = pipe.text_ids(["The  red heart drawn in noto style!", "a dragon"])
    assert torch.equal(ids, pipe.text.encode(["red heart, noto style", "a dragon"]))


def test_a_style_behind_a_name_that_has_such_words_is_found():
    known = KnownPrompts(("noto",), ("person in suit", "face with sunglasses", "face"))
    for prompt in ("a person in suit in pixel style", "face with sunglasses in pixel style"):
        (line,) = known.problems(prompt)
        assert line.startswith("the style 'pixel' was not trained")
    assert known.as_trained("face with sunglasses with noto style") == (
        "face with sunglasses, noto style"
    )


def test_quotes_and_accents_may_be_typed_in_any_way():
    known = KnownPrompts(("noto",), ("woman\u2019s hat", "pi\u00f1ata"))
    assert known.as_trained("woman's hat, noto style") == "woman\u2019s hat, noto style"
    assert known.as_trained("pin\u0303ata") == "pi\u00f1ata"


def test_an_emoji_as_a_prompt_is_asked_for_in_words():
    (line,) = KNOWN.problems("\u2764\ufe0f, noto style")
    assert "write its name in words" in line


@pytest.mark.parametrize(
    "prompt", ["noto red heart, blob style", "a red heart, noto style, blob style"]
)
def test_two_styles_in_one_prompt_are_one_line(prompt):
    (line,) = KNOWN.problems(prompt)
    assert line.startswith("the prompt names the styles 'noto' and 'blob'")


@pytest.mark.parametrize("prompt", ["the end, noto style", "end", "Polish, noto style", "a polish"])
def test_captions_of_names_that_resemble_each_other_stay_as_they_are(prompt):
    known = KnownPrompts(("noto",), ("the end", "end", "Polish", "polish"))
    assert known.as_trained(prompt) == prompt


def test_a_caption_that_could_be_read_otherwise_stays_as_it_is():
    known = KnownPrompts(("apple", "pixel"), ("apple", "pixel"))
    assert known.as_trained("pixel apple") == "pixel apple"


def test_a_style_that_is_named_twice_counts_once():
    for prompt in ("noto red heart, noto style", "red heart, noto style, noto style"):
        assert KNOWN.problems(prompt) == []
        assert KNOWN.as_trained(prompt) == "red heart, noto style"


def test_a_style_that_was_not_trained_is_named_beside_one_that_was():
    for prompt in ("noto red heart, pixel style", "noto red heart in the style of pixel"):
        (line,) = KNOWN.problems(prompt)
        assert line.startswith("the style 'pixel' was not trained")
