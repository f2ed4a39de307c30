"""Files that are not what they seem are refused before they are opened, and values of another type
before they are used."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from stage2_prior.file_checks import (
    UnsafeFile,
    build_config,
    check_file,
    check_folder,
    check_library_folder,
    check_part,
    read_json_object,
    stored_tensors,
)

ROOT = Path(__file__).parents[2]


@dataclass(kw_only=True)
class Inner:
    ratio: float = 1.0
    sides: tuple[int, int] = (1, 1)


@dataclass(kw_only=True)
class Outer:
    size: int = 1
    name: Literal["a", "b"] = "a"
    on: bool = False
    maybe: float | None = None
    either: int | tuple[int, int] = 1
    many: tuple[Inner, ...] = ()
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size is {self.size}; it must be at least 1")


@pytest.mark.parametrize(
    "name", ["file_checks.py", "hub.py", "saving.py", "transformers_saving.py"]
)
def test_both_stages_have_the_same_checks(name):
    one = (ROOT / "stage1_tokenizer" / name).read_text()
    other = (ROOT / "stage2_prior" / name).read_text()
    assert one.replace("stage1_tokenizer.", "stage2_prior.") == other


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_only_regular_files_are_opened(tmp_path, kind):
    path = tmp_path / "config.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(UnsafeFile, match=r"config\.json is no regular file"):
        read_json_object(path)
    with pytest.raises(UnsafeFile, match="no regular file"):
        stored_tensors(path)


def test_links_may_not_leave_their_folder_but_for_the_cache_of_the_hub(tmp_path):
    folder = tmp_path / "models--a--b" / "snapshots" / "123"
    folder.mkdir(parents=True)
    blob = tmp_path / "models--a--b" / "blobs" / "abc"
    blob.parent.mkdir()
    other = tmp_path / "other.json"
    for target in (blob, other, folder / "real.json"):
        target.write_text("{}")
    for name, target in {"blob": blob, "inside": folder / "real.json", "out": other}.items():
        (folder / name).symlink_to(target)
    check_file(folder / "blob")
    check_file(folder / "inside")
    with pytest.raises(UnsafeFile, match="is a link to a file outside of its folder"):
        check_file(folder / "out")


@pytest.mark.parametrize("name", ["modeling.py", "pytorch_model.BIN", "x.pkl", "y.so"])
def test_folders_with_code_are_refused_by_name(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    check_folder(tmp_path)
    (tmp_path / name).write_text("")
    with pytest.raises(UnsafeFile, match=f"holds '{name}', which may be code"):
        check_folder(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested more than 50 deep"),
        ('{"a": ' + "[" * 60 + "]" * 60 + "}", "nested more than 50 deep"),
        ('{"auto_map": {}}', "asks to run code"),
        ('{"a": [' + "[]," * 3_000_000 + "1]}", "bytes, and such a file has at most"),
        ('{"a": [' + "1," * 4_300_000 + "1]}", "bytes, and such a file has at most"),
        ('{"a": [' + "," * 2_500_001 + "1]}", "has more than 2,500,000 values"),
    ],
    ids=["deep", "just too deep", "code", "large", "large numbers", "many values"],
)
def test_json_is_refused_before_it_takes_memory(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(UnsafeFile, match=message):
        read_json_object(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": "3"}, "Outer.size is '3'; it must be a whole number"),
        ({"size": True}, "Outer.size is True; it must be a whole number"),
        ({"size": 2**62}, r"Outer.size is about 2\^62; it must be a whole number"),
        ({"size": 3.0}, "Outer.size is 3.0; it must be a whole number"),
        ({"size": 0}, "size is 0; it must be at least 1"),
        ({"maybe": float("nan")}, "Outer.maybe is nan; it must be a finite number"),
        ({"maybe": float("inf")}, "it must be a finite number"),
        ({"name": "c"}, "Outer.name is 'c'; it must be one of a, b"),
        ({"name": None}, "Outer.name is None; it must be one of a, b"),
        ({"on": 1}, "Outer.on is 1; it must be true or false"),
        ({"inner": 3}, "Inner is 3; it must be a JSON object"),
        ({"inner": {"sides": [1]}}, "Inner.sides is a list of 1; it must be a list: 2 values"),
        ({"inner": {"sides": [1, "x"]}}, r"Inner.sides\[1\] is 'x'; it must be a whole number"),
        ({"many": [{"ratio": []}]}, "Inner.ratio is a list of 0; it must be a finite number"),
        ({"many": [{}] * 2000}, "Outer.many is a list of 2000; it must be a list"),
        ({"other": 1}, r"unknown keys \['other'\] for Outer"),
    ],
)
def test_values_of_another_type_are_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message) as raised:
        build_config(Outer, values, "here.json")
    assert str(raised.value).startswith("here.json") and "\n" not in str(raised.value)


def test_saved_values_become_what_was_saved():
    values = {"size": 2, "maybe": 1, "either": [3, 4], "many": [{"sides": [5, 6]}], "inner": {}}
    assert build_config(Outer, values, "here.json") == Outer(
        size=2, maybe=1, either=(3, 4), many=(Inner(sides=(5, 6)),)
    )
    assert build_config(Outer, {"either": 3}, "here.json").either == 3


def test_tensors_are_known_by_their_header(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros((), dtype=torch.int64)}, path)
    stored = stored_tensors(path)
    assert {name: tensor.shape for name, tensor in stored.items()} == {"a": (2, 3), "b": ()}
    assert stored["a"].fits(torch.ones(2, 3, dtype=torch.bfloat16))
    assert not stored["a"].fits(torch.ones(2, 3, dtype=torch.int64))
    assert not stored["a"].fits(torch.ones(3, 2))
    path.write_bytes((2**40).to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(SafetensorError, match="its header has 1,099,511,627,776 bytes"):
        stored_tensors(path)


def test_a_large_sparse_file_of_weights_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    side = 2**12 + 1  # just above the size from which it matters
    header = {"a": {"dtype": "F32", "shape": [side, side], "data_offsets": [0, side * side * 4]}}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + side * side * 4)
    with pytest.raises(UnsafeFile, match=r"is a sparse file: .* of its 67,1.* bytes are stored"):
        stored_tensors(path)
    with path.open("r+b") as file:  # more than half of it is stored
        file.seek(8 + len(text))
        file.write(b"\1" * (2**25 + 2**20))
    assert stored_tensors(path)["a"].shape == (side, side)


def test_weights_may_not_be_larger_than_the_memory(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2000)}, path)
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PHYS_PAGES": 1, "SC_PAGE_SIZE": 4096}[name])
    with pytest.raises(UnsafeFile, match="and this machine has memory for 4,096"):
        stored_tensors(path)


def test_weights_are_read_where_the_system_counts_no_pages_and_blocks(tmp_path, monkeypatch):
    """As Windows."""
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2**24 + 1)}, path)  # from this size on, blocks are counted
    found = path.stat()
    monkeypatch.delattr("os.sysconf")
    bare = SimpleNamespace(st_mode=found.st_mode, st_size=found.st_size)
    monkeypatch.setattr(type(path), "stat", lambda *_, **__: bare)
    assert stored_tensors(path)["a"].shape == (2**24 + 1,)


def test_a_folder_inside_may_not_be_a_link_that_leaves(tmp_path):
    bundle = tmp_path / "bundle"
    for folder in (bundle / "real", tmp_path / "other"):
        folder.mkdir(parents=True)
    (bundle / "inside").symlink_to("real")
    (bundle / "out").symlink_to("../other")
    check_part(bundle, "real")
    check_part(bundle, "inside")
    (tmp_path / "link").symlink_to("bundle")
    check_part(tmp_path / "link", "real")
    with pytest.raises(UnsafeFile, match=r"out is a link to a folder outside of .*bundle; replace"):
        check_part(bundle, "out")


def test_a_json_file_that_is_truncated_is_no_unsafe_one(tmp_path):
    path = tmp_path / "a.json"
    for content in ("", "3", '{"a"', "[]"):
        path.write_text(content)
        with pytest.raises(ValueError) as raised:
            read_json_object(path)
        assert not isinstance(raised.value, UnsafeFile)
    path.write_text(json.dumps({"a": 1}))
    assert read_json_object(path) == {"a": 1}


def test_texts_that_a_library_reads_are_regular_files_of_bounded_size_and_depth(tmp_path):
    for name, content in {"modules.json": "[1]", "a.json": '{"cut', "merges.txt": "a b"}.items():
        (tmp_path / name).write_text(content)
    os.mkfifo(tmp_path / "other.log")  # which no library reads
    check_library_folder(tmp_path)
    path = tmp_path / "special_tokens_map.json"
    path.write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(UnsafeFile, match=r"special_tokens_map\.json is nested more than 50 deep"):
        check_library_folder(tmp_path)
    path.unlink()
    os.truncate(tmp_path / "merges.txt", 2**36)
    with pytest.raises(UnsafeFile, match=r"merges\.txt has 68,719,476,736 bytes"):
        check_library_folder(tmp_path)
    (tmp_path / "merges.txt").unlink()
    os.mkfifo(tmp_path / "chat_template.jinja")
    with pytest.raises(UnsafeFile, match=r"chat_template\.jinja is no regular file"):
        check_library_folder(tmp_path)
