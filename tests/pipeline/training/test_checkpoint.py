"""Checkpoints that are corrupted, cannot be written, or have another format: consequences and
messages."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.runtime import atomic_io
from pipeline.runtime.atomic_io import atomic_write_dir, clean_partial_writes
from pipeline.runtime.signals import RecoverableError
from pipeline.training import checkpoint
from pipeline.training.checkpoint import (
    FORMAT,
    CheckpointState,
    CorruptedCheckpoint,
    State,
    _load_optimizer,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    save_checkpoint,
    verify_checkpoint,
)
from tests.helpers.cli import fails
from tests.helpers.training import train

NETWORK = nn.Linear(2, 2)


def save(folder: Path, *steps: int, keep: int = 9, verified: set[Path] = frozenset()) -> set[Path]:  # type: ignore[assignment]
    for step in steps:
        verified = save_checkpoint(
            folder,
            State(step, {"error": 0.5}, 3),
            CheckpointState({"a": NETWORK.state_dict()}, {}, []),
            keep=keep,
            verified=verified,
        )
    return verified


def load(path: Path) -> State:
    return load_checkpoint(path, {"a": nn.Linear(2, 2)}, {}, [])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def of_step_7(path: Path) -> None:
    path.write_text(path.read_text().replace('"step": 4', '"step": 7'))


DAMAGE = {
    "cut weights": ("weights.safetensors", cut, r"weights\.safetensors has 157 of 160 bytes"),
    "changed weights": (
        "weights.safetensors",
        flip_a_bit,
        r"weights\.safetensors is not what was written \(its hash differs\)",
    ),
    "changed state": (
        "state.json",
        lambda p: p.write_text(p.read_text().replace("0.5", "0.6")),
        r"state\.json is not what was written",
    ),
    "no average": ("ema.safetensors", Path.unlink, r"ema\.safetensors is missing"),
    "no manifest": ("manifest.json", Path.unlink, r"manifest\.json is missing"),
    "cut manifest": ("manifest.json", cut, r"manifest\.json cannot be read"),
    "empty manifest": (
        "manifest.json",
        lambda p: p.write_text("[]"),
        r"manifest\.json cannot be read",
    ),
    "manifest of another": ("manifest.json", of_step_7, r"manifest\.json is of step 7"),
    "folder instead of a file": ("state.json", lambda p: (p.unlink(), p.mkdir()), r"state\.json"),
    "nothing in it": ("", lambda p: (shutil.rmtree(p), p.mkdir()), r"manifest\.json is missing"),
}


def test_checkpoint_manifest_lists_its_contents(tmp_path):
    save(tmp_path, 4)
    manifest = json.loads((tmp_path / "step-4" / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"]) == (FORMAT, 4)
    assert sorted([*manifest["files"], "manifest.json"]) == names(tmp_path / "step-4")
    assert load(tmp_path / "step-4") == State(4, {"error": 0.5}, 3)


@pytest.mark.parametrize("how", DAMAGE)
def test_corruption_is_detected_and_named(tmp_path, how):
    save(tmp_path, 2, 4)
    file, break_it, message = DAMAGE[how]
    break_it(tmp_path / "step-4" / file)
    with pytest.raises(CorruptedCheckpoint, match=message):
        load(tmp_path / "step-4")
    said: list[str] = []
    path, state = load_newest(tmp_path, {"a": nn.Linear(2, 2)}, {}, [], said.append)
    assert path.name == "step-2" and state.step == 2
    assert (
        len(said) == 1
        and "step-4 is corrupted (" in said[0]
        and "resuming from step-2, the one before" in said[0]
    )


@pytest.mark.parametrize("how", ["cut weights", "changed weights", "no manifest"])
def test_training_resumes_from_the_checkpoint_before_a_corrupted_one(tmp_path, caplog, how):
    whole, metrics = train(tmp_path / "whole")
    train(tmp_path / "run", steps=9)
    file, break_it, _ = DAMAGE[how]
    break_it(tmp_path / "run" / "checkpoints" / "step-9" / file)
    caplog.clear()
    again, metrics_again = train(tmp_path / "run")
    lines = [line for line in caplog.messages if "step-9 is corrupted" in line]
    assert len(lines) == 1 and lines[0].startswith("line: ")
    for key, value in whole.network.state_dict().items():
        assert torch.equal(value, again.network.state_dict()[key]), key
    assert metrics == metrics_again and names(tmp_path / "run" / "checkpoints") == [
        "step-8",
        "step-9",
    ]
    assert load_newest(tmp_path / "run" / "checkpoints", {}, {}, [], pytest.fail)


def test_error_names_all_corrupted_checkpoints(tmp_path):
    save(tmp_path, 2, 4)
    (tmp_path / "step-2" / "state.json").unlink()
    cut(tmp_path / "step-4" / "weights.safetensors")
    with pytest.raises(
        ValueError,
        match=r"every checkpoint in .* is corrupted: step-4 \(.*157 of 160.*\), step-2 "
        r"\(state.json "
        r"is missing\)",
    ):
        load_newest(tmp_path, {"a": nn.Linear(2, 2)}, {}, [], pytest.fail)


def test_corrupted_checkpoints_do_not_count_as_kept(tmp_path):
    save(tmp_path, 2, 4, 6)
    flip_a_bit(tmp_path / "step-4" / "weights.safetensors")
    save(tmp_path, 8, keep=3)
    assert names(tmp_path) == ["step-2", "step-6", "step-8"]
    cut(tmp_path / "step-8" / "weights.safetensors")  # and training resumed from 6
    save(tmp_path, 7, keep=2)
    assert names(tmp_path) == ["step-6", "step-7"]


def test_surplus_checkpoints_are_removed_on_the_next_start(tmp_path):
    train(tmp_path, save_total_limit=3)
    assert names(tmp_path / "checkpoints") == ["step-6", "step-8", "step-9"]
    train(tmp_path, save_total_limit=2)
    assert names(tmp_path / "checkpoints") == ["step-8", "step-9"]


def test_verified_checkpoint_is_not_read_again(tmp_path, monkeypatch):
    verified = save(tmp_path, 2, 4, keep=3)
    monkeypatch.setattr(checkpoint, "verify_checkpoint", pytest.fail)
    assert save(tmp_path, 6, 8, keep=3, verified=verified) == {
        tmp_path / f"step-{step}" for step in (4, 6, 8)
    }
    assert names(tmp_path) == ["step-4", "step-6", "step-8"]


def test_corrupted_best_checkpoint_is_replaced(tmp_path, caplog):
    train(tmp_path, steps=8, eval_every=2, save_best=True)
    best = list_checkpoints(tmp_path / "best")[0]
    assert best.name == "step-2"
    flip_a_bit(best / "ema.safetensors")
    caplog.clear()
    again, _ = train(tmp_path, steps=8, eval_every=2, save_best=True)
    out = caplog.text
    assert (
        f"{best} is corrupted (ema.safetensors is not what was written" in out
        and "chosen from here on alone" in out
    )
    assert names(tmp_path / "best") == ["step-8"]
    last, _ = train(tmp_path / "last", steps=8, eval_every=2)
    assert all(
        torch.equal(value, again.network.state_dict()[key])
        for key, value in last.network.state_dict().items()
    )


def test_last_weights_are_saved_if_the_best_is_corrupted(tmp_path, caplog):
    spoil = lambda step: step == 7 and flip_a_bit(tmp_path / "best" / "step-2" / "ema.safetensors")  # noqa: E731
    spoilt, _ = train(tmp_path, steps=8, eval_every=2, save_best=True, on_step=spoil)
    assert "step-2 is corrupted (ema.safetensors is not" in caplog.text
    last, _ = train(tmp_path / "last", steps=8, eval_every=2)
    assert all(
        torch.equal(value, spoilt.network.state_dict()[key])
        for key, value in last.network.state_dict().items()
    )


def test_partial_writes_are_cleaned_and_restored(tmp_path):
    save(tmp_path, 2)
    (tmp_path / ".step-4.writing").mkdir()
    (tmp_path / ".step-4.writing" / "weights.safetensors").write_bytes(b"half")
    (tmp_path / ".x.json.writing").write_text("half")
    (tmp_path / "step-2").rename(tmp_path / ".step-2.old")  # killed between the two renames
    clean_partial_writes(tmp_path)
    assert names(tmp_path) == ["step-2"] and load(tmp_path / "step-2").step == 2
    shutil.copytree(tmp_path / "step-2", tmp_path / ".step-2.old")  # killed after them
    clean_partial_writes(tmp_path)
    assert names(tmp_path) == ["step-2"]


def test_interrupted_folder_replacement_is_recovered(tmp_path, monkeypatch):
    target = tmp_path / "bundle"
    atomic_write_dir(target, lambda folder: (folder / "a").write_text("old"))
    rename = Path.rename

    def killed(path: Path, to: Path) -> Path:
        if path.name.startswith(".bundle.") and path.suffix == ".writing":
            raise KeyboardInterrupt
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        atomic_write_dir(target, lambda folder: (folder / "a").write_text("new"))
    assert not target.exists()
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="full"):
        atomic_write_dir(target, lambda folder: (_ for _ in ()).throw(OSError("full")))
    assert names(tmp_path) == ["bundle"] and (target / "a").read_text() == "old"


def test_files_are_synced_before_rename(tmp_path, monkeypatch):
    order: list[str] = []
    sync, rename = atomic_io._sync, Path.rename
    monkeypatch.setattr(
        atomic_io, "_sync", lambda path: (order.append(f"sync {path.name}"), sync(path))
    )
    monkeypatch.setattr(
        Path, "rename", lambda path, to: (order.append("rename"), rename(path, to))[1]
    )
    save(tmp_path / "checkpoints", 2)
    files = [
        "weights.safetensors",
        "ema.safetensors",
        "optimizer.safetensors",
        "state.json",
        "manifest.json",
        atomic_io._beside(tmp_path / "step-2", "writing").name,
    ]
    assert sorted(order[:6]) == sorted(f"sync {name}" for name in files) and order[6:] == [
        "rename",
        "sync checkpoints",
    ]


# What cannot be written


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own of 256 KiB, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("needs the right to mount a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def stopped_and_gone_on(folder: Path, errors: tuple[int, ...], spoil, mend) -> None:
    """A training whose disk is spoilt after step 4 stops, loses nothing, and goes on when it is
    mended."""
    whole, _ = train(folder.parent / "whole")
    seen: list[int] = []

    def spoilt(step: int) -> None:
        if step == 5 and not seen:
            seen.append(step)
            spoil()

    with pytest.raises(
        RecoverableError,
        match=r"line: the checkpoint of step 6 could not be written .*last good checkpoint is "
        r".*step-4",
    ) as caught:
        train(folder, on_step=spoilt)
    assert any(os.strerror(number) in str(caught.value) for number in errors), caught.value
    mend()
    assert load_newest(folder / "checkpoints", {}, {}, [], pytest.fail)[1].step == 4
    again, _ = train(folder)
    assert all(
        torch.equal(value, again.network.state_dict()[key])
        for key, value in whole.network.state_dict().items()
    )
    assert names(folder / "checkpoints") == ["step-8", "step-9"]


def test_a_full_disk_costs_no_checkpoint(small_disk):
    filler = small_disk / "filler"

    def fill() -> None:
        with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(b"x" * 4096)

    stopped_and_gone_on(small_disk / "run", (errno.ENOSPC,), fill, filler.unlink)


def test_a_disk_that_turns_read_only_costs_no_checkpoint(small_disk):
    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(small_disk)], check=True)

    stopped_and_gone_on(
        small_disk / "run", (errno.EROFS,), lambda: remount("ro"), lambda: remount("rw")
    )


def test_file_size_limit_costs_no_checkpoint(tmp_path):
    """As a quota does, for any user."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    stopped_and_gone_on(
        tmp_path / "run",
        (errno.EFBIG,),
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard)),
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard)),
    )


