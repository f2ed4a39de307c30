"""1, 2 and 4 processes over gloo: one loss curve, one codebook; and data that does not divide
evenly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.launch import PROCESSES, launch, settings

pytestmark = pytest.mark.distributed


def curve(folder: Path, stage: str, processes: int, metric: str) -> list[float]:
    rows = json.loads((folder / f"{stage}-of-{processes}.json").read_text())["logged"]
    return [values[f"{stage}/{metric}"] for _, values in rows if f"{stage}/{metric}" in values]


@pytest.mark.parametrize("processes", PROCESSES[1:])
@pytest.mark.parametrize(
    ("stage", "metric"),
    [
        ("tokenizer", "loss"),
        ("tokenizer", "psnr"),
        ("prior", "loss"),
        ("prior", "nats_per_text_token"),
    ],
)
def test_same_global_batch_gives_the_same_loss_curve(by_processes, stage, metric, processes):
    """Each step's metrics are of the whole batch, whoever had which part of it."""
    alone, together = (curve(by_processes, stage, n, metric) for n in (1, processes))
    assert len(alone) == 6 and len(set(alone)) == 6
    assert together == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("processes", PROCESSES[1:])
@pytest.mark.parametrize("stage", ["tokenizer", "prior"])
def test_all_processes_end_bit_identical(by_processes, stage, processes):
    """Averages are the first process's alone to use, so it is the buffers and, before they are
    averaged, the weights that count."""
    states = [
        torch.load(by_processes / f"{stage}-{rank}-of-{processes}.pt", weights_only=True)
        for rank in range(processes)
    ]
    for other in states[1:]:
        assert all(torch.equal(value, other[name]) for name, value in states[0].items())


def test_dead_codes_restart_in_the_shared_run(by_processes):
    for processes in PROCESSES:
        restarts = json.loads((by_processes / f"tokenizer-of-{processes}.json").read_text())[
            "restarts"
        ]
        # The first batch puts all of them somewhere.
        assert restarts[:-3] == [64] and all(0 < count < 64 for count in restarts[-3:])


def test_indivisible_data_does_not_hang(tmp_path):
    """Five images for batches of eight, fewer held out and fewer codes than the four processes;
    within a time, or this fails."""
    images = tmp_path / "images"
    images.mkdir()
    random = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(
            images / f"{i}.png"
        )
        (images / f"{i}.txt").write_text(f"image {i} of few")
    data = {"source": str(images), "image_size": 32, "val_fraction": 0.2}
    encode = {"batch_size": 16, "max_val_images": 10, "images_per_shard": 2}
    out = launch(
        tmp_path,
        4,
        "run",
        *settings(tmp_path, data=data, encode=encode),
        "--tokenizer.model.num_codes",
        "3",
        seconds=150,
    )
    assert "done in" in out
    codes = json.loads((tmp_path / "runs" / "tiny" / "codes" / "codes.json").read_text())
    assert codes["rows"] == {"train": 5, "held_out": 3} and len(codes["files"]["held_out"]) == 2
