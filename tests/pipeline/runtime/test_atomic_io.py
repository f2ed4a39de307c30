"""Files that are written whole or not at all, whatever the disk does."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pipeline.inference.generate import _Drawn, _write
from pipeline.runtime import atomic_io
from pipeline.runtime.atomic_io import (
    WriteError,
    atomic_write,
    atomic_write_dir,
    atomic_write_files,
    atomic_write_text,
    clean_partial_writes,
    write_errors,
)

ROOT = Path(__file__).parents[3]

REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EROFS: "write to another folder",
    errno.EIO: None,
}


@pytest.fixture
def failing_disk(monkeypatch) -> Iterator[Callable[[int, int], None]]:
    """Makes the n-th write or sync fail, counted from 0; a write leaves half of what it was given,
    as a full disk does."""
    left = [-1, 0]

    def due() -> bool:
        left[0] -= 1
        return left[0] == -1

    def error() -> OSError:
        return OSError(left[1], os.strerror(left[1]))

    write_bytes = Path.write_bytes
    sync = os.fsync

    def writes(path: Path, data: bytes) -> int:
        if due():
            write_bytes(path, data[: len(data) // 2])
            raise error()
        return write_bytes(path, data)

    def writes_text(path: Path, text: str, encoding: str | None = None) -> int:
        return writes(path, text.encode(encoding or "utf-8"))

    def syncs(descriptor: int) -> None:
        if due():
            raise error()
        sync(descriptor)

    monkeypatch.setattr(Path, "write_bytes", writes)
    monkeypatch.setattr(Path, "write_text", writes_text)
    monkeypatch.setattr(os, "fsync", syncs)

    def fail(after: int, number: int) -> None:
        left[:] = [after, number]

    yield fail


def rows(count: int) -> list[_Drawn]:
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return [_Drawn(0, i, Image.fromarray(pixels), 0.0) for i in range(count)]


@pytest.mark.parametrize("number", REMEDIES)
def test_a_full_disk_at_any_write_leaves_whole_images_and_says_how_many(
    tmp_path, failing_disk, number
):
    """Three images, their grid and their list: each is written, synced, and its folder synced."""
    failures = 0
    for after in range(100):
        out = tmp_path / str(after)
        failing_disk(after, number)
        try:
            _write(out, rows(3), ["a"], 0)
            break
        except OSError as error:
            failures += 1
            text = str(error)
        complete = sorted(path.name for path in out.glob("0*.png"))
        for path in out.iterdir():
            assert not path.name.startswith("."), path
            if path.suffix == ".png":
                Image.open(path).load()
            else:
                assert len(path.read_text().splitlines()) == 3
        if remedy := REMEDIES[number]:
            assert f"cannot write {out}" in text and remedy in text
            said = int(text.split("; ")[-1].split(" of 3 images are complete")[0])
            # The sync of the folder comes after the rename: an image may be there and not count.
            assert said <= len(complete) <= said + 1
    assert failures == 5 * 3
    lines = (out / "samples.jsonl").read_text().splitlines()
    named = [json.loads(line)["file"] for line in lines]
    assert named == sorted(path.name for path in out.glob("0*.png"))


def test_a_failure_keeps_what_was_there_before(tmp_path, failing_disk):
    def write(folder: Path) -> None:
        (folder / "a").write_text("new")
        (folder / "b").write_text("new")

    for after in range(4):
        failing_disk(-1, 0)
        atomic_write_text(tmp_path / "file", "old")
        atomic_write_dir(tmp_path / "dir", lambda folder: (folder / "a").write_text("old"))
        failing_disk(after, errno.ENOSPC)
        with pytest.raises(WriteError, match=r"cannot write .*dir .No space left"):
            atomic_write_dir(tmp_path / "dir", write)
        failing_disk(after, errno.ENOSPC)
        with pytest.raises(WriteError, match=r"cannot write .*files .No space left"):
            atomic_write_files(tmp_path / "files", write)
        assert (tmp_path / "dir" / "a").read_text() == "old"
        assert not list((tmp_path / "files").iterdir())
    failing_disk(0, errno.ENOSPC)
    with pytest.raises(WriteError, match=r"cannot write .*file .No space left"):
        atomic_write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dir", "file", "files"]


def test_files_join_those_that_a_folder_holds(tmp_path):
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "a").write_text("old")
    atomic_write_files(tmp_path, lambda folder: (folder / "a").write_text("new"))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "kept": "kept",
        "a": "new",
    }


@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_weights_can_be_read_by_whom_the_umask_lets(tmp_path, umask, mode):
    def write(folder):
        save_file({"weight": torch.zeros(2)}, folder / "model.safetensors")

    before = os.umask(umask)
    try:
        atomic_write_dir(tmp_path / "bundle", write)
        atomic_write_files(tmp_path / "files", write)
    finally:
        os.umask(before)
    for folder in ("bundle", "files"):
        assert (tmp_path / folder / "model.safetensors").stat().st_mode & 0o777 == mode


def test_what_is_in_the_way_is_named(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").write_text("")
    for path in (tmp_path / "a", tmp_path / "b" / "c"):
        with pytest.raises(WriteError, match=f"cannot write {path} .*remove what is in the way"):
            atomic_write_text(path, "text")


def test_errors_of_what_is_read_meanwhile_pass(tmp_path):
    with pytest.raises(PermissionError), atomic_write(tmp_path / "a"):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/image.png")
    with pytest.raises(WriteError, match="make its folder writable"), write_errors(tmp_path / "a"):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))


def test_hidden_files_of_a_users_folder_stay(tmp_path):
    own = [".bashrc.old", ".config.writing", ".notes.txt.writing", ".b.01234567-1.writing"]
    for name in own:
        (tmp_path / name).write_text("mine")
    atomic_write_text(tmp_path / "a", "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*own, "a"])


WRITES = """
import sys
from pathlib import Path
from pipeline.runtime.atomic_io import atomic_write, atomic_write_dir
path = Path(sys.argv[1])
def write(beside):
    if beside.name.startswith(".folder"):
        beside = beside / "a"
    beside.write_text(sys.argv[2][:1])
    print("half-written", flush=True)
    sys.stdin.readline()
    beside.write_text(sys.argv[2])
