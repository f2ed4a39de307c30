"""Splits that the data name: by folders, files, `datasets`, a column or a second source. The user's
held-out images are the held-out split, and are never trained on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.data import DataConfig, MixPart
from pipeline.data.load import find_rows, load_sources
from pipeline.data.readers.splits import (
    roles,
    split_of_file,
    split_of_folder,
    split_of_value,
    splits_of_paths,
)
from pipeline.data.source import Source
from pipeline.data.streaming.source import Sample, StreamSource
from tests.helpers.data import config, encoded, write_shard


def captions(source: Source) -> set[str]:
    return set(source.captions(range(len(source))))


def splits(source: object, **options: object) -> tuple[set[str], set[str]]:
    """Captions to train on, and those held out."""
    train, held_out = load_sources(config(source, **options))
    return captions(train), captions(held_out)


def write_images(folder: Path, first: int, count: int, *, captioned: bool = True) -> list[str]:
    """Images named by numbers, whose captions say them; returns the file names."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        (folder / f"{number}.png").write_bytes(encoded((number, 0, 9)))
        if captioned:
            (folder / f"{number}.txt").write_text(f"number {number}")
    return [f"{number}.png" for number in range(first, first + count)]


def numbers(first: int, count: int) -> set[str]:
    return {f"number {number}" for number in range(first, first + count)}


def write_list(file: Path, names: list[str]) -> None:
    rows = [{"file_name": name, "text": f"number {Path(name).stem}"} for name in names]
    file.write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize("held_out", ["test", "valid", "validation", "val", "dev", "Test_Images"])
@pytest.mark.parametrize("layout", ["beside", "in each", "above"])
def test_folders_of_splits_are_read_with_their_captions(tmp_path, held_out, layout):
    beside = layout == "beside"
    train = write_images(tmp_path / "train", 0, 20, captioned=beside)
    other = write_images(tmp_path / held_out, 100, 5, captioned=beside)
    if layout == "in each":
        write_list(tmp_path / "train" / "metadata.jsonl", train)
        write_list(tmp_path / held_out / "metadata.jsonl", other)
    if layout == "above":
        names = [f"train/{name}" for name in train] + [f"{held_out}/{name}" for name in other]
        write_list(tmp_path / "metadata.jsonl", names)
    assert splits(tmp_path) == (numbers(0, 20), numbers(100, 5))
    source, _ = load_sources(config(tmp_path))
    assert source.problems[-1].startswith("splits by names of folders: held out are 5 of ")


def test_validation_is_held_out_and_test_is_left_out(tmp_path):
    write_images(tmp_path / "train", 0, 10)
    write_images(tmp_path / "valid", 100, 3)
    write_images(tmp_path / "test", 200, 4)
    assert splits(tmp_path) == (numbers(0, 10), numbers(100, 3))
    source, _ = load_sources(config(tmp_path))
    assert source.problems[-1].endswith("left out of both are 4 of test")


def test_images_beside_a_training_folder_are_left_out_and_counted(tmp_path):
    write_images(tmp_path / "train", 0, 10)
    write_images(tmp_path / "test", 100, 3)
    write_images(tmp_path / "more", 200, 2)
    assert splits(tmp_path) == (numbers(0, 10), numbers(100, 3))
    source, _ = load_sources(config(tmp_path))
    counted = "2 images in no folder of a split left out: more/200.png, more/201.png"
    assert counted in source.problems


def test_without_a_training_folder_all_else_is_trained_on(tmp_path):
    write_images(tmp_path, 0, 10)
    write_images(tmp_path / "cats", 50, 3)
    write_images(tmp_path / "test", 100, 3)
    assert splits(tmp_path) == (numbers(0, 10) | numbers(50, 3), numbers(100, 3))


