"""What the processes of a run share, and what importing and calling the library leaves alone."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from pipeline import TextToImagePipeline
from pipeline.cli.main import COMMANDS, main
from pipeline.runtime.distributed import make_accelerator

ROOT = Path(__file__).parents[3]


def test_making_an_accelerator_changes_no_warning_filter(tmp_path):
    before = list(warnings.filters)
    make_accelerator(tmp_path, [], 30)
    assert warnings.filters == before


def test_the_launcher_does_not_choose_the_precision(tmp_path):
    """`accelerate launch` sets a variable from its default configuration."""
    code = (
        "import sys; from pathlib import Path; "
        "from pipeline.runtime.distributed import make_accelerator; "
        "print(make_accelerator(Path(sys.argv[1]), [], 30).mixed_precision)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=os.environ | {"ACCELERATE_MIXED_PRECISION": "bf16"},
    )
    assert done.stdout.strip() == "no"


def test_trackers_write_to_the_runs_logs(tmp_path):
    accelerator = make_accelerator(tmp_path / "name", ["tensorboard"], 30)
    accelerator.trackers[0].log({"a": 1.0}, step=1)
    accelerator.trackers[0].finish()
    assert list((tmp_path / "name" / "logs" / "name").glob("events*"))


def test_importing_the_library_leaves_progress_bars_on():
    code = (
        "import pipeline.inference.bundle, pipeline.stages.run; "
        "from transformers.utils import logging; print(logging.is_progress_bar_enabled())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "True"


def test_a_bundle_is_saved_without_bars(finished_run, tmp_path, capsys):
    pipe = TextToImagePipeline.from_pretrained(finished_run[1] / "bundle")
    capsys.readouterr()
    pipe.save_pretrained(tmp_path / "bundle")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("command", "tuned"), [("train-prior", [True]), ("codebook", [])])
def test_the_command_line_tunes_malloc_before_it_trains(command, tuned, monkeypatch):
    seen: list[bool] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("pipeline.runtime.devices.tune_malloc", lambda: seen.append(True))
    monkeypatch.setitem(COMMANDS, command, lambda: 0)
    assert main([command]) == 0
    assert seen == tuned
