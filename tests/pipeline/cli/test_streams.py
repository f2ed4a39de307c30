"""Commands whose output has no reader, or no room."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cli.main import main

ROOT = Path(__file__).parents[3]
COMMAND = [sys.executable, "-m", "pipeline.cli"]


def start(*arguments: str, **options) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*COMMAND, *arguments], env=environment, stderr=subprocess.PIPE, text=True, **options
    )


def test_a_reader_that_leaves_ends_nothing_and_shows_no_traceback():
    """`minidalle ... | head -1`, with a reader that reads nothing at all."""
    read, write = os.pipe()
    os.close(read)
    process = start("--help", stdout=write)
    os.close(write)
    assert process.communicate()[1] == "" and process.returncode == 0


def test_a_full_disk_of_the_output_is_one_line():
    with open("/dev/full", "w") as full:
        process = start("--help", stdout=full)
    error = process.communicate()[1]
    assert process.returncode == 1
    assert error == (
        "minidalle: cannot write standard output (No space left on device); free some space, or "
        "send it to another file\n"
    )


def test_work_goes_on_after_its_reader_is_gone(finished_run, tmp_path, monkeypatch):
    """As of a training whose terminal is closed: what is written does not depend on its lines."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w", buffering=1) as nobody:
        monkeypatch.setattr("sys.stdout", nobody)
        arguments = ["generate", "--bundle", str(finished_run[1] / "bundle"), "a", "--num-images"]
        assert main([*arguments, "1", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "samples.jsonl").is_file()


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_closed_streams_are_no_error(monkeypatch, stream):
    monkeypatch.setattr(f"sys.{stream}", None)
    assert main(["--help"]) == 0
