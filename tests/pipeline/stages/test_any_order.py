"""A whole run of an any-order prior that also captions: from YAML to edits, with every training
option."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import TextToImagePipeline
from pipeline.cli.main import main
from stage2_prior import PriorModule
from tests.helpers.cli import fails

pytestmark = pytest.mark.slow

ANY_ORDER = [
    "--data.shapes.max_objects",
    "2",
    "--prior.train.code_order",
    "random",
    "--sequence.captioning_fraction",
    "0.34",
    "--prior.model.kv_heads",
    "1",
    "--prior.train.gradient_accumulation_steps",
    "2",
    "--prior.train.schedule",
    "wsd",
    "--prior.train.activation_checkpointing",
    "true",
    "--text.bpe_dropout",
    "0.1",
    "--sampling.num_inference_steps",
    "4",
    "--precision",
    "fp32",
]


def test_whole_run_in_any_order(tiny_yaml, tmp_path, capsys):
    arguments = ["--config", str(tiny_yaml), *ANY_ORDER]
    assert main(["run", *arguments]) == 0, capsys.readouterr().err
    folder = tmp_path / "runs" / "tiny"
    prior = PriorModule.from_pretrained(folder / "bundle" / "prior")
    assert (prior.config.trained_order, prior.config.trained_image_first, prior.kv_heads) == (
        "random",
        True,
        1,
    )
    held_out = json.loads((folder / "prior" / "settings.json").read_text())["held_out"]
    assert set(held_out) == {"nats_per_code", "nats_per_text_token", "nats_per_caption_token"}
    assert main(["evaluate", *arguments, "--max-images", "4"]) == 0
    metrics = json.loads((folder / "evaluation.json").read_text())
    assert {"prompt_accuracy_16_steps", "edit_accuracy", "nats_per_caption_token"} <= set(metrics)
    pipe = TextToImagePipeline.from_pretrained(folder / "bundle")
    assert pipe.defaults.num_inference_steps == 4
    image = Image.new("RGB", (32, 32), "red")
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (0, 0, 8, 8))
    out = pipe.edit(image, mask, "a red circle", num_inference_steps=1)
    assert np.array_equal(np.asarray(out.images[0])[8:], np.asarray(image)[8:])
    assert len(pipe.caption(image, num=2)) == 2
    assert main(["train-prior", *arguments]) == 0  # done already


def test_an_interrupted_run_in_any_order_ends_as_an_uninterrupted_one(tiny_yaml, tmp_path, capsys):
    arguments = [
        "--config",
        str(tiny_yaml),
        *ANY_ORDER,
        "--sampling.num_inference_steps",
        "null",
        "--prior.train.code_order",
        "annealed",
    ]
    assert main(["run", *arguments]) == 0, capsys.readouterr().err
    prior = tmp_path / "runs" / "tiny" / "prior"
    whole = PriorModule.from_pretrained(prior).state_dict()
    # As if it had been killed after the fourth step.
    shutil.rmtree(prior / "checkpoints" / "step-6")
    (prior / "model.safetensors").unlink()
    written = json.loads((prior / "settings.json").read_text())
    (prior / "settings.json").write_text(json.dumps({"format": 1, "settings": written["settings"]}))
    assert main(["train-prior", *arguments]) == 0
    assert "resuming from" in capsys.readouterr().out
    again = PriorModule.from_pretrained(prior).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in whole.items())


def test_another_code_order_is_another_prior(tiny_yaml, tmp_path, capsys):
    assert main(["run", "--config", str(tiny_yaml)]) == 0
    fails(
        capsys,
        ["train-prior", "--config", tiny_yaml, "--prior.train.code_order", "random"],
        "made with other settings (train.code_order)",
    )
    fails(
        capsys,
        ["train-prior", "--config", tiny_yaml, "--sequence.captioning_fraction", "0.5"],
        "made with other settings (sequence)",
    )
    fails(
        capsys,
        ["evaluate", "--config", tiny_yaml, "--sampling.num_inference_steps", "4"],
        "several codes per step need",
        status=2,
    )
