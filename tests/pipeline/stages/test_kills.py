"""Trainings that are killed at random places end as uninterrupted ones: every file, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]


def test_killed_runs_end_bit_identical():
    """Before random steps and file operations, by SIGKILL; more of them by `python -m
    benchmarks.kills`."""
    options = [
        "--kills",
        "4",
        "--kills_a_run",
        "2",
        "--kinds",
        "step",
        "file",
        "--steps",
        "10",
        "--commands",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kills", *options],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = done.stdout.splitlines()[2:4]
    for stage, line in zip(("tokenizer", "prior"), rows, strict=True):
        name, kills, runs, identical, beyond, damaged = (
            cell.strip() for cell in line.strip("|").split("|")
        )
        assert (
            (name, beyond, damaged) == (stage, "0", "0")
            and int(kills) in (4, 5)  # a run may end before its second kill
            and runs == identical
            and int(runs) >= 2
        )
