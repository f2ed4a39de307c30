"""A whole run, small enough for every test to have: 32x32 shapes, 4x4 codes, a few steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.helpers.experiments import TINY


@pytest.fixture
def tiny_yaml(tmp_path: Path) -> Path:
    """The tiny experiment as a file, writing to tmp_path/runs."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, "output_dir": str(tmp_path / "runs")}))
    return path


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run carried out once by `minidalle run`: (its YAML, its folder). Tests must not change
    it."""
    from pipeline.cli.main import main

    folder = tmp_path_factory.mktemp("finished")
    path = folder / "tiny.yaml"
    path.write_text(
        yaml.safe_dump({**TINY, "output_dir": str(folder / "runs"), "trackers": ["tensorboard"]})
    )
    assert main(["run", "--config", str(path)]) == 0
    return path, folder / "runs" / "tiny"


@pytest.fixture(scope="session")
def by_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs by 1, 2 and 4 processes (runs/by1 and so on), what each logged and each process's
    networks. Nothing in them is drawn by process: no caption is dropped. Codes die and restart.
    Tests must not change it."""
    from tests.helpers.launch import CHECK, PROCESSES, WATCHED, launch, settings

    folder = tmp_path_factory.mktemp("by_processes")
    options = [
        "--prior.objective.caption_dropout",
        "0",
        "--tokenizer.train.log_every",
        "1",
        "--prior.train.log_every",
        "1",
        "--tokenizer.model.num_codes",
        "64",
        "--tokenizer.model.vq.dead_code_threshold",
        "0.9",
        "--tokenizer.model.vq.dead_code_check_every",
        "2",
        "--encode.images_per_shard",
        "7",
    ]
    for processes in PROCESSES:
        launch(
            folder,
            processes,
            "run",
            *settings(folder),
            "--name",
            f"by{processes}",
            *options,
            script=WATCHED + CHECK,
        )
    return folder
