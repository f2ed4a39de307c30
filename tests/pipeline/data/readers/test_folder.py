"""Folders: the text files next to images, and what an error says lies there."""

from __future__ import annotations

import json
import re
import unicodedata

import pytest

from pipeline.config.data import DataConfig
from pipeline.data.load import load_source, load_sources
from pipeline.data.readers.folder import NO_CAPTION, folder_rows
from pipeline.data.readers.paths import FOLDED
from tests.helpers.data import config, encoded


def test_caption_files_beside_images_are_read_in_folders_of_repeats(tmp_path):
    """As kohya's trainers have them: 10_name/NAME.caption, elsewhere NAME.txt."""
    for folder, ending in (("10_toys", "caption"), ("2_more", "txt")):
        (tmp_path / folder).mkdir()
        for i in range(3):
            (tmp_path / folder / f"{i}.png").write_bytes(encoded((i, 0, 0)))
            (tmp_path / folder / f"{i}.{ending}").write_text(f"{folder} {i}, tag\n")
    found = [c for s in load_sources(config(tmp_path)) for c in s.captions(range(len(s)))]
    assert sorted(found) == sorted(f"{f} {i}, tag" for f in ("10_toys", "2_more") for i in range(3))


@pytest.mark.parametrize(
    ("image", "text"),
    [
        ("a.png", "a.TXT"),
        ("a.PNG", "A.caption"),
        ("a.png", "a.Caption"),
        (unicodedata.normalize("NFD", "gr\u00fcn.png"), "gr\u00fcn.txt"),
    ],
)
def test_a_text_file_is_found_in_another_case_or_form(tmp_path, image, text):
    (tmp_path / image).write_bytes(encoded())
    (tmp_path / text).write_text("a cat")
    rows = folder_rows(tmp_path, DataConfig(source=str(tmp_path)))
    assert [record["text"] for records in rows.records(["text"]) for record in records] == [
        ["a cat"]
    ]
    assert rows.tally.counts() == {FOLDED: 1}


def test_links_to_folders_are_counted_or_named_by_the_error(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    source = tmp_path / "source"
    for folder in (elsewhere, source):
        folder.mkdir()
    (elsewhere / "a.png").write_bytes(encoded())
    (source / "images").symlink_to(elsewhere)
    with pytest.raises(ValueError, match=r"links to folders, which are not followed \(images\)"):
        load_source(config(source), "train")
    for name in ("b", "c"):
        (source / f"{name}.png").write_bytes(encoded())
        (source / f"{name}.txt").write_text(name)
    rows = folder_rows(source, DataConfig(source=str(source)))
    assert any("1 links to folders not followed" in line for line in rows.tally.lines())


def test_txt_comes_before_caption(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded())
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "a.caption").write_text("second")
    rows = folder_rows(tmp_path, DataConfig(source=str(tmp_path)))
    assert [record["text"] for records in rows.records(["text"]) for record in records] == [
        ["first"]
    ]


def test_an_error_of_no_captions_names_the_text_files_there(tmp_path):
    (tmp_path / "sub").mkdir()
    for i in range(3):
        (tmp_path / "sub" / f"{i}.png").write_bytes(encoded())
        (tmp_path / "sub" / f"{i}.json").write_text("{}")
    (tmp_path / "Flickr8k.token.csv").write_text("x")
    (tmp_path / "notes.md").write_text("x")
    message = (
        "holds 3 images and no captions; other files there: 3 .json (sub/0.json, ...), 1 .csv "
        "(Flickr8k.token.csv); accepted are"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        load_source(config(tmp_path), "train")


@pytest.mark.parametrize(
    "name", ["METADATA.csv", "metadata.tsv", "metadata.json", "Metadata.JSONL"]
)
def test_metadata_is_found_in_every_form_and_case(tmp_path, name):
    (tmp_path / "a.png").write_bytes(encoded())
    rows = {
        "csv": "file_name,text\na.png,a cat\n",
        "tsv": "file_name\ttext\na.png\ta cat\n",
        "json": '[{"file_name": "a.png", "text": "a cat"}]',
        "jsonl": '{"file_name": "a.png", "text": "a cat"}',
    }
    (tmp_path / name).write_text(rows[name.lower().rpartition(".")[2]])
    found = [c for s in load_sources(config(tmp_path)) for c in s.captions(range(len(s)))]
    assert found == ["a cat"]


def test_metadata_in_json_may_be_captions_by_name(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded())
    (tmp_path / "metadata.json").write_text('{"a.png": "a cat"}')
    assert [
        r for r in folder_rows(tmp_path, DataConfig(source=str(tmp_path))).records(["text"])
    ] == [[{"folder": [""], "name": ["a"], "text": "a cat"}]]


def test_the_json_file_next_to_an_image_has_its_caption(tmp_path):
    """Under one of the usual keys; a text file comes first, and other JSON says nothing."""
    contents = [{"caption": "a"}, {"prompt": "b", "seed": 3}, {"captions": ["c", "d"]}, {"x": 1}, 5]
    for i, content in enumerate(contents):
        (tmp_path / f"{i}.png").write_bytes(encoded((i, 0, 0)))
        (tmp_path / f"{i}.json").write_text(json.dumps(content))
    (tmp_path / "5.png").write_bytes(encoded((5, 0, 0)))
    (tmp_path / "5.json").write_text("{")
    (tmp_path / "0.txt").write_text("first")
    rows = folder_rows(tmp_path, config(tmp_path))
    found = [record["text"] for (record,) in rows.records(["text"])]
    assert found == [["first"], ["b"], ["c", "d"]]
    assert rows.tally.count(NO_CAPTION) == 3


@pytest.mark.parametrize(
    ("options", "expected", "count"),
    [
        ({"text_column": "title"}, "title {}", 3),
        ({"caption_template": "{colour} {folder}: {title}"}, "red own: title {}", 3),
        ({"caption_template": "{folder} {name}"}, "own {}", 4),
    ],
)
def test_a_list_of_captions_in_a_folder_has_columns(tmp_path, options, expected, count):
    """Those that the settings name, and those of the path; paths alone need no list."""
    (tmp_path / "own").mkdir()
    rows = []
    for i in range(4):
        (tmp_path / "own" / f"{i}.png").write_bytes(encoded((i, 0, 0)))
        rows += [f"own/{i}.png,title {i},red\n"] if i < 3 else []
    (tmp_path / "captions.csv").write_text("image,title,colour\n" + "".join(rows))
    sources = load_sources(config(tmp_path, **options))
    found = sorted(c for one in sources for c in one.captions(range(len(one))))
    assert found == [expected.format(i) for i in range(count)]
    left_out = [f"1 {NO_CAPTION}: own/3.png"] if count == 3 else []
    assert sources[0].problems == left_out


def test_columns_that_a_list_of_captions_lacks_are_named(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded())
    (tmp_path / "captions.csv").write_text("image,title\na.png,x\n")
    message = "no column 'titel'; it has folder, name, title; did you mean 'title'?"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_source(config(tmp_path, text_column="titel"), "train")
    message = "no column 'img'; it has image, title"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_source(config(tmp_path, image_column="img"), "train")
