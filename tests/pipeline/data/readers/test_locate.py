"""What a name leads to: files here at once, the Hub only for what may be a name there, and errors
that say what lies there."""

from __future__ import annotations

import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.load import find_rows, load_sources
from pipeline.data.readers.locate import files_of_rows, is_hub_name, matching
from tests.helpers.data import config, encoded, write_shards


@pytest.fixture
def no_hub(monkeypatch):
    """Looking anything up on the Hub fails."""

    def looked_up(*names: object, **options: object) -> None:
        raise AssertionError(f"{names} was looked up")

    monkeypatch.setattr("datasets.load_dataset", looked_up)
    monkeypatch.setattr("stage1_tokenizer.hub.hub_answers", looked_up)


@pytest.mark.parametrize("name", ["cifar10", "user/set", "user/set-v1.0", "a.b/c_d"])
def test_names_of_the_hub_may_be_looked_up(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "/data/photos",
        "./photos",
        "../photos",
        "~/photos",
        "C:\\photos",
        "C:/photos",
        "photos\\cats",
        "photos/",
        "a/b/c",
        "list.csv",
        "user/list.jsonl",
        "photo.png",
        "shards.tar.gz",
        "photos/*",
        "my photos",
        "here/other",
    ],
)
def test_a_path_is_never_looked_up(name, tmp_path, monkeypatch, no_hub):
    """Its ending, its characters, or a folder that is here make it one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert not is_hub_name(name)
    with pytest.raises(FileNotFoundError, match=r"data\.source: (there is no|no files match)"):
        find_rows(config(name))
    with pytest.raises(FileNotFoundError, match=r"data\.source: (there is no|no files match)"):
        load_sources(config(name, streaming=True))


def test_what_exists_is_never_looked_up(tmp_path, monkeypatch, no_hub):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").write_text("x")
    with pytest.raises(ValueError, match="notes is 1 without an ending"):
        find_rows(config("notes"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match=r"empty holds 0 images .*; it holds no file; accepted are"
    ):
        find_rows(config("empty"))
    for name in ("a.heic", "b.heic", "c.md"):
        (tmp_path / "empty" / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"it holds 2 \.heic, 1 \.md \(a\.heic, b\.heic, c\.md\);"):
        find_rows(config("empty"))


def test_a_path_to_nothing_names_the_nearest_and_what_lies_there(tmp_path, no_hub):
    for name in ("photos", "videos"):
        (tmp_path / name).mkdir()
    expected = f"there is no {tmp_path}/phtos; {tmp_path} holds photos, videos; did you mean"
    with pytest.raises(FileNotFoundError, match=re.escape(f"{expected} {tmp_path}/photos?")):
        find_rows(config(tmp_path / "phtos"))
    # The deepest folder that is there is listed.
    with pytest.raises(FileNotFoundError, match=re.escape(f"did you mean {tmp_path}/photos?")):
        find_rows(config(tmp_path / "photo" / "cats"))


def test_a_name_that_is_not_on_the_hub_names_the_nearest_folder(tmp_path, monkeypatch):
    def fails(*names: object, **options: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", fails)
    monkeypatch.setattr("stage1_tokenizer.hub.hub_answers", lambda *names: True)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no network\); did you mean photos, which lies"):
        find_rows(config("phtos"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match=r"HF_HUB_OFFLINE forbids .* did you mean photos"):
        find_rows(config("phtos"))


def test_a_glob_of_other_files_is_described(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(encoded())
    with pytest.raises(ValueError, match=r"is 4 \.png \(.*0\.png, .*\.\.\.\), which is no source"):
        find_rows(config(tmp_path / "*.png"))


def test_globs_read_all_depths_and_ranges_those_that_exist(tmp_path):
    for folder in ("a", "a/b"):
        (tmp_path / folder).mkdir()
        for name in ("0.tar", "1.tar"):
            (tmp_path / folder / name).write_bytes(b"")
    assert len(matching(str(tmp_path / "**/*.tar"))) == 4
    assert len(matching(str(tmp_path / "a/*.tar"))) == 2
    assert [file.name for file in matching(str(tmp_path / "a/{0..5}.tar"))] == ["0.tar", "1.tar"]
    # A folder's shards at any depth, unless some lie in it itself.
    assert len(files_of_rows(str(tmp_path))) == 4
    assert len(files_of_rows(str(tmp_path / "a"))) == 2
    with pytest.raises(ValueError, match="names more than 1,000,000 files"):
        matching(str(tmp_path / "{0..99999999}.tar"))


def test_deep_globs_of_shards_are_read_mapped_and_streamed(tmp_path):
    write_shards(tmp_path / "a" / "b", [12])
    for streaming in (False, True):
        _, held_out = load_sources(config(tmp_path / "**" / "*.tar", streaming=streaming))
        assert len(held_out)


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    (tmp_path / "data").mkdir()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (tmp_path / "data" / "train.parquet").write_bytes(pointer)
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"is a pointer of Git LFS and no data; run `git lfs"):
            load_sources(config(tmp_path, streaming=streaming))


def test_a_folder_with_images_and_parquet_is_one_of_images(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded())
    (tmp_path / "a.txt").write_text("a cat")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "other.parquet")
    assert len(find_rows(config(tmp_path))) == 1
