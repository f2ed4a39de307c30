"""Two runs in one run folder: the second is refused and writes nothing. A stale lock does not
block."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from pipeline.cli.main import main
from pipeline.config.load import load_experiment
from pipeline.stages.run_lock import run_lock
from tests.helpers.cli import fails

HOLDER = {"pid": 4321, "host": "elsewhere", "since": "2026-01-02 03:04:05 +0000"}


@contextmanager
def held(folder: Path):
    """The folder is locked by another run."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        file.write(json.dumps(HOLDER))
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def listing(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("stage", ["run", "train-tokenizer", "encode", "train-prior"])
def test_second_run_in_a_folder_is_refused(tiny_yaml, tmp_path, capsys, stage):
    folder = tmp_path / "runs" / "tiny"
    with held(folder):
        before = listing(tmp_path)
        message = (
            f"{folder} is in use by process 4321 on elsewhere since 2026-01-02 03:04:05 "
            "+0000; wait for it or stop it, or choose"
        )
        fails(capsys, [stage, "--config", tiny_yaml], message)
        assert listing(tmp_path) == before and json.loads((folder / ".lock").read_text()) == HOLDER


def test_stale_lock_of_a_killed_run_is_removed(tiny_yaml, tmp_path):
    folder = tmp_path / "runs" / "tiny"
    with held(folder):
        pass
    assert (folder / ".lock").exists()
    assert main(["train-tokenizer", "--config", str(tiny_yaml)]) == 0
    assert (folder / "tokenizer" / "model.safetensors").exists() and not (folder / ".lock").exists()


def test_a_process_holds_its_folder_until_it_is_killed(tiny_yaml):
    experiment = load_experiment(["--config", str(tiny_yaml)])
    pid = os.fork()
    if pid == 0:
        try:
            with run_lock(experiment.folder, 30):
                time.sleep(600)
        finally:
            os._exit(1)
    lock = experiment.folder / ".lock"
    try:
        while not (lock.is_file() and lock.read_text().endswith("\n")):
            assert os.waitpid(pid, os.WNOHANG) == (0, 0)
            time.sleep(0.01)
        with (
            pytest.raises(
                ValueError, match=rf"is in use by process {pid} on {socket.gethostname()} since 20"
            ),
            run_lock(experiment.folder, 30),
        ):
            pytest.fail("it was not refused")
    finally:
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    with run_lock(experiment.folder, 30):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
        with run_lock(experiment.folder, 30):  # the stages of a command come in after the command
            pass
        assert lock.exists()
    assert not lock.exists()


def test_failed_stage_releases_the_lock_and_removes_an_empty_folder(tiny_yaml, tmp_path):
    experiment = load_experiment(["--config", str(tiny_yaml)])
    for _ in range(2):
        with pytest.raises(RuntimeError), run_lock(experiment.folder, 30):
            raise RuntimeError
        assert not (tmp_path / "runs").exists()


def test_export_to_another_folder_needs_no_run_lock(finished_run, tmp_path):
    path, folder = finished_run
    with held(folder):
        assert main(["encode", "--config", str(path), "--out", str(tmp_path / "codes")]) == 0
    (folder / ".lock").unlink()


def test_unsupported_locking_is_noted_and_the_run_continues(tiny_yaml, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "pipeline")
    experiment = load_experiment(["--config", str(tiny_yaml)])

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with run_lock(experiment.folder, 30):
        assert not list(experiment.folder.iterdir())
    assert not experiment.folder.exists()
    assert (
        "cannot be locked ([Errno 37] No locks available); see that no other run writes to it"
        in caplog.text
    )


def test_a_holder_that_ends_between_opening_and_locking_is_no_holder(tmp_path, monkeypatch):
    """It removes its file: a lock on what was opened would keep out nobody."""
    lock = tmp_path / ".lock"
    flock = fcntl.flock

    def ends_now(file: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        lock.unlink()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", ends_now)
    with run_lock(tmp_path, 30):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    assert not lock.exists()


def test_finished_run_is_read_from_a_read_only_disk(finished_run, tmp_path):
    path, folder = finished_run
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "--bind", str(folder.parent), str(disk)], capture_output=True
    ).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(disk)], check=True)
        assert main(["train-tokenizer", "--config", str(path), "--output_dir", str(disk)]) == 0
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_two_exports_to_one_folder_are_refused(finished_run, tmp_path, capsys):
    """The folder beside the target, where they are until all of them are there, is held, and not
    the tokenizer's run."""
    path, folder = finished_run
    command = [
        "encode",
        "--config",
        str(path),
        "--tokenizer",
        str(folder / "tokenizer"),
        "--out",
        str(tmp_path / "codes"),
    ]
    with held(tmp_path / ".codes.arrow"), held(folder):
        fails(capsys, command, f"{tmp_path / '.codes.arrow'} is in use by process 4321")
    (folder / ".lock").unlink()
    assert main(command) == 0 and sorted(p.name for p in tmp_path.iterdir()) == ["codes"]
