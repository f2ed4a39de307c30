"""What the doctor says of a layout, and its signs of captions that were read wrongly."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest

from pipeline.doctor.caption_layout import wrapped_fraction
from pipeline.doctor.diagnose import diagnose
from pipeline.doctor.report import Diagnosis
from pipeline.doctor.text_report import as_table
from tests.helpers.data import config, encoded, write_shard

LONG = (
    "The image shows a small {} thing on a plain ground. It is without any writing, and the thing "
    "is alone in it, a little to the left.\n\nThe mood is calm."
)
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")


def wrapped(text: str, width: int = 40) -> list[str]:
    return [line for part in text.split("\n\n") for line in textwrap.wrap(part, width)]


@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("width", [30, 40, 75])
def test_wrapped_lines_are_recognized(lower, width):
    texts = [LONG.format(colour) for colour in COLOURS]
    texts = [text.lower().replace("\n\n", " ") for text in texts] if lower else texts
    assert wrapped_fraction([wrapped(text, width) for text in texts]) > 0.9


@pytest.mark.parametrize(
    "several",
    [
        [["a red disc", "a red disc on white", "one disc that is red, seen close"]] * 4,
        [["A cat sits on a mat.", "The cat is asleep.", "A cat."]] * 4,
        [["A cat sits on a mat", "The cat is asleep", "A tabby"]] * 4,
        [[f"a {c} disc on white", f"a {c} disc on white seen close"] for c in COLOURS],
        [["\u4e00\u53ea\u732b\u5728\u7761\u89c9", "\u732b\u7761\u5728\u57ab\u5b50\u4e0a"]] * 4,
        [],
    ],
)
def test_several_captions_are_not_taken_for_wrapped_ones(several):
    assert wrapped_fraction(several) == 0


def folder(path: Path, texts: list[str], ending: str = "txt") -> Path:
    for i, text in enumerate(texts):
        (path / f"{i}.png").write_bytes(encoded((i, 0, 0)))
        (path / f"{i}.{ending}").write_text(text)
    return path


def texts_of(found: Diagnosis, level: str) -> list[str]:
    return [finding.text for finding in found.findings if finding.level == level]


def test_doctor_warns_of_wrapped_captions_and_joining_them_ends_it(tmp_path):
    folder(tmp_path, ["\n".join(wrapped(LONG.format(colour))) for colour in COLOURS])
    warned = "look like one caption that is wrapped; set data.caption_lines=joined"
    assert any(warned in text for text in texts_of(diagnose(config(tmp_path)), "warns"))
    joined = diagnose(config(tmp_path, caption_lines="joined"))
    assert not any(warned in text for text in texts_of(joined, "warns"))
    assert ("captions per image", "1") in joined.sources[0].understood


def test_doctor_names_caption_files_and_captions_per_image(tmp_path):
    folder(tmp_path, ["one\ntwo", "three", "four\nfive"], "caption")
    found = diagnose(config(tmp_path))
    assert found.sources[0].understood == [
        ("caption files", "3 .caption next to the images; each line is a caption"),
        ("captions per image", "1 to 2, mean 1.7"),
    ]
    assert "caption files" in as_table(found) and json.dumps(found.sources[0].understood)


def test_doctor_names_table_columns_and_delimiter(tmp_path):
    folder(tmp_path, ["x"] * 3)
    (tmp_path / "t.csv").write_text(
        "file_name;caption\n" + "".join(f"{i}.png;t{i}\n" for i in range(3))
    )
    assert diagnose(config(tmp_path / "t.csv")).sources[0].understood == [
        ("table", "t.csv, columns separated by semicolon"),
        ("image column", "file_name"),
        ("caption column", "caption"),
        ("captions per image", "1"),
    ]
    by_template = diagnose(config(tmp_path / "t.csv", caption_template="a {caption}"))
    assert ("caption template", "a {caption}") in by_template.sources[0].understood


def test_doctor_notes_lists_read_and_folded_names_and_warns_of_brackets(tmp_path):
    folder(tmp_path, ["x"] * 3)
    rows = [{"image": f"{i}.PNG", "text": "['a', 'b']" if i else "{'a': 1}"} for i in range(3)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = diagnose(config(tmp_path / "t.jsonl"))
    notes = texts_of(found, "notes")
    assert any("3 names found in another letter case or Unicode form" in text for text in notes)
    assert any("2 images whose caption is a list written as text" in text for text in notes)
    warned = "1 of 3 captions are in brackets, which are read as they are ({'a': 1})"
    assert any(warned in text for text in texts_of(found, "warns"))


def test_doctor_notes_tag_lists_that_do_not_vary(tmp_path):
    folder(tmp_path, [f"1girl, {c} hair, outdoors, smile, day" for c in COLOURS])
    noted = "6 of 6 captions look like lists of tags; data.tags can shuffle them"
    assert any(noted in text for text in texts_of(diagnose(config(tmp_path)), "notes"))


@pytest.mark.parametrize("streaming", [False, True])
def test_doctor_warns_of_wrapped_captions_in_shards_of_splits(tmp_path, streaming):
    for split in ("train", "val"):
        samples = [
            (f"{i}", {"png": encoded((i, 9, len(split))), "txt": "\n".join(wrapped(LONG)).encode()})
            for i in range(6)
        ]
        write_shard(tmp_path / f"{split}-0.tar", samples)
    found = diagnose(config(tmp_path, streaming=streaming))
    assert any("set data.caption_lines=joined" in text for text in texts_of(found, "warns"))
    assert not any(name == "caption column" for name, _ in found.sources[0].understood)