if path.name == "folder":
    atomic_write_dir(path, write)
else:
    with atomic_write(path) as beside:
        write(beside)
"""


@contextmanager
def writer(path: Path, text: str) -> Iterator[subprocess.Popen]:
    """A process that has half-written `path`, and goes on when it reads a line."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITES, str(path), text],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "half-written\n"
        yield process
        if process.poll() is None:
            process.communicate("go on\n")


@pytest.mark.parametrize("name", ["file", "folder"])
def test_two_processes_that_write_one_path_leave_a_whole_one(tmp_path, name):
    """Each to a temporary name of its own; the last that ends is there."""
    path = tmp_path / name
    with writer(path, "first") as first, writer(path, "second") as second:
        assert len(list(tmp_path.glob(".*.writing"))) == 2
        first.communicate("go on\n")
        inside = path / "a" if name == "folder" else path
        assert inside.read_text() == "first"
    assert (first.returncode, second.returncode) == (0, 0)
    assert inside.read_text() == "second"
    assert [one.name for one in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["file", "folder"])
def test_what_a_killed_process_left_is_removed_and_what_another_writes_stays(tmp_path, name):
    with writer(tmp_path / name, "killed") as killed:
        killed.kill()
    assert len(list(tmp_path.iterdir())) == 1
    with writer(tmp_path / name, "new") as running:
        (left,) = tmp_path.iterdir()
        assert str(running.pid) in left.name
        atomic_write_text(tmp_path / "b", "text")
        assert left.exists()
    assert running.returncode == 0


def test_a_folder_written_in_between_is_replaced(tmp_path, monkeypatch):
    """Another process may write it between the two renames."""
    target = tmp_path / "folder"
    atomic_write_dir(target, lambda folder: (folder / "a").write_text("old"))
    rename = Path.rename

    def renames(path: Path, to: Path) -> Path:
        moved = rename(path, to)
        if path == target:
            monkeypatch.setattr(Path, "rename", rename)
            target.mkdir()
            (target / "b").write_text("another's")
        return moved

    monkeypatch.setattr(Path, "rename", renames)
    atomic_write_dir(target, lambda folder: (folder / "a").write_text("new"))
    assert [path.name for path in target.iterdir()] == ["a"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert (target / "a").read_text() == "new"


def test_a_folder_that_is_a_link_is_replaced_where_it_leads(tmp_path):
    (tmp_path / "disk" / "bundle").mkdir(parents=True)
    (tmp_path / "disk" / "bundle" / "old.txt").write_text("old")
    run = tmp_path / "run"
    run.mkdir()
    (run / "bundle").symlink_to(tmp_path / "disk" / "bundle")
    atomic_write_dir(run / "bundle", lambda beside: (beside / "new.txt").write_text("new"))
    assert (run / "bundle").is_symlink()
    assert [path.name for path in (tmp_path / "disk" / "bundle").iterdir()] == ["new.txt"]
    assert [path.name for path in run.iterdir()] == ["bundle"]


def test_a_link_that_was_moved_aside_is_removed_and_not_what_it_leads_to(tmp_path):
    (tmp_path / "kept").mkdir()
    old = tmp_path / f".bundle.{atomic_io._HOST}-1.old"
    old.symlink_to(tmp_path / "kept")
    (tmp_path / "bundle").mkdir()
    clean_partial_writes(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "kept"]
