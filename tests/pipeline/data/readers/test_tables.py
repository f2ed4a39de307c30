"""Files of rows: delimiters, lists of captions, JSON in several forms, COCO."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from pipeline.config.data import DataConfig
from pipeline.data.load import load_source, load_sources
from pipeline.data.readers.folder import folder_rows, table_rows
from pipeline.data.readers.tables import read_table
from tests.helpers.data import config, encoded


def captions(source: Path, **options: object) -> dict[str, list[str]]:
    """Name -> captions, over both splits."""
    found: dict[str, list[str]] = {}
    for split in load_sources(config(source, **options)):
        rows = range(len(split))
        found |= dict(zip(split.names(rows), split.all_captions(rows), strict=True))
    return found


@pytest.fixture
def images(tmp_path) -> Path:
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(encoded((ord(name), 0, 0)))
    return tmp_path


TWO = {"a.png": ["a cat, asleep"], "b.png": ['the "old" dog']}


def llava(caption: str) -> object:
    """A conversation as LLaVA has it, with a question after the caption."""
    asked = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": caption}]
    return {"id": "7", "conversations": [*asked, {"from": "human", "value": "Why?"}]}


def chat(caption: str) -> object:
    said = [("system", "Be brief."), ("user", "<image>"), ("assistant", caption)]
    return {"messages": [{"role": role, "content": text} for role, text in said]}


def raw(captions: list[str]) -> object:
    return [{"raw": caption, "tokens": caption.split()} for caption in captions]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", 'image,text\na.png,"a cat, asleep"\nb.png,"the ""old"" dog"\n'),
        ("t.csv", 'image;text\na.png;a cat, asleep\nb.png;the "old" dog\n'),
        ("t.csv", '"image";"text"\n"a.png";"a cat, asleep"\n"b.png";"the ""old"" dog"\n'),
        ("t.csv", 'image\ttext\na.png\ta cat, asleep\nb.png\tthe "old" dog\n'),
        ("t.csv", 'image|text\na.png|a cat, asleep\nb.png|the "old" dog\n'),
        ("t.csv", 'sep=;\nimage;text\na.png;a cat, asleep\nb.png;the "old" dog\n'),
        ("t.csv", 'image, text\na.png, "a cat, asleep"\nb.png, the "old" dog\n'),
        ("t.csv", '\ufeff\ufeffimage,text\na.png,"a cat, asleep"\nb.png,the "old" dog\n'),
        ("t.csv", 'a.png,"a cat, asleep"\nb.png,the "old" dog\n'),
        ("t.CSV", 'image;text, in English\na.png;a cat, asleep\nb.png;the "old" dog\n'),
        ("t.tsv", 'image\ttext\na.png\ta cat, asleep\nb.png\tthe "old" dog\n'),
        ("t.tsv", 'text\timage\n"a cat, asleep"\ta.png\n"the ""old"" dog"\tb.png\n'),
        ("t.txt", 'a.png,a cat, asleep\nb.png,the "old" dog\n'),
        ("t.txt", 'image,caption\na.png,a cat, asleep\r\nb.png,"the ""old"" dog"\r\n'),
        ("t.txt", 'a.png#0\ta cat, asleep\nb.png#0\tthe "old" dog\n'),
        ("t.txt", 'a.png|a cat, asleep\n\nb.png | the "old" dog\n'),
        ("t.txt", '\ufeffa.png\ta cat, asleep\nb.png\tthe "old" dog'),
        ("t.ndjson", "\n".join(json.dumps({"image": n, "caption": c[0]}) for n, c in TWO.items())),
        ("t.json", json.dumps([{"image": n, "caption": c[0]} for n, c in TWO.items()])),
        (
            "t.json",
            json.dumps({"info": {}, "data": [{"file_name": n, "text": c} for n, c in TWO.items()]}),
        ),
        ("t.json", json.dumps({n: c[0] for n, c in TWO.items()})),
        ("t.json", json.dumps(TWO)),
        ("t.json", json.dumps({n: {"caption": c[0], "tags": "x"} for n, c in TWO.items()})),
        ("t.json", "\n".join(json.dumps({"image": n, "text": c[0]}) for n, c in TWO.items())),
        ("t.json", json.dumps([{"image": [n], "caption": c[0]} for n, c in TWO.items()])),
        ("t.json", json.dumps([{"image": n, **llava(c[0])} for n, c in TWO.items()])),
        ("t.jsonl", "\n".join(json.dumps({"image": n, **chat(c[0])}) for n, c in TWO.items())),
        (
            "t.json",
            json.dumps({"images": [{"filename": n, "sentences": raw(c)} for n, c in TWO.items()]}),
        ),
    ],
)
def test_every_form_of_a_table_gives_the_same_captions(images, name, content):
    (images / name).write_text(content)
    column = {"text_column": "text, in English"} if "English" in content else {}
    assert captions(images / name, **column) == TWO


@pytest.mark.parametrize("written", ["/", "\\t"])
def test_the_delimiter_that_is_set_is_used(images, written):
    mark = {"\\t": "\t"}.get(written, written)
    (images / "t.csv").write_text(f"image{mark}text,all\na.png{mark}a cat, asleep\n")
    found = captions(images / "t.csv", delimiter=written, text_column="text,all")
    assert found == {"a.png": ["a cat, asleep"]}
    with pytest.raises(ValueError, match=r"data\.delimiter is ',,'; it must be one character"):
        config(images, delimiter=",,")


def test_a_header_with_several_possible_delimiters_is_refused(images):
    (images / "t.csv").write_text("photo_file|alt;text\na.png|x;y\n")
    message = (
        "may separate its columns by semicolon or bar (photo_file|alt;text); set data.delimiter"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        load_source(config(images / "t.csv"), "train")


def test_flickr30k_has_three_columns_and_several_captions(images):
    (images / "results.csv").write_text(
        "image_name| comment_number| comment\na.png| 0| a cat , asleep .\na.png| 1| a cat .\n"
    )
    found = captions(images / "results.csv", image_column="image_name", text_column="comment")
    assert found == {"a.png": ["a cat , asleep .", "a cat ."]}


@pytest.mark.parametrize("source", [".", "captions.txt"])
def test_flickr8k_is_read_as_it_is_unpacked(tmp_path, source):
    """captions.txt next to a folder Images; several captions of each image."""
    (tmp_path / "Images").mkdir()
    for name in ("a", "b"):
        (tmp_path / "Images" / f"{name}.jpg").write_bytes(encoded(form="JPEG"))
    lines = [f"{name}.jpg,{name} {k} , seen ." for name in "ab" for k in range(5)]
    (tmp_path / "captions.txt").write_text("\n".join(["image,caption", *lines]))
    assert captions(tmp_path / source) == {
        f"Images/{name}.jpg": [f"{name} {k} , seen ." for k in range(5)] for name in "ab"
    }


def test_the_text_file_of_an_image_named_captions_is_its_own(tmp_path):
    for name in ("captions", "b"):
        (tmp_path / f"{name}.png").write_bytes(encoded())
        (tmp_path / f"{name}.txt").write_text(f"of {name}")
    assert captions(tmp_path) == {"captions.png": ["of captions"], "b.png": ["of b"]}


def test_a_list_of_paths_has_images_and_no_captions(images):
    (images / "t.txt").write_text("a.png\nb.png\n")
    rows = table_rows(images / "t.txt", config(images / "t.txt"))
    assert [rows.label(row) for row in range(len(rows))] == ["a.png", "b.png"]
    assert rows.columns == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", "a.png,x\nb.png\n", "line 2 (b.png) has no comma between image, text; add it"),
        ("t.json", "[1, 2]", "holds no rows (list); accepted are a list of rows"),
        ("t.json", '{"x": 1}', "holds no rows (x); accepted are a list of rows"),
        ("t.json", '{"a": 1}\n{"a": 2', "line 2 is no JSON"),
        ("t.json", '{\n"a": 1}\n{"a": 2}', "is no JSON (Extra data"),
        ("t.json", "[" * 100_000, "is no JSON ("),
        ("t.json", "[]", "holds no rows (list)"),
        ("t.csv", "", "has no column 'image'; it has none"),
        ("t.csv", "x\na.png\n", "has no column 'image'; it has x"),
        ("t.csv", "a.png,red,x\n", "row 1 has more fields than its columns image, text"),
        ("t.json", '{"images": [{"id": 1}], "annotations": []}', "images[0] has no file_name"),
        (
            "t.json",
            '{"images": [{"id": 1, "file_name": "a.png"}], '
            '"annotations": [{"image_id": 1, "bbox": []}]}',
            "annotations[0] has no caption (image_id, bbox); give the file of captions",
        ),
    ],
)
def test_tables_that_cannot_be_read_say_why(images, name, content, message):
    (images / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_source(config(images / name), "train")


def coco(names: list[str], kind: type = int) -> str:
    """COCO captions, two of each image, and one of an image that is not listed."""
    listed = [{"id": kind(1000 + i), "file_name": name} for i, name in enumerate(names)]
    notes = [
        {"id": 10 * i + k, "image_id": 1000 + i, "caption": f"{i} seen {k}"}
        for k in range(2)
        for i in range(len(names) - 1)
    ]
    notes.append({"id": 999, "image_id": 7, "caption": "lost"})
    return json.dumps({"info": {}, "images": listed, "annotations": notes})


@pytest.mark.parametrize("kind", [int, str])
@pytest.mark.parametrize(
    ("file", "folder"),
    [("captions_val2017.json", "val2017"), ("annotations/captions_val2017.json", "val2017")],
)
def test_coco_captions_are_read_with_their_folder(tmp_path, file, folder, kind):
    (tmp_path / folder).mkdir()
    (tmp_path / file).parent.mkdir(exist_ok=True)
    names = [f"{i:012d}.jpg" for i in range(4)]
    for name in names:
        (tmp_path / folder / name).write_bytes(encoded(form="JPEG"))
    (tmp_path / file).write_text(coco(names, kind))
    found = captions(tmp_path / file)
    assert {Path(name).name: texts for name, texts in found.items()} == {
        name: [f"{i} seen 0", f"{i} seen 1"] for i, name in enumerate(names[:3])
    }
    last = os.path.relpath(tmp_path / folder / names[3], (tmp_path / file).parent)
    assert load_source(config(tmp_path / file), "train").problems == [
        "1 captions of images that are not there left out: the image with id 7",
        f"1 images that no caption names left out: {last}",
    ]


def test_karpathys_splits_are_taken_and_restval_is_trained_on(images):
    rows = [("a", "restval"), ("b", "val"), ("c", "test"), ("d", "train")]
    for name, _ in rows:
        (images / f"{name}.png").write_bytes(encoded((ord(name), 0, 0)))
    content = [
        {"filename": f"{name}.png", "split": split, "sentences": raw([f"of {name}"])}
        for name, split in rows
    ]
    (images / "dataset.json").write_text(json.dumps({"images": content, "dataset": "coco"}))
    train, held_out = load_sources(config(images / "dataset.json"))
    assert train.names(range(len(train))) == ["a.png", "d.png"]
    assert held_out.names(range(len(held_out))) == ["b.png"]


def test_a_conversation_without_an_answer_has_no_caption(images):
    turns = [{"from": "human", "value": "Describe it."}]
    rows = [{"image": "a.png", **llava("a cat")}, {"image": "b.png", "conversations": turns}]
    (images / "t.json").write_text(json.dumps(rows))
    assert captions(images / "t.json") == {"a.png": ["a cat"]}


def test_coco_without_its_images_says_where_they_were_looked_for(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "captions_val2017.json").write_text(coco(["1.jpg", "2.jpg"]))
    message = (
        f"names 1.jpg, 2.jpg, ..., and none is in {tmp_path}, {tmp_path}/other; put the images"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        load_source(config(tmp_path / "captions_val2017.json"), "train")


def test_rows_say_what_was_understood(images):
    (images / "t.tsv").write_text("image\ttext\na.png\tx\n")
    assert table_rows(images / "t.tsv", config(images / "t.tsv")).facts == [
        ("table", "t.tsv, columns separated by tab"),
        ("image column", "image"),
    ]
    (images / "a.CAPTION").write_text("x")
    assert folder_rows(images, DataConfig(source=str(images))).facts == [
        ("caption files", "1 .caption next to the images; each line is a caption")
    ]
    assert read_table(images / "t.tsv").columns == ["image", "text"]


def test_the_first_answer_of_a_conversation_is_the_caption(tmp_path):
    """As in the data of LLaVA; a conversation without an answer has no caption."""
    rows = [
        {
            "id": f"{i}",
            "image": f"{i}.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?"},
                *([{"from": "gpt", "value": f"shade {i}"}] if i else []),
                {"from": "human", "value": "Is it large?"},
            ],
        }
        for i in range(12)
    ]
    for i in range(12):
        (tmp_path / f"{i}.png").write_bytes(encoded((i, 0, 0)))
    (tmp_path / "chat.json").write_text(json.dumps(rows))
    sources = load_sources(config(tmp_path / "chat.json"))
    found = [text for one in sources for text in one.captions(range(len(one)))]
    assert sorted(found) == sorted(f"shade {i}" for i in range(1, 12))


@pytest.mark.parametrize("name", ["t.txt", "t.csv"])
@pytest.mark.parametrize(("written", "mark"), [("^", "^"), (r"\t", "\t")])
def test_a_list_of_captions_may_have_any_delimiter(images, name, written, mark):
    """Also where the names have commas, and without a header line."""
    names = ["a.png", "b,1.png"]
    (images / "b.png").rename(images / names[1])
    (images / name).write_text("".join(f"{one}{mark}of {one}\n" for one in names))
    assert captions(images / name, delimiter=written) == {one: [f"of {one}"] for one in names}


def test_a_list_of_paths_with_commas_is_one_where_another_delimiter_is_set(images):
    (images / "b.png").rename(images / "a, b.png")
    (images / "t.txt").write_text("gone, b.png\na, b.png\n")
    sources = load_sources(config(images / "t.txt", delimiter="^"), require_captions=False)
    assert [name for one in sources for name in one.names(range(len(one)))] == ["a, b.png"]
