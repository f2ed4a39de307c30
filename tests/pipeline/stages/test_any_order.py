"""A whole run of a prior for any order that also captions: from YAML to edits, with every way of training that it may be asked for."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import TextToImagePipeline
from pipeline.cli.main import main
from pipeline.config.load import load_experiment
from pipeline.stages.compare_tokenizers import _made_with
from pipeline.stages.manifest import upgrade_settings
from stage2_prior import ImagePrior
from tests.helpers.cli import fails

pytestmark = pytest.mark.slow

ANY_ORDER = [
    "--data.max_objects", "2", "--prior.train.order", "random", "--sequence.image_first", "0.34", "--prior.model.kv_heads", "1",
    "--prior.train.gradient_accumulation_steps", "2", "--prior.train.schedule", "wsd", "--prior.train.activation_checkpointing", "true",
    "--text.bpe_dropout", "0.1", "--sampling.steps", "4", "--precision", "fp32",
]  # fmt: skip


def test_a_run_in_any_order(tiny_yaml, tmp_path, capsys):
    arguments = ["--config", str(tiny_yaml), *ANY_ORDER]
    assert main(["run", *arguments]) == 0, capsys.readouterr().err
    folder = tmp_path / "runs" / "tiny"
    prior = ImagePrior.load(folder / "bundle" / "prior")
    assert (prior.config.trained_order, prior.config.trained_image_first, prior.kv_heads) == ("random", True, 1)
    held_out = json.loads((folder / "prior" / "settings.json").read_text())["held_out"]
    assert set(held_out) == {"nats_per_code", "nats_per_text_token", "nats_per_caption_token"}
    assert main(["evaluate", *arguments, "--max-images", "4"]) == 0
    figures = json.loads((folder / "evaluation.json").read_text())
    assert {"prompt_accuracy_16_steps", "edit_accuracy", "nats_per_caption_token"} <= set(figures)
    pipe = TextToImagePipeline.from_pretrained(folder / "bundle")
    assert pipe.defaults.steps == 4
    picture = Image.new("RGB", (32, 32), "red")
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (0, 0, 8, 8))
    out = pipe.edit(picture, mask, "a red circle", steps=1)
    assert np.array_equal(np.asarray(out.images[0])[8:], np.asarray(picture)[8:])
    assert len(pipe.caption(picture, num=2)) == 2
    assert main(["train-prior", *arguments]) == 0  # done already


def test_an_interrupted_run_in_any_order_ends_as_an_uninterrupted_one(tiny_yaml, tmp_path, capsys):
    arguments = ["--config", str(tiny_yaml), *ANY_ORDER, "--sampling.steps", "null", "--prior.train.order", "annealed"]
    assert main(["run", *arguments]) == 0, capsys.readouterr().err
    prior = tmp_path / "runs" / "tiny" / "prior"
    whole = ImagePrior.load(prior).state_dict()
    # As if it had been killed after the fourth step.
    shutil.rmtree(prior / "checkpoints" / "step-6")
    (prior / "model.safetensors").unlink()
    written = json.loads((prior / "settings.json").read_text())
    (prior / "settings.json").write_text(json.dumps({"settings": written["settings"]}))
    assert main(["train-prior", *arguments]) == 0
    assert "going on from" in capsys.readouterr().out
    again = ImagePrior.load(prior).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in whole.items())


def test_codes_of_another_order_are_another_prior(tiny_yaml, tmp_path, capsys):
    assert main(["run", "--config", str(tiny_yaml)]) == 0
    fails(capsys, ["train-prior", "--config", tiny_yaml, "--prior.train.order", "random"], "made with other settings (train.order)")
    fails(capsys, ["train-prior", "--config", tiny_yaml, "--sequence.image_first", "0.5"], "made with other settings (sequence)")
    fails(capsys, ["evaluate", "--config", tiny_yaml, "--sampling.steps", "4"], "several codes a step need", status=2)


def test_a_run_that_was_made_before_these_settings_goes_on(tiny_yaml, tmp_path):
    assert main(["run", "--config", str(tiny_yaml)]) == 0
    path = tmp_path / "runs" / "tiny" / "prior" / "settings.json"
    written = json.loads(path.read_text())
    made = written["settings"]
    del made["sequence"], made["model"]["kv_heads"], made["text"]["bpe_dropout"]
    for name in ("order", "anneal", "activation_checkpointing", "gradient_accumulation_steps", "schedule", "decay_ratio"):
        del made["train"][name]
    del made["codes"]["settings"]["encode"]["flip"]
    path.write_text(json.dumps(written))
    codes = tmp_path / "runs" / "tiny" / "codes" / "codes.json"
    manifest = json.loads(codes.read_text())
    del manifest["settings"]["encode"]["flip"]
    codes.write_text(json.dumps(manifest))
    before = path.stat().st_mtime_ns
    for verb in ("encode", "train-prior"):
        assert main([verb, "--config", str(tiny_yaml)]) == 0
    assert path.stat().st_mtime_ns == before


def test_a_row_of_a_comparison_that_was_made_before_these_settings_is_the_same(tiny_yaml):
    now = _made_with(load_experiment(["--config", str(tiny_yaml)]), None)
    then = json.loads(json.dumps(now))
    del then["sequence"], then["encode"]["flip"], then["text"]["bpe_dropout"], then["prior"]["model"]["kv_heads"], then["precision"]
    for name in ("gradient_accumulation_steps", "schedule", "decay_ratio"):
        del then["prior"]["train"][name], then["tokenizer"]["train"][name]
    for name in ("order", "anneal", "activation_checkpointing"):
        del then["prior"]["train"][name]
    assert upgrade_settings(then) == now
    then["prior"]["train"]["steps"] += 1
    assert upgrade_settings(then) != now