def test_file_in_place_of_the_checkpoint_folder_is_reported(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(
        RecoverableError,
        match=r"the checkpoint of step 2 could not be written .*there is no checkpoint yet",
    ):
        train(tmp_path)


# Formats


def test_a_checkpoint_without_its_manifest_is_corrupted(tmp_path):
    train(tmp_path, steps=4)
    (tmp_path / "checkpoints" / "step-4" / "manifest.json").unlink()
    assert verify_checkpoint(tmp_path / "checkpoints" / "step-4") == "manifest.json is missing"


@pytest.mark.parametrize(
    ("number", "age"), [(FORMAT + 1, "a newer"), (0, "an older"), ("x", "an older")]
)
def test_checkpoint_of_another_format_is_refused_not_skipped(tmp_path, number, age):
    save(tmp_path, 2, 4)
    manifest = tmp_path / "step-4" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": number}))
    with pytest.raises(
        ValueError,
        match=rf"step-4 is of format {number}, which {age} version of this program wrote, and this "
        r"one reads 1",
    ):
        load_newest(tmp_path, {"a": nn.Linear(2, 2)}, {}, [], pytest.fail)


def test_a_run_folder_of_another_format_is_refused_before_anything_is_written(
    finished_run, tmp_path, capsys
):
    path, folder = finished_run
    copy = Path(shutil.copytree(folder, tmp_path / "runs" / "tiny"))
    arguments = ["--config", path, "--output_dir", tmp_path / "runs"]
    settings = copy / "tokenizer" / "settings.json"
    written = json.loads(settings.read_text())
    assert written["format"] == FORMAT
    settings.write_text(json.dumps(written | {"format": 9}))
    before = {p: p.stat().st_mtime_ns for p in copy.rglob("*") if p.is_file()}
    for stage in ("train-tokenizer", "encode", "train-prior", "run"):
        fails(
            capsys,
            [stage, *arguments],
            "tokenizer is of format 9, which a newer version of this program wrote, and this one "
            "reads 1",
        )
    assert before == {p: p.stat().st_mtime_ns for p in copy.rglob("*") if p.is_file()}
    for name in ("settings.json", "settings.backup.json"):
        (copy / "tokenizer" / name).write_text('{"settings":')
    fails(capsys, ["train-tokenizer", *arguments], "settings.json is truncated or corrupted")


def test_moments_of_other_parameters_are_refused():
    """Fused AdamW would read past their end."""
    parameter = torch.nn.Parameter(torch.zeros(4, 3))
    optimizer = torch.optim.AdamW([parameter])
    fitting = {"0.exp_avg": torch.ones(4, 3), "0.step": torch.tensor(5.0)}
    _load_optimizer(optimizer, fitting)
    assert torch.equal(optimizer.state[parameter]["exp_avg"], torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"the moment 0\.exp_avg of shape \(3,\) for a parameter"):
        _load_optimizer(optimizer, fitting | {"0.exp_avg": torch.ones(3)})