def test_a_split_in_an_images_own_name_or_a_class_is_none(tmp_path):
    """Neither `steam train.png` nor a class `train` beside other classes names a split."""
    for folder in ("bus", "train"):
        write_images(tmp_path / folder, ord(folder[0]), 8)
    (tmp_path / "bus" / "the test train.png").write_bytes(encoded())
    (tmp_path / "bus" / "the test train.txt").write_text("odd")
    train, held_out = splits(tmp_path)
    assert train | held_out == numbers(98, 8) | numbers(116, 8) | {"odd"}
    assert not any("splits by" in line for line in load_sources(config(tmp_path))[0].problems)


def test_names_of_splits_can_be_ignored(tmp_path):
    write_images(tmp_path / "train", 0, 20)
    write_images(tmp_path / "test", 100, 20)
    train, held_out = splits(tmp_path, split_column="none")
    assert train | held_out == numbers(0, 20) | numbers(100, 20)
    assert held_out & numbers(0, 20) and train & numbers(100, 20)


def test_words_of_paths_name_splits():
    for name in ("train", "Training", "train2017", "train_images", "images-train"):
        assert split_of_folder(name) == "train", name
    for name in ("steam train", "trains", "latest", "data", ""):
        assert split_of_folder(name) == "", name
    assert split_of_file("data/train-00000-of-00002.parquet") == "train"
    assert split_of_file("default/validation/0000.parquet") == "validation"
    assert split_of_file("set-test.arrow") == "test" and split_of_file("contest-0.tar") == ""
    assert split_of_file("train-test-0.tar") == ""  # both words
    assert split_of_value(" Valid ") == "validation" and split_of_value(b"test") == "test"
    assert split_of_value("7") is None
    assert splits_of_paths(["images/train/1.png", "images/val/2.png"]) == ["train", "validation"]
    assert splits_of_paths(["a/test/1.png", "a/b/2.png"]) == ["", ""]  # may be a class


def test_splits_need_images_of_both_kinds():
    assert roles({"train"}) is None and roles({"test"}) is None and roles({""}) is None
    assert roles({"train", "test"}) == {"train": "train", "test": "held_out"}
    assert roles({"", "test"}) == {"": "train", "test": "held_out"}
    assert roles({"train", "validation", "test", ""}) == {
        "train": "train",
        "validation": "held_out",
        "test": "left_out",
        "": "left_out",
    }


