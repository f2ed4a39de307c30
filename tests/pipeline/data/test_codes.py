"""The codes dataset as files: reading back what was written, corruption, sampling of captions."""

from __future__ import annotations

import json
import re
import tarfile
from functools import reduce
from operator import getitem
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.codes import dataset, shards
from pipeline.data.codes.dataset import (
    FORMAT,
    CodesDataset,
    mark_shard_done,
    planned_files,
    recorded_shard,
    write_manifest,
)
from pipeline.data.codes.export import export_codes
from pipeline.data.codes.shards import EncodedRows, write_shard

MADE_BY: dict = {
    "format": FORMAT,
    "tokenizer": "a",
    "sources": {"train": "b", "held_out": "c"},
    "bf16": False,
    "settings": {"data": {}},
}
"""What a manifest says of how its codes were made."""


def write(
    folder: Path,
    codes: np.ndarray,
    captions: list[list[str]],
    *,
    each: int = 5,
    views: int = 1,
    num_codes: int = 16,
) -> Path:
    """A whole folder of training rows with codes (rows, N), in blocks of three."""
    levels = [{"grid": [1, codes.shape[1] // views], "num_codes": num_codes}]
    plan: dict = {
        **MADE_BY,
        "levels": levels,
        "augmentations_per_image": views,
        "images_per_shard": each,
        "weights": [1.0],
    }
    plan["parts"] = {"train": [{"first": 0, "rows": len(codes)}]}
    folder.mkdir()
    kind, written = shards.kind_of(levels), []
    for name, unit in planned_files(plan)["train"].items():
        part = unit.rows
        starts = range(part.start, part.stop, 3)
        blocks = (
            EncodedRows(
                codes[i : min(i + 3, part.stop)],
                captions[i : min(i + 3, part.stop)],
                range(100 + i, 100 + min(i + 3, part.stop)),
                [f"{k}.png" for k in range(i, min(i + 3, part.stop))],
            )
            for i in starts
        )
        mark_shard_done(folder, write_shard(folder / name, blocks, codes=codes.shape[1], kind=kind))
        written.append(recorded_shard(folder, name))
    write_manifest(folder, plan, {"train": [shard for shard in written if shard]})
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    """Twelve rows in three files, of one to three captions."""
    captions = [[f"first {i}", f"second {i}", f"third {i}"][: 1 + i % 3] for i in range(12)]
    return write(tmp_path / "codes", np.arange(48).reshape(12, 4) % 16, captions)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_written_codes_are_read_back(tmp_path_factory, data):
    rows, each, views, width = (data.draw(st.integers(1, most)) for most in (20, 8, 3, 4))
    captions = data.draw(
        st.lists(
            st.lists(st.text(max_size=9), min_size=1, max_size=3), min_size=rows, max_size=rows
        )
    )
    codes = np.random.default_rng(data.draw(st.integers(0, 9))).integers(
        0, 2**16, (rows, views * width)
    )
    folder = tmp_path_factory.mktemp("property") / "codes"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "_BATCH", data.draw(st.integers(1, 6)))
        patch.setattr(dataset, "_OPEN", data.draw(st.integers(1, 3)))
        patch.setattr(dataset, "_READ", data.draw(st.integers(1, 5)))
        read = CodesDataset(
            write(folder, codes, captions, each=each, views=views, num_codes=2**16), "train"
        )
        order = data.draw(st.permutations(range(rows)))
        assert len(read) == rows and len(list(folder.iterdir())) == 1 + -(-rows // each)
        assert read.all_captions(order) == [captions[i] for i in order]
        assert read.captions(order) == [captions[i][0] for i in order]
        assert read.source_rows(order) == [100 + i for i in order]
        assert read.names(order) == [f"{i}.png" for i in order]
        assert read.captions_in_all == sum(map(len, captions))
        for view in range(views):
            seen = read.codes(order, [view] * rows)
            assert seen.dtype == np.int64 and np.array_equal(
                seen, codes[order, view * width : (view + 1) * width]
            )
        assert np.array_equal(read.codes(order), read.codes(order, [0] * rows))
        assert len(read._opened) <= dataset._OPEN


def test_datasets_library_reads_the_files(folder):
    from datasets import Dataset

    read = Dataset.from_file(str(folder / "train-00001-of-00003.arrow"))
    assert (
        read[0]
        == {
            "codes": [4, 5, 6, 7],
            "text": "first 5",
            "more_texts": ["second 5", "third 5"],
            "row": 105,
            "name": "5.png",
        }
        and len(read) == 5
    )
    assert read.features["codes"].feature.dtype == "uint16"


@pytest.mark.parametrize(("num_codes", "kind"), [(2**16, "uint16"), (2**16 + 1, "int32")])
def test_codes_have_the_fewest_bits_that_hold_them(tmp_path, num_codes, kind):
    codes = np.array([[0, num_codes - 1]])
    folder = write(tmp_path / "codes", codes, [["a"]], num_codes=num_codes)
    assert (
        next(shards.read_batches(folder / "train-00000-of-00001.arrow"))
        .schema.field("codes")
        .type.value_type
        == kind
    )
    assert np.array_equal(CodesDataset(folder, "train").codes([0]), codes)


def test_captions_of_one_image_are_equally_likely(folder):
    read = CodesDataset(folder, "train")
    drawn = read.captions([2] * 300, np.random.default_rng(0).random(300).tolist())
    assert {text: round(drawn.count(text) / 100) for text in set(drawn)} == {
        "first 2": 1,
        "second 2": 1,
        "third 2": 1,
    }
    assert read.captions([2, 2, 2, 0], [0.0, 0.34, 0.999, 0.999]) == [
        "first 2",
        "second 2",
        "third 2",
        "first 0",
    ]


def changed(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "is missing": Path.unlink,
    "is truncated or corrupted: it has 100 bytes and was written with": lambda file: (
        file.write_bytes(file.read_bytes()[:100])
    ),
    "is corrupted: its content is not what was written": changed,
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_file_is_named_on_opening(folder, message):
    file = folder / "train-00001-of-00003.arrow"
    DAMAGE[message](file)
    with pytest.raises(
        ValueError,
        match=f"{file} {message}.*run `minidalle encode` again, which rebuilds just that file",
    ):
        CodesDataset(folder, "train")


def test_large_folders_are_checked_by_file_size_only(folder, monkeypatch):
    monkeypatch.setattr(dataset, "HASHED_BYTES", 100)
    changed(folder / "train-00001-of-00003.arrow")
    assert len(CodesDataset(folder, "train")) == 12
    (folder / "train-00002-of-00003.arrow").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"train-00002-of-00003\.arrow is truncated or corrupted: it has 0 bytes"
    ):
        CodesDataset(folder, "train")


@pytest.mark.parametrize("content", [b"", b"\xff\xff\xff\xff\x10\0\0\0no arrow here at all"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, content):
    file = tmp_path / "train-00000-of-00001.arrow"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file} cannot be read .*; move it away and run"):
        shards.OpenShard(file)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (0, "an earlier version .format 0; this one reads 1."),
        (3, "a later version .format 3"),
        ("x", "an earlier version .format x"),
    ],
)
def test_other_formats_are_refused(folder, made, message):
    manifest = json.loads((folder / "codes.json").read_text())
    (folder / "codes.json").write_text(json.dumps({**manifest, "format": made}))
    with pytest.raises(
        ValueError,
        match=f"the codes in {folder} were written by {message}.*move that folder away and run",
    ):
        CodesDataset(folder, "train")


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "{}"])
def test_corrupted_manifest_is_no_complete_dataset(folder, content):
    (folder / "codes.json").write_text(content)
    with pytest.raises(
        ValueError,
        match=r"codes\.json is truncated or corrupted .*move .* away and run `minidalle encode`",
    ):
        CodesDataset(folder, "train")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("files", 1.5, "files is 1.5"),
        ("files.train", None, "files.train is None"),
        ("files.train.0.rows", {}, r"files\.train\.0\.rows is \{\}"),
        ("files.train.0.bytes", -1, r"files\.train\.0\.bytes is -1"),
        ("parts.train", 3, "parts.train is 3"),
        ("parts.train.0", {"rows": 12}, "parts.train lack rows"),
        ("parts.train.0.rows", 2**62, "files.train are 3 in place of 9"),
        ("parts.train.0.first", 1e308, r"parts\.train\.0\.first is 1e\+308"),
        ("images_per_shard", 0, "division by zero"),
        ("weights.0", float("nan"), "weights.0 is nan"),
        ("settings.data.mix", 0, "settings.data.mix is 0"),
        ("tokenizer", None, "tokenizer is None"),
    ],
)
def test_a_manifest_with_values_of_another_type_is_refused(folder, place, value, message):
    path = folder / "codes.json"
    manifest = json.loads(path.read_text())
    keys = [int(key) if key.isdigit() else key for key in place.split(".")]
    reduce(getitem, keys[:-1], manifest)[keys[-1]] = value
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=f"{message}.*move .* away and run `minidalle encode`"):
        CodesDataset(folder, "train")


