"""Hostile inputs of every kind work or are refused, and the benchmark that tries them sees what is
wrong."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from benchmarks.attack.trial import FORGED, Input, results

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_500_hostile_inputs_work_or_are_refused():
    """In processes of their own, whose ends would show aborts. More processor time than the
    benchmark allows, since the machine may do other work."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.attack", "--inputs", "500", "--seconds", "60"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines()[2:-1]]
    counts = {row[0].strip(): [int(cell) for cell in row[1:]] for row in rows}
    assert sum(inputs for inputs, *_ in counts.values()) == 500
    for kind, (inputs, refused, working, findings) in counts.items():
        assert refused + working == inputs and not findings, kind
    # Neither is everything refused at the door.
    assert sum(working for _, _, working, _ in counts.values()) > 25


def raises(error: BaseException) -> None:
    raise error


def waits() -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("use", "outcome"),
    [
        (lambda folder: [], "works"),
        (lambda folder: ["a CANARY"], "read CANARY"),
        (lambda folder: raises(ValueError("one line")), "refused"),
        (lambda folder: raises(OSError("one line")), "refused"),
        (lambda folder: raises(ValueError(f"a name\n{FORGED}: line")), "forged line"),
        (lambda folder: raises(TypeError("a bug")), "traceback TypeError"),
        (lambda folder: raises(MemoryError()), "traceback MemoryError"),
        (lambda folder: waits(), "hang"),
        (lambda folder: os.abort(), "abort"),
        (lambda folder: len(b"a" * 2**29) * [], "memory"),
        (lambda folder: (folder / "../outside/secret.txt").read_text() and [], "outside"),
        (lambda folder: open("/etc/passwd").close() or [], "outside"),
        (lambda folder: os.system("true") and [], "outside"),
        (lambda folder: __import__("this") and [], "outside"),
        (lambda folder: (folder / "new").touch() or [], "wrote"),
    ],
)
def test_what_an_input_does_is_seen(monkeypatch, tmp_path, use: Callable, outcome):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("benchmarks.attack.trial._IDLE", 30)
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    monkeypatch.setattr("benchmarks.attack.trial.MIB", own + 256)

    def make(chance, folder) -> Input:
        return Input("an input", partial(use, folder))

    (found,) = results("kind", make, [3], seed=0, seconds=1)
    assert found.outcome == outcome
    assert found.is_finding == (outcome not in ("works", "refused"))


def test_a_seed_makes_the_same_inputs(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))

    def make(chance, folder) -> Input:
        return Input(str(chance.random()), list)

    def names(first: int, seed: int) -> list[str]:
        return [one.name for one in results("kind", make, range(first, 4), seed, 60)]

    assert names(0, seed=5)[2:] == names(2, seed=5)
    assert names(0, seed=5) != names(0, seed=6)