def write_parquet(file: Path, first: int, count: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file.parent.mkdir(parents=True, exist_ok=True)
    images = [encoded((number, 0, 9)) for number in range(first, first + count)]
    texts = [f"number {number}" for number in range(first, first + count)]
    pq.write_table(pa.table({"image": images, "text": texts}), file)


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    """A clone of a data set of the Hub: a card, two files to train on and one of tests."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "clone"
    write_parquet(folder / "data" / "train-00000-of-00002.parquet", 0, 8)
    write_parquet(folder / "data" / "train-00001-of-00002.parquet", 8, 8)
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", 100, 4)
    (folder / "README.md").write_text("---\n---\n")
    (folder / ".git").mkdir()
    (folder / ".git" / "x.parquet").write_bytes(b"none")
    return folder


def test_a_clone_of_a_data_set_is_read_by_its_files(clone):
    assert splits(clone) == (numbers(0, 16), numbers(100, 4))
    assert splits(clone / "data" / "*.parquet") == (numbers(0, 16), numbers(100, 4))
    train, held_out = splits(clone / "**" / "train-*.parquet")
    assert train | held_out == numbers(0, 16) and held_out


def test_a_clone_of_a_data_set_is_streamed_by_its_files(clone):
    train, held_out = load_sources(config(clone, streaming=True))
    assert captions(held_out) == numbers(100, 4)
    found = [s.captions[0] for shard in range(train.num_shards) for s in train.samples(shard)]
    assert sorted(found) == sorted(numbers(0, 16))
    assert train.problems[0].startswith("splits by names of files: held out is test")


@pytest.mark.parametrize("streaming", [False, True])
def test_shards_are_split_by_their_names(tmp_path, streaming):
    for name, first in (("train-0", 0), ("train-1", 8), ("val-0", 100), ("test-0", 200)):
        samples = [
            (f"{i:04d}", {"png": encoded((i, 0, 9)), "txt": f"number {i}".encode()})
            for i in range(first, first + 8)
        ]
        write_shard(tmp_path / f"{name}.tar", samples)
    train, held_out = load_sources(config(tmp_path, streaming=streaming))
    assert captions(held_out) == numbers(100, 8)
    shards = range(train.num_shards) if streaming else ()
    found = {s.captions[0] for shard in shards for s in train.samples(shard)}
    assert (found or captions(train)) == numbers(0, 16)


@pytest.mark.parametrize("streaming", [False, True])
def test_splits_of_a_saved_data_set_are_its_own(tmp_path, streaming):
    import datasets

    def of(first: int, count: int) -> datasets.Dataset:
        images = [{"bytes": encoded((n, 0, 9)), "path": None} for n in range(first, first + count)]
        texts = [f"number {n}" for n in range(first, first + count)]
        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        return datasets.Dataset.from_dict({"image": images, "text": texts}, features=features)

    parts = {"train": of(0, 12), "validation": of(100, 3), "test": of(200, 3)}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    train, held_out = load_sources(config(tmp_path / "saved", streaming=streaming))
    assert captions(held_out) == numbers(100, 3)
    if not streaming:
        assert captions(train) == numbers(0, 12)


def write_table(file: Path, values: list[str]) -> None:
    write_images(file.parent / "i", 0, len(values), captioned=False)
    lines = [f"i/{n}.png,number {n},{value}" for n, value in enumerate(values)]
    file.write_text("path,text,split\n" + "\n".join(lines))


def test_a_column_split_is_taken_where_it_names_splits_alone(tmp_path):
    write_table(tmp_path / "t.csv", ["train"] * 8 + ["Val"] * 2 + ["test"] * 2)
    expected = (numbers(0, 8), numbers(8, 2))
    assert splits(tmp_path / "t.csv") == expected
    assert splits(tmp_path / "t.csv", split_column="split") == expected
    source, _ = load_sources(config(tmp_path / "t.csv"))
    assert source.problems[-1].startswith("splits by the column split: held out are 2 of")
    write_table(tmp_path / "t.csv", ["train"] * 8 + ["left"] * 4)
    train, held_out = splits(tmp_path / "t.csv")
    assert train | held_out == numbers(0, 12)
    assert source_note(tmp_path / "t.csv") == ""
    with pytest.raises(ValueError, match=r"has values that name no split \(left\); write train"):
        splits(tmp_path / "t.csv", split_column="split")
    with pytest.raises(ValueError, match=r"no column 'fold'; it has .*data\.split_column"):
        splits(tmp_path / "t.csv", split_column="fold")


def test_a_column_that_names_splits_in_some_rows_alone_is_reported(tmp_path):
    write_table(tmp_path / "t.csv", ["train"] * 8 + ["test"] * 2 + ["extra"] * 2)
    assert "the column split is not used, since extra name no split" in source_note(
        tmp_path / "t.csv"
    )


def source_note(source: Path) -> str:
    """The note of the splits."""
    problems = load_sources(config(source))[0].problems
    return next((line for line in problems if line.startswith("splits ")), "")


def test_a_column_of_one_kind_alone_is_refused_when_named(tmp_path):
    write_table(tmp_path / "t.csv", ["train"] * 8)
    assert sum(map(len, splits(tmp_path / "t.csv"))) == 8
    with pytest.raises(ValueError, match="names train alone; it needs images to train on and"):
        splits(tmp_path / "t.csv", split_column="split")


def test_a_streamed_column_holds_out_what_it_says(tmp_path):
    samples = [
        (
            f"{i:04d}",
            {
                "png": encoded((i, 0, 9)),
                "json": json.dumps(
                    {"text": f"number {i}", "split": "test" if i % 4 == 0 else "train"}
                ).encode(),
            },
        )
        for i in range(12)
    ]
    write_shard(tmp_path / "0.tar", samples)
    tests = {f"number {i}" for i in range(0, 12, 4)}
    train, held_out = load_sources(config(tmp_path, streaming=True, split_column="split"))
    assert captions(held_out) == tests
    assert {s.captions[0] for s in train.samples(0)} == numbers(0, 12) - tests
    assert splits(tmp_path) == (numbers(0, 12) - tests, tests)
    ignored, _ = load_sources(config(tmp_path, streaming=True))
    assert "the column split is not used while streaming" in ignored.problems[0]


def write_folds(shard: Path, values: list[object]) -> None:
    """A shard whose samples have these values in the column `fold`."""
    samples = [
        (
            f"{i:04d}",
            {
                "png": encoded((i, 0, 9)),
                "json": json.dumps({"text": f"number {i}", "fold": value}).encode(),
            },
        )
        for i, value in enumerate(values)
    ]
    write_shard(shard, samples)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("values", "error"),
    [
        (["train", "val", "left"], r"has values that name no split \(left\); write train"),
        (["train", "val", ""], r"has values that name no split \(\(empty\)\); write train"),
        (["train", "train"], "names train alone; it needs images to train on and"),
        (["test", "test"], "names test alone; it needs images to train on and"),
    ],
)
def test_a_column_that_does_not_name_the_splits_is_refused(tmp_path, streaming, values, error):
    write_folds(tmp_path / "0.tar", [values[i % len(values)] for i in range(12)])
    with pytest.raises(ValueError, match=rf"{tmp_path}.*: the column 'fold' {error}"):
        load_sources(config(tmp_path, streaming=streaming, split_column="fold"))


def test_a_stream_counts_values_of_no_split_after_its_held_out_images(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.data.streaming.source.HELD_OUT", 2)
    values = ["val", "val", "train", "left", ["train", "test"]]
    write_folds(tmp_path / "0.tar", values)
    train, held_out = load_sources(config(tmp_path, streaming=True, split_column="fold"))
    assert captions(held_out) == numbers(0, 2)
    # Of several splits, the one furthest from training counts, as in a table.
    assert {sample.captions[0] for sample in train.samples(0)} == {"number 2"}
    assert "1 images that the column fold puts in no split left out: 0003" in train.problems


@pytest.mark.parametrize("streaming", [False, True])
def test_a_second_source_is_the_held_out_split(tmp_path, streaming):
    samples = [
        (f"{i:04d}", {"png": encoded((i, 0, 9)), "txt": f"number {i}".encode()}) for i in range(12)
    ]
    write_shard(tmp_path / "shards" / "0.tar", samples)
    write_images(tmp_path / "mine", 100, 4)
    train, held_out = load_sources(
        config(tmp_path / "shards", held_out_source=str(tmp_path / "mine"), streaming=streaming)
    )
    assert captions(held_out) == numbers(100, 4)
    found = {s.captions[0] for s in train.samples(0)} if streaming else captions(train)
    assert found == numbers(0, 12)
    assert train.problems[0].startswith("splits by data.held_out_source: held out")
    assert str(tmp_path / "mine") in train.problems[0]


def test_held_out_images_inside_the_source_are_not_trained_on(tmp_path):
    """By their files, wherever they lie; also the source's own test images are not."""
    write_images(tmp_path / "all", 0, 10)
    write_images(tmp_path / "all" / "mine", 100, 3)
    write_images(tmp_path / "all" / "test", 200, 3)
    options = {"held_out_source": str(tmp_path / "all" / "mine")}
    assert splits(tmp_path / "all", **options) == (numbers(0, 10), numbers(100, 3))
    source, _ = load_sources(config(tmp_path / "all", **options))
    counted = "3 images to train on that are copies of held-out ones left out"
    assert any(line.startswith(counted) for line in source.problems)


@pytest.mark.parametrize("streaming", [False, True])
def test_copies_of_held_out_samples_of_shards_are_not_trained_on(tmp_path, streaming):
    for name, rows in (("train", range(12)), ("val", range(9, 15))):
        samples = [
            (f"{name}{i}", {"png": encoded((i, 0, 9)), "txt": f"number {i}".encode()}) for i in rows
        ]
        write_shard(tmp_path / f"{name}-000.tar", samples)
    train, held_out = load_sources(config(tmp_path, streaming=streaming))
    found = {s.captions[0] for s in train.samples(0)} if streaming else captions(train)
    assert (found, captions(held_out)) == (numbers(0, 9), numbers(9, 6))
    counted = "3 images to train on that are copies of held-out ones left out"
    assert any(line.startswith(counted) for line in train.problems)


def test_each_part_of_a_mixture_has_its_own_held_out_source(tmp_path):
    write_images(tmp_path / "a", 0, 10)
    write_images(tmp_path / "b", 50, 10)
    write_images(tmp_path / "mine", 100, 3)
    parts = [
        MixPart(source=str(tmp_path / "a"), held_out_source=str(tmp_path / "mine")),
        MixPart(source=str(tmp_path / "b")),
    ]
    train, held_out = load_sources(config("", mix=parts))
    assert captions(train.parts[0]) == numbers(0, 10)
    assert captions(held_out.parts[0]) == numbers(100, 3)
    with pytest.raises(ValueError, match=r"data\.held_out_source is x and data\.mix has 2 parts"):
        config("", mix=parts, held_out_source="x")


def test_an_error_of_no_captions_names_the_tables_above_the_splits(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "0.png").write_bytes(encoded())
        (tmp_path / f"{split}.csv").write_text(f"image,text\n{split}/0.png,a cat\n")
    with pytest.raises(ValueError, match=r"other files there: 2 \.csv \(test\.csv, \.\.\.\)"):
        load_sources(config(tmp_path))


def test_a_split_without_captions_is_an_error_and_not_dropped(tmp_path):
    for split, count in (("train", 8), ("test", 4)):
        (tmp_path / split).mkdir()
        for i in range(count):
            (tmp_path / split / f"{i}.png").write_bytes(encoded((i, 9, 99)))
            if split == "train":
                (tmp_path / split / f"{i}.txt").write_text("a caption")
    wanted = DataConfig(source=str(tmp_path), image_size=16)
    with pytest.raises(ValueError, match=r"test holds 4 images and no captions"):
        find_rows(wanted)
    rows = find_rows(wanted, require_captions=False)
    assert rows.held_out is not None and rows.held_out.sum() == 4


def test_a_held_out_folder_is_held_out(tmp_path):
    for split in ("train", "Held-Out"):
        (tmp_path / split).mkdir()
        for i in range(4):
            (tmp_path / split / f"{i}.png").write_bytes(encoded((i, 9, 99)))
            (tmp_path / split / f"{i}.txt").write_text("a caption")
    rows = find_rows(DataConfig(source=str(tmp_path), image_size=16))
    held_out = [rows.label(row) for row in range(8) if rows.held_out[row]]
    assert len(held_out) == 4 and all(name.startswith("Held-Out/") for name in held_out)


def parquet(path: Path, **columns: list[object]) -> Path:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def streamed(settings: DataConfig) -> list[Sample]:
    stream = load_sources(settings)[0]
    assert isinstance(stream, StreamSource)
    return [one for shard in range(stream.num_shards) for one in stream.samples(shard)]


def test_streamed_captions_follow_the_rules_of_mapped_ones(tmp_path):
    captions = [
        "line one\nline two",
        "['a cat', 'a dog']",
        "nan",
        *[f"number {i}" for i in range(9)],
    ]
    images = [encoded((i, 9, 99)) for i in range(len(captions))]
    source = parquet(tmp_path / "rows" / "a.parquet", image=images, caption=captions)
    own = DataConfig(source=str(source), image_size=16, val_fraction=0.3)
    expected = sorted(
        captions
        for split in load_sources(own)
        for captions in split.all_captions(range(len(split)))
    )
    stream = StreamSource(replace(own, streaming=True))
    assert sorted(one.captions for one in stream.first(20)) == expected
    assert ["a cat", "a dog"] in expected and ["nan"] not in expected


def test_streams_leave_out_copies_of_a_held_out_source(tmp_path):
    images = [encoded((i, 9, 99)) for i in range(12)]
    texts = [f"number {i}" for i in range(12)]
    source = parquet(tmp_path / "rows" / "a.parquet", image=images, text=texts)
    second = parquet(tmp_path / "second" / "b.parquet", image=images[:4], text=texts[:4])
    own = DataConfig(source=str(source), held_out_source=str(second), image_size=16, streaming=True)
    assert sorted(one.captions[0] for one in streamed(own)) == sorted(texts[4:])


def test_captions_of_a_second_source_may_be_in_another_column(tmp_path):
    for name, column, first in (("all", "text", 0), ("mine", "caption", 100)):
        files = write_images(tmp_path / name, first, 4, captioned=False)
        rows = [f"{file},number {Path(file).stem}\n" for file in files]
        (tmp_path / name / "t.csv").write_text(f"image,{column}\n" + "".join(rows))
    held_out = str(tmp_path / "mine" / "t.csv")
    found = splits(tmp_path / "all" / "t.csv", held_out_source=held_out)
    assert found == (numbers(0, 4), numbers(100, 4))


def test_images_that_no_row_names_are_in_no_split(tmp_path):
    """The split is the same, whether captions are required or not."""
    files = write_images(tmp_path, 0, 12, captioned=False)
    rows = [
        {"file_name": name, "text": name, "split": "test" if i % 5 == 0 else "train"}
        for i, name in enumerate(files[:10])
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for column in ("auto", "split"):
        for required in (True, False):
            wanted = config(tmp_path, split_column=column)
            train, held_out = load_sources(wanted, require_captions=required)
            assert (len(train), len(held_out)) == (8, 2)
    assert train.problems[-1].endswith("left out of both are 2 of no split")


@pytest.mark.parametrize("listed", [False, True])
def test_folders_of_splits_may_link_to_files_of_the_source_alone(tmp_path, listed):
    source = tmp_path / "source"
    write_images(source / "images", 0, 12, captioned=False)
    write_images(tmp_path / "elsewhere", 50, 1, captioned=False)
    for split, rows in (("train", range(9)), ("test", range(9, 12))):
        (source / split).mkdir()
        for i in rows:
            (source / split / f"{i}.png").symlink_to(f"../images/{i}.png")
            if not listed:
                (source / split / f"{i}.txt").write_text(f"number {i}")
        if listed:
            write_list(source / split / "metadata.jsonl", [f"{i}.png" for i in rows])
    (source / "train" / "50.png").symlink_to("../../elsewhere/50.png")
    assert splits(source) == (numbers(0, 9), numbers(9, 3))
    problems = load_sources(config(source))[0].problems
    assert "1 links to files outside of the folder left out" in problems[0]
    assert problems[0].endswith(": train/50.png")


@pytest.mark.parametrize("streaming", [False, True])
def test_errors_of_a_second_source_name_its_setting(tmp_path, streaming):
    write_shard(tmp_path / "0.tar", [(f"{i}", {"png": encoded(), "txt": b"x"}) for i in range(9)])
    missing = {"held_out_source": str(tmp_path / "nope"), "streaming": streaming}
    with pytest.raises(FileNotFoundError, match=r"^data\.held_out_source: there is no .*nope"):
        load_sources(config(tmp_path / "0.tar", **missing))
    remote = {"held_out_source": "https://host/0.tar"}
    with pytest.raises(ValueError, match=r"^data\.held_out_source https.*or download it"):
        load_sources(config(tmp_path / "0.tar", **remote))
