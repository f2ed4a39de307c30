"""The doctor says how it understood each layout: what was read, its columns, and its splits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.doctor.diagnose import diagnose
from pipeline.doctor.text_report import as_table
from tests.helpers.data import config, encoded, write_shard


def facts(source: Path, **options: object) -> dict[str, str]:
    """The lines of the report by their names."""
    lines = as_table(diagnose(config(source, **options))).splitlines()
    named = [line[2:].partition("  ") for line in lines if line.startswith("  ")]
    return {name.strip(): fact.strip() for name, _, fact in reversed(named)}


def write_split(folder: Path, first: int, count: int) -> None:
    folder.mkdir(parents=True)
    rows = []
    for number in range(first, first + count):
        (folder / f"{number}.png").write_bytes(encoded((number, 0, 9)))
        rows.append({"file_name": f"{number}.png", "text": f"number {number}", "colour": "red"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_folders_of_splits_are_named(tmp_path):
    write_split(tmp_path / "train", 0, 10)
    write_split(tmp_path / "test", 100, 3)
    found = facts(tmp_path)
    assert found["columns"] == "folder, name, text, colour"
    assert found["splits"] == (
        "by names of folders: held out are 3 of test, and not data.val_fraction; trained "
        "on are 10 of train"
    )
    assert "13 usable (10 to train on, 3 held out)" in found["images"]


@pytest.mark.parametrize("streaming", [False, True])
def test_members_of_shards_are_named(tmp_path, streaming):
    samples = [(f"{i}", {"input.png": encoded((i, 0, 9)), "outputs.txt": b"x"}) for i in range(12)]
    write_shard(tmp_path / "0.tar", samples)
    found = facts(tmp_path, streaming=streaming)
    assert found["layout"].startswith("1 webdataset shards, members input.png")
    assert "outputs.txt" in found["layout"]
    expected = "none named; held out are 0.3 of the images by a hash of names"
    assert found["splits"] == expected


def test_a_second_source_is_named_and_its_copies_are_reported(tmp_path):
    write_split(tmp_path / "all", 0, 10)
    write_split(tmp_path / "mine", 8, 3)
    found = facts(tmp_path / "all", held_out_source=str(tmp_path / "mine"))
    assert found["splits"].startswith("by data.held_out_source: held out are 3 of")
    assert "(8 to train on, 3 held out)" in found["images"]


@pytest.mark.parametrize("streaming", [False, True])
def test_held_out_images_of_a_second_source_are_counted(tmp_path, streaming):
    samples = [(f"{i}", {"png": encoded((i, 0, 9)), "txt": b"x"}) for i in range(12)]
    write_shard(tmp_path / "shards" / "0.tar", samples)
    write_split(tmp_path / "mine", 100, 3)
    found = facts(tmp_path / "shards", held_out_source=str(tmp_path / "mine"), streaming=streaming)
    assert "(12 to train on, 3 held out)" in found["images"]


def test_details_that_differ_name_their_part(tmp_path):
    for split, ending in (("train", "txt"), ("test", "caption")):
        for i in range(4):
            (tmp_path / split).mkdir(exist_ok=True)
            (tmp_path / split / f"{i}.png").write_bytes(encoded((i, 9, len(split))))
            (tmp_path / split / f"{i}.{ending}").write_text("a caption")
    details = diagnose(config(tmp_path)).sources[0].understood
    assert details[:2] == [
        ("caption files", "test/: 4 .caption next to the images; each line is a caption"),
        ("caption files", "train/: 4 .txt next to the images; each line is a caption"),
    ]
    (tmp_path / "shards").mkdir()
    for shard in ("train-0", "test-0"):
        samples = [(f"{i}", {"png": encoded((i, 9, len(shard))), "txt": b"x"}) for i in range(6)]
        write_shard(tmp_path / "shards" / f"{shard}.tar", samples)
    details = diagnose(config(tmp_path / "shards")).sources[0].understood
    assert details[:1] == [("caption files", "members txt; each line is a caption")]


def test_a_streams_second_source_is_looked_at_as_files_are(tmp_path):
    """By its own columns, with those that cannot be read; copies in the stream are counted."""
    samples = [(f"{i}", {"png": encoded((i, 0, 9)), "txt": b"x"}) for i in range(12)]
    write_shard(tmp_path / "shards" / "0.tar", samples)
    (tmp_path / "mine").mkdir()
    for i in (11, 100, 101):
        (tmp_path / "mine" / f"{i}.png").write_bytes(encoded((i, 0, 9)))
    (tmp_path / "mine" / "bad.png").write_bytes(b"no image")
    rows = "".join(f"{name}.png,a caption\n" for name in (11, 100, 101, "bad"))
    (tmp_path / "mine" / "t.csv").write_text("path,caption\n" + rows)
    held_out = str(tmp_path / "mine" / "t.csv")
    options = {"streaming": True, "filter": {"max_corrupt_fraction": 0.5}}
    found = diagnose(config(tmp_path / "shards", held_out_source=held_out, **options))
    (source,) = found.sources
    assert (source.train, source.held_out) == (11, 3)
    assert [one.name for one in source.unreadable] == ["bad.png"]
    assert source.splits.startswith(f"by data.held_out_source: held out are 4 of {held_out}")
    assert ("table", f"{held_out}: t.csv, columns separated by comma") in source.understood


@pytest.mark.parametrize("streaming", [False, True])
def test_images_without_captions_are_looked_at_all_the_same(tmp_path, streaming):
    samples = [(f"{i}", {"png": encoded((i, 0, 9))}) for i in range(12)]
    write_shard(tmp_path / "0.tar", samples)
    found = diagnose(config(tmp_path / "0.tar", streaming=streaming))
    assert found.sources[0].usable == 12
    fails = [finding.text for finding in found.findings if finding.level == "fails"]
    assert "holds images and no column of captions" in fails[0]