def one_file(folder, *names: str, captions=(), drop: str | None = None):
    """A codes dataset of these images, all in one file; `drop` removes one of its columns."""
    plan = {
        **MADE_BY,
        "levels": [{"grid": [2, 2], "num_codes": 16}],
        "images_per_shard": 100,
        "augmentations_per_image": 1,
        "weights": [1.0],
        "parts": {"train": [{"first": 0, "rows": len(names)}]},
    }
    folder.mkdir()
    codes = np.arange(4 * len(names)).reshape(len(names), 4) % 16
    rows = EncodedRows(codes, captions or [["a"]] * len(names), range(len(names)), names)
    (name,) = planned_files(plan)["train"]
    shard = write_shard(folder / name, [rows], codes=4, kind="uint16")
    if drop is not None:
        batches = [batch.drop_columns([drop]) for batch in shards.read_batches(folder / name)]
        with (
            pa.OSFile(str(folder / name), "wb") as sink,
            pa.ipc.new_stream(sink, batches[0].schema) as writer,
        ):
            for batch in batches:
                writer.write_batch(batch)
        shard = shards.described(folder / name, rows=shard.rows, captions=shard.captions)
    write_manifest(folder, plan, {"train": [shard]})
    return folder


def test_images_without_captions_are_kept_and_not_counted(tmp_path):
    codes = one_file(tmp_path / "c", "a.png", "b.png", captions=[[], ["one", "two"]])
    read = CodesDataset(codes, "train")
    assert read.captions([0, 1]) == ["", "one"]
    assert read.all_captions([0, 1]) == [[], ["one", "two"]]
    assert read.captions_in_all == 2 and len(read) == 2


