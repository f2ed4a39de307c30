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
