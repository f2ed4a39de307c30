"""What is written of an image -> its captions: missing cells, written lists, lines, byte-order
marks."""

from __future__ import annotations

import json

import pytest

from pipeline.data.load import load_source, load_sources
from pipeline.data.readers.captions import LISTS, MISSING, NO_TEXT, CaptionReader, lines_of
from pipeline.data.streaming.source import StreamSource
from tests.helpers.data import config, encoded, write_shard


def reader(**options: object) -> CaptionReader:
    return CaptionReader("x", ["text", "colour"], config("x", **options))


@pytest.mark.parametrize(
    "cell", [float("nan"), "nan", "NaN", "null", "NULL", "None", "<NA>", "N/A", " nan ", b"nan"]
)
def test_a_cell_that_stands_for_none_is_missing(cell):
    assert reader().of([{"text": cell}]).texts == []
    assert reader().of([{"text": cell}]).reasons == [MISSING]
    by_template = reader(caption_template="a {colour} {text}")
    assert by_template.of([{"text": "cat", "colour": cell}]).reasons == [MISSING]
    both = reader().of([{"text": cell}, {"text": "a cat"}])
    assert both.texts == ["a cat"] and both.reasons == []


@pytest.mark.parametrize("cell", [None, "", " ", [], "\ufeff"])
def test_an_empty_cell_is_no_caption(cell):
    assert reader().of([{"text": cell}]).reasons == [NO_TEXT]


@pytest.mark.parametrize(
    "cell", ["none", "nancy", "a null", "null and void", 3, 2.5, ["None"], [b"nan"]]
)
def test_other_cells_are_captions(cell):
    """Items of a list are lines of a text file, or names of classes."""
    assert len(reader().of([{"text": cell}]).texts) == 1


def test_a_written_list_is_several_captions():
    found = reader().of([{"text": "['a cat', 'a tabby']"}])
    assert found.texts == ["a cat", "a tabby"] and found.reasons == [LISTS]
    for empty in ("[]", "[None]", "[nan]"):
        assert reader().of([{"text": empty}]).reasons == [MISSING]


@pytest.mark.parametrize(
    "cell", ["\ufeffa cat", b"\xef\xbb\xbfa cat", ["\ufeffa cat"], "\ufeff a cat\ufeff"]
)
def test_byte_order_marks_are_dropped(cell):
    assert reader().of([{"text": cell}]).texts == ["a cat"]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("each", ["a cat on", "a mat", "alone"]),
        ("joined", ["a cat on a mat alone"]),
        ("first", ["a cat on"]),
    ],
)
def test_lines_become_captions_as_set(how, expected):
    text = "\n a cat on \r\na mat\n\nalone\n"
    assert lines_of(text, how) == expected
    assert lines_of(text.encode(), how) == [line.encode() for line in expected]
    assert lines_of("", how) == lines_of(" \n", how) == []


@pytest.mark.parametrize("layout", ["folder", "shards", "streamed"])
def test_caption_lines_holds_for_every_layout_of_text_files(tmp_path, layout, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    text = b"a cat on\na mat\n"
    options = {"caption_lines": "joined", "val_fraction": 0.01}
    if layout == "folder":
        (tmp_path / "a.png").write_bytes(encoded())
        (tmp_path / "a.txt").write_bytes(text)
    else:
        write_shard(tmp_path / "0.tar", [("a", {"png": encoded(), "txt": text})])
    if layout == "streamed":
        stream = StreamSource(config(tmp_path / "0.tar", streaming=True, **options))
        found = [sample.captions for sample in stream.samples(0)]
    else:
        source = load_source(config(tmp_path, **options), "train")
        found = source.all_captions(range(len(source)))
    assert found == [["a cat on a mat"]]


@pytest.mark.parametrize("column", ["caption", "captions", "txt"])
def test_the_usual_columns_are_found_where_there_is_no_text(column):
    assert CaptionReader("x", ["colour", column], config("x")).columns == [column]
    assert CaptionReader("x", [column, "text"], config("x")).columns == ["text"]


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet", "streamed"])
def test_missing_cells_of_any_table_are_left_out_and_counted(tmp_path, form, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    texts = ["one", "nan", "NULL", "two"]
    names = [f"{i}.png" for i in range(4)]
    for name in names:
        (tmp_path / name).write_bytes(encoded())
    rows = list(zip(names, texts, strict=True))
    table = tmp_path / f"t.{'parquet' if form == 'streamed' else form}"
    if form == "jsonl":
        cells = [{"image": n, "text": float("nan") if t == "nan" else t} for n, t in rows]
        table.write_text("\n".join(map(json.dumps, cells)))
    elif form == "csv":
        table.write_text("image,text\n" + "".join(f"{n},{t}\n" for n, t in rows))
    else:
        pq.write_table(pa.table({"image": names, "text": texts}), table)
    sources = load_sources(config(table, streaming=form == "streamed"))
    if form == "streamed":
        found = [sample.captions for sample in sources[0].first(9)]
    else:
        found = [c for s in sources for c in s.all_captions(range(len(s)))]
        assert [line for line in sources[0].problems if line.startswith(f"2 {MISSING}: ")]
    assert sorted(found) == [["one"], ["two"]]


def test_a_class_or_a_text_file_that_says_none_is_a_caption(tmp_path):
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["None", "cat"])}
    )
    rows = {
        "image": [{"bytes": encoded((i, 0, 0)), "path": None} for i in range(2)],
        "label": [0, 1],
    }
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "classes" / "None").mkdir(parents=True)
    (tmp_path / "classes" / "None" / "1.png").write_bytes(encoded())
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "1.png").write_bytes(encoded())
    (tmp_path / "beside" / "1.txt").write_text("None")
    for source, options, expected in (
        ("saved", {"text_column": "label"}, ["None", "cat"]),
        ("classes", {"caption_template": "{folder}"}, ["None"]),
        ("beside", {}, ["None"]),
    ):
        sources = load_sources(config(tmp_path / source, **options))
        assert sorted(c for s in sources for c in s.captions(range(len(s)))) == expected