def test_files_without_names_are_still_read(tmp_path):
    read = CodesDataset(one_file(tmp_path / "c", "a.png", "b.png", drop="name"), "train")
    assert read.names([1]) == ["row 1"] and read.captions([1]) == ["a"]


def test_tar_keys_are_unique_names_without_endings(tmp_path):
    names = (
        "cats/1.png",
        "cats/1.jpg",
        "v1.2/big.cat.png",
        "/abs/../x.png",
        "grün 100%.png",
        "row 7",
    )
    codes = one_file(tmp_path / "c", *names, captions=[["a"]] * 5 + [[]])
    export_codes(codes, tmp_path / "out", "webdataset")
    samples: dict[str, dict[str, bytes]] = {}
    (shard,) = (tmp_path / "out").glob("*.tar")
    with tarfile.open(shard) as tar:
        for member in tar:
            folder, _, base = member.name.rpartition("/")  # as webdataset groups members
            key, _, ending = base.partition(".")
            samples.setdefault(f"{folder}/{key}".lstrip("/"), {})[ending] = tar.extractfile(
                member
            ).read()  # type: ignore[union-attr]
    keys = ["cats/1", "cats%2F1%2Ejpg", "v1%2E2/big%2Ecat", "%2Fabs/%2E%2E/x", "grün 100%25"]
    assert list(samples) == [*keys, "row 7"]
    assert [json.loads(one["json"])["name"] for one in samples.values()] == list(names)
    assert ["txt" in one for one in samples.values()] == [True] * 5 + [False]


def test_parquet_rows_carry_names_and_no_number_counted_after_filtering(tmp_path):
    codes = one_file(tmp_path / "c", "a.png", "b.png", captions=[["one"], []])
    export_codes(codes, tmp_path / "out", "parquet")
    (file,) = (tmp_path / "out").glob("*.parquet")
    table = pq.read_table(file).to_pydict()
    assert set(table) == {"codes", "text", "more_texts", "name"}
    assert table["name"] == ["a.png", "b.png"] and table["text"] == ["one", None]


def test_documented_join_finds_every_image(tmp_path, monkeypatch):
    text = (Path(__file__).parents[3] / "docs" / "reuse.md").read_text()
    (example,) = re.findall(r"```py\n(.*?)```", text, re.DOTALL)
    codes = one_file(tmp_path / "c", "a.png", "sub/b.png", "c.png")
    export_codes(codes, tmp_path / "codes", "parquet")
    (tmp_path / "table.csv").write_text("file_name,price\nc.png,3\nbroken.png,4\nsub/b.png,2\n")
    monkeypatch.chdir(tmp_path)
    left: dict = {}
    exec(example, left)
    found = [(row["price"], codes) for row, codes in left["joined"]]
    assert found == [("3", [8, 9, 10, 11]), ("2", [4, 5, 6, 7])]
    assert left["missing"] == ["broken.png"]


def test_failed_write_keeps_the_previous_file(folder):
    file = folder / "train-00000-of-00003.arrow"
    before = file.read_bytes()

    def blocks():
        yield EncodedRows(np.zeros((3, 4), int), [["a"]] * 3, range(3), ["a", "b", "c"])
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        write_shard(file, blocks(), codes=4, kind="uint16")
    assert file.read_bytes() == before and not list(folder.glob(".*"))


def test_missing_rows_are_an_error(folder):
    read = CodesDataset(folder, "train")
    for index in (-1, 12):
        with pytest.raises(IndexError, match=f"row {index} of 12"):
            read.captions([index])
