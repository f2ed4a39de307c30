"""Two real processes over gloo: the work is split, one writes, and the result is that of one process."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from pipeline.data.codes import CodesDataset, read_manifest
from tests.pipeline.launched import launch


@pytest.fixture
def two_runs(by_processes):
    """The tiny run by one process and by two."""
    return by_processes / "runs" / "by1", by_processes / "runs" / "by2"


def test_gradients_and_codebook_are_those_of_the_whole_batch(two_runs):
    """Equal after all steps but for the order of sums: shares of a batch are averaged right, text tokens and codebook included."""
    for stage in ("tokenizer", "prior"):
        one, two = (load_file(run / stage / "model.safetensors") for run in two_runs)
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, atol=1e-3, rtol=1e-3, msg=lambda m, k=f"{stage}.{key}": f"{k}: {m}")


def test_an_adversary_trains_on_two_processes_as_on_one(tmp_path):
    """Its own pass, its anchors and the weight it is given: the same to what the order of sums and the weight of each half allow."""
    import yaml

    from tests.pipeline.conftest import TINY

    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, "output_dir": str(tmp_path / "runs"), "precision": "fp32"}))
    options = ["--tokenizer.objective.adversary.weight", "1", "--tokenizer.objective.adversary.width", "16", "--tokenizer.train.steps", "4",
               "--tokenizer.objective.adversary.start", "1", "--tokenizer.objective.adversary.lecam", "0.1",
               "--tokenizer.objective.adversary.adaptive", "false"]  # fmt: skip
    weights = []
    for processes in (1, 2):
        launch(tmp_path, processes, "train-tokenizer", "--config", str(path), "--name", f"by{processes}", *options)
        weights.append(load_file(tmp_path / "runs" / f"by{processes}" / "tokenizer" / "checkpoints" / "step-4" / "weights.safetensors"))
    assert "discriminator.anchors" in weights[0]
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, atol=2e-3, rtol=2e-3, msg=lambda m, k=key: f"{k}: {m}")


def test_encoding_is_split_and_whole(two_runs):
    manifests = [read_manifest(run / "codes") for run in two_runs]
    assert [len(m["files"]["train"]) for m in manifests] == [1, 2]
    codes = CodesDataset(two_runs[1] / "codes", "train")
    assert len(codes) == 40 and codes.source_rows(range(40)) == list(range(40))


def test_one_process_writes(two_runs):
    assert sorted(p.name for p in (two_runs[1] / "prior" / "checkpoints").iterdir()) == ["step-4", "step-6"]
    held_out = [json.loads((run / "prior" / "settings.json").read_text())["held_out"]["nats_per_code"] for run in two_runs]
    assert held_out[0] == pytest.approx(held_out[1], rel=0.2)


def test_pictures_do_not_depend_on_the_number_of_processes(two_runs, tmp_path):
    prompts = ["a red circle", "a blue star", "a green heart"]
    for processes in (1, 2):
        launch(tmp_path, processes, "generate", "--bundle", str(two_runs[0] / "bundle"), *prompts, "--num", "2",
               "--out", str(tmp_path / f"by{processes}"))  # fmt: skip
    for file in sorted((tmp_path / "by1").iterdir()):
        assert file.read_bytes() == (tmp_path / "by2" / file.name).read_bytes(), file.name
    assert len(list((tmp_path / "by2").glob("0*.png"))) == 6
