"""Rows that are easily lost, doubled, or read as something else: none is, without a word."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from pipeline.config.data import DataConfig, MixPart
from pipeline.data.codes.export import _Keys, _write_tar
from pipeline.data.load import find_rows, load_sources
from pipeline.data.readers.base import BAD_CAPTION
from pipeline.data.readers.images import header, upright_size
from pipeline.data.readers.splits import COPIES
from tests.helpers.data import config, encoded, write_shards


def colour(number: int) -> tuple[int, int, int]:
    return (number // 256, number % 256, 7)


def write_images(folder: Path, numbers: range) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / f"{number}.png").write_bytes(encoded(colour(number)))
        (folder / f"{number}.txt").write_text(f"image {number}")
    return folder


def captions(source) -> list[str]:
    return sorted(source.captions(range(source.num_images)))


def datasets_of(folder: Path, splits: dict[str, range], column: bool = False) -> Path:
    datasets = pytest.importorskip("datasets")
    write_images(folder / "files", range(60))
    rows = {}
    for name, numbers in splits.items():
        values = {
            "image": [str(folder / "files" / f"{i}.png") for i in numbers],
            "text": [f"{name} {i}" for i in numbers],
        }
        if column:
            values["fold"] = ["validation" if i % 5 == 0 else "train" for i in numbers]
        rows[name] = datasets.Dataset.from_dict(values)
    datasets.DatasetDict(rows).save_to_disk(str(folder / "saved"))
    return folder / "saved"


@pytest.mark.parametrize("streaming", [False, True])
def test_data_sets_of_one_split_are_joined(tmp_path, streaming):
    saved = datasets_of(tmp_path, {"part_a": range(10), "part_b": range(10, 20)})
    train, held_out = load_sources(config(saved, streaming=streaming))
    count = len(held_out) + (
        sum(1 for s in range(train.num_shards) for _ in train.samples(s))
        if streaming
        else len(train)
    )
    assert count == 20


def test_data_sets_that_are_not_read_are_named(tmp_path):
    saved = datasets_of(tmp_path, {"train": range(10), "extra": range(10, 20)})
    train, held_out = load_sources(config(saved))
    assert len(train) + len(held_out) == 10
    assert any("train is read, and not extra" in line for line in train.problems)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_says_the_split_and_not_the_name_of_the_data_set(tmp_path, streaming):
    parts = {"train": range(20), "validation": range(20, 40)}
    saved = datasets_of(tmp_path, parts, column=True)
    _, held_out = load_sources(config(saved, split_column="fold", streaming=streaming))
    expected = [f"{'train' if i < 20 else 'validation'} {i}" for i in range(0, 40, 5)]
    assert captions(held_out) == sorted(expected)


def test_a_column_says_the_split_and_not_the_name_of_the_file(tmp_path):
    datasets = pytest.importorskip("datasets")
    write_images(tmp_path / "files", range(40))
    (tmp_path / "rows [v1]").mkdir()
    for name, numbers in (("train-0", range(20)), ("test-0", range(20, 40))):
        datasets.Dataset.from_dict(
            {
                "image": [str(tmp_path / "files" / f"{i}.png") for i in numbers],
                "text": [f"image {i}" for i in numbers],
                "fold": ["validation" if i % 5 == 0 else "train" for i in numbers],
            }
        ).to_parquet(str(tmp_path / "rows [v1]" / f"{name}.parquet"))
    train, held_out = load_sources(config(tmp_path / "rows [v1]", split_column="fold"))
    assert len(train) == 32
    assert captions(held_out) == sorted(f"image {i}" for i in range(0, 40, 5))


def test_a_change_of_files_that_a_parquet_file_names_is_seen(tmp_path):
    pandas = pytest.importorskip("pandas")
    images = write_images(tmp_path / "files", range(12))
    paths = [str(images / f"{i}.png") for i in range(12)]
    frame = pandas.DataFrame({"image": paths, "text": [f"image {i}" for i in range(12)]})
    for kind in ("string", "large_string"):
        schema = pyarrow.schema([("image", getattr(pyarrow, kind)()), ("text", pyarrow.string())])
        path = tmp_path / f"{kind}.parquet"
        parquet.write_table(pyarrow.Table.from_pandas(frame, schema=schema), path)
        before = find_rows(config(path)).stamp
        (images / "3.png").write_bytes(encoded((9, 9, 9)))
        os.utime(images / "3.png", (1, 1))
        assert find_rows(config(path)).stamp != before
        (images / "3.png").write_bytes(encoded(colour(3)))


def test_a_stream_of_few_images_holds_one_out(tmp_path):
    """The hash of names alone would choose none."""
    write_shards(tmp_path, [6])
    options = config(tmp_path, streaming=True, val_fraction=1e-9)
    train, held_out = load_sources(options)
    seen = [sample.name for sample in train.samples(0)]
    assert len(held_out) == 1 and len(seen) == 5
    again, _ = load_sources(options)
    assert [sample.name for sample in again.samples(0)] == seen


@pytest.mark.parametrize("streaming", [False, True])
def test_what_one_part_of_a_mixture_holds_out_is_not_trained_on_in_another(tmp_path, streaming):
    for split, numbers in (("train", range(20)), ("val", range(20, 26))):
        write_images(tmp_path / "a" / split, numbers)
    write_images(tmp_path / "b", range(15, 40))
    parts = [MixPart(source=str(tmp_path / name)) for name in ("a", "b")]
    train, held_out = load_sources(DataConfig(mix=parts, image_size=16, val_fraction=0.1))
    trained = set(captions(train))
    assert not trained & {f"image {i}" for i in range(20, 26)}
    assert {f"image {i}" for i in range(15)} <= trained
    assert any(COPIES in line for line in train.problems)
    assert not trained & set(captions(held_out))


def test_columns_of_one_name_are_several_captions(tmp_path):
    write_images(tmp_path, range(4))
    for file in tmp_path.glob("*.txt"):
        file.unlink()
    rows = "0.png,a cat,\n1.png,a dog,a hound\n2.png,,a bird\n3.png,a cow,\n"
    (tmp_path / "metadata.csv").write_text(f"file_name,text,text\n{rows},,\n")
    train, held_out = load_sources(config(tmp_path))
    both = [*train.all_captions(range(len(train))), *held_out.all_captions(range(len(held_out)))]
    assert sorted(both) == [["a bird"], ["a cat"], ["a cow"], ["a dog", "a hound"]]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32"])
def test_captions_of_another_encoding_are_left_out_and_counted(tmp_path, encoding):
    write_images(tmp_path, range(9))
    (tmp_path / "4.txt").write_bytes("a cat".encode(encoding))
    train, held_out = load_sources(config(tmp_path))
    assert len(train) + len(held_out) == 8
    assert any(BAD_CAPTION in line for line in train.problems)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_caption_that_may_not_be_read_is_left_out_and_counted(tmp_path):
    write_images(tmp_path, range(9))
    (tmp_path / "4.txt").chmod(0)
    train, held_out = load_sources(config(tmp_path))
    assert len(train) + len(held_out) == 8


def test_a_caption_that_fails_to_be_read_is_left_out_and_counted(tmp_path, monkeypatch):
    from pipeline.data.readers import folder

    write_images(tmp_path, range(9))
    plain = folder.text_of

    def text_of(path: Path, most: int) -> str:
        if path.name == "4.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, most)

    monkeypatch.setattr(folder, "text_of", text_of)
    train, held_out = load_sources(config(tmp_path))
    assert len(train) + len(held_out) == 8


@pytest.mark.parametrize("form", ["JPEG", "TIFF", "PNG"])
def test_the_size_of_a_turned_image_is_that_of_its_pixels(tmp_path, form):
    image = Image.new("RGB", (30, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned"
    image.save(path, form, exif=exif)
    with path.open("rb") as file:
        assert upright_size(header(file)) == (20, 30)


def test_a_caption_with_line_breaks_stays_one(tmp_path):
    import tarfile

    text = "line one\nline two\rline three"
    rows = {"name": ["a"], "codes": [[1, 2]], "text": [text], "more_texts": [[]]}
    table = pyarrow.table(rows)
    with pyarrow.ipc.new_stream(tmp_path / "codes.arrow", table.schema) as writer:
        writer.write_table(table)
    _write_tar(tmp_path / "codes.arrow", tmp_path / "out.tar", _Keys())
    with tarfile.open(tmp_path / "out.tar") as tar:
        written = tar.extractfile("a.txt").read().decode()  # type: ignore[union-attr]
    assert written == "line one line two line three"


def test_a_path_that_is_written_in_several_ways_is_one_image(tmp_path):
    write_images(tmp_path, range(6))
    lines = ["0.png", "./0.png", str(tmp_path / "0.png"), *(f"{i}.png" for i in range(1, 6))]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    train, held_out = load_sources(config(tmp_path / "list.txt"))
    assert len(train) + len(held_out) == 6


def test_a_list_with_the_line_ends_of_old_computers_is_read(tmp_path):
    write_images(tmp_path, range(6))
    for file in tmp_path.glob("*.txt"):
        file.unlink()
    lines = [f"{i}.png,shade {i}" for i in range(6)]
    (tmp_path / "captions.txt").write_bytes("\r".join(lines).encode())
    train, held_out = load_sources(config(tmp_path))
    assert sorted([*captions(train), *captions(held_out)]) == [f"shade {i}" for i in range(6)]


@pytest.mark.parametrize("ids", [[None, None, None], [1, 1, 2]])
def test_annotations_without_ids_of_their_own_are_refused(tmp_path, ids):
    import json

    write_images(tmp_path, range(3))
    content = {
        "images": [{"id": own, "file_name": f"{i}.png"} for i, own in enumerate(ids)],
        "annotations": [{"image_id": own, "caption": "a"} for own in ids],
    }
    (tmp_path / "captions.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"images\[\d\] has the id .*; give every image an id"):
        load_sources(config(tmp_path / "captions.json"))
