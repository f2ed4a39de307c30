"""Trainings that are killed at random places end as uninterrupted ones: every kept file, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("stage", ["tokenizer", "prior"])
def test_kills_cost_nothing(stage):
    """Before random steps and file operations, by SIGKILL; more of them by `python -m benchmarks.kills`."""
    options = ["--stages", stage, "--kills", "4", "--kills_a_run", "2", "--kinds", "step", "file", "--steps", "10"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kills", *options], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    name, kills, runs, identical, beyond, damaged = (cell.strip() for cell in done.stdout.splitlines()[2].strip("|").split("|"))
    assert (name, kills, beyond, damaged) == (stage, "4", "0", "0") and runs == identical and int(runs) >= 2
