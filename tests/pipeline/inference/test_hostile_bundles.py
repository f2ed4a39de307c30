"""Bundles that were changed on purpose work, or are refused in one line: without code, hangs,
aborts or much memory."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from stage1_tokenizer import ImageTokenizer
from stage2_prior import ImagePrior, PriorModule
from tests.helpers.pipelines import tiny_pipeline


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        pytest.param(["--changes", "60", "--sample", "60"], 40, id="60"),
        pytest.param(["--changes", "300", "--seed", "1"], 250, marks=pytest.mark.slow, id="all"),
    ],
)
def test_changed_bundles_are_refused_in_one_line(tmp_path, options, refused):
    """Each kind of change to each file, and some by chance; in a process of its own, whose end
    would show an abort, and which reads "y" if it asks."""
    tiny_pipeline(any_order=True).save_pretrained(tmp_path / "bundle")
    command = [sys.executable, "-m", "benchmarks.attack_bundles", tmp_path / "bundle"]
    done = subprocess.run(
        [*command, *options, "--seconds", "20"],
        input="y\n" * 100,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    last = (done.stderr.splitlines() or [""])[-1]
    assert done.returncode == 0, f"{done.stdout}\nthe last change was {last}"
    counts = json.loads(done.stdout.splitlines()[-1])
    assert set(counts) <= {"works", "refused"} and counts["refused"] > refused


@pytest.mark.parametrize("part", ["tokenizer", "prior"])
def test_one_flipped_bit_of_weights_is_refused_without_a_bundle_too(tmp_path, part):
    pipe = tiny_pipeline()
    model = getattr(pipe, part)
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).fingerprint == model.fingerprint
    weights = tmp_path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    of_transformers = {"tokenizer": ImageTokenizer, "prior": ImagePrior}[part]
    for load in (
        type(model).from_pretrained,
        of_transformers.from_pretrained,
        partial(of_transformers.from_pretrained, device_map=None),
    ):
        with pytest.raises(ValueError, match="was changed or damaged since; copy the folder"):
            load(tmp_path)


def test_models_of_earlier_versions_have_no_fingerprint_and_load(tmp_path):
    prior = tiny_pipeline().prior
    prior.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    values = json.loads(config.read_text())
    assert values.pop("saved_fingerprint") == prior.fingerprint
    config.write_text(json.dumps(values))
    assert type(prior).from_pretrained(tmp_path).fingerprint == prior.fingerprint


@pytest.mark.parametrize(
    ("part", "section", "key", "value", "message"),
    [
        ("tokenizer", "model", "width", 2**62, r"TokenizerConfig.width is about 2\^62"),
        ("tokenizer", "model", "width", 2**30, "describes no tokenizer that can be built"),
        ("tokenizer", "model", "encoder_depth", 10**5, "describes 100,000 layers"),
        ("tokenizer", "model", "image_size", 2**30, "describes 1,073,741,824 pixels along a side"),
        ("tokenizer", "model", "num_codes", 2**31 - 1, "do not fit its config.json"),
        ("prior", "model", "depth", 10**5, "describes 100,000 blocks"),
        ("prior", "model", "mlp_ratio", 1e29, "describes no prior that can be built|do not fit"),
        ("prior", "stream", "text_length", 2**31 - 1, "positions, and the weights hold 40"),
        ("prior", "stream", "pad_id", 10**6, "must be below text_vocab_size"),
        ("prior", "stream", "levels", [{"grid": [0, 1], "num_codes": 1}], "has an empty grid"),
        ("prior", "stream", "levels", [{"grid": [1, 1]}], "num_codes"),
    ],
)
def test_sizes_are_compared_with_the_weights_before_memory_is_taken(
    tmp_path, part, section, key, value, message
):
    model = getattr(tiny_pipeline(), part)
    model.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    values = json.loads(config.read_text())
    values[section][key] = value
    config.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        type(model).from_pretrained(tmp_path)


def test_a_wide_prior_is_refused_before_its_positions_are_computed(tmp_path, monkeypatch):
    tiny_pipeline().prior.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    values = json.loads(config.read_text())
    values["model"]["width"] = 2**22
    config.write_text(json.dumps(values))
    monkeypatch.setattr(
        "stage2_prior.model.rotary_table", lambda *sizes: pytest.fail("takes gigabytes")
    )
    with pytest.raises(ValueError, match=r"do not fit its config\.json"):
        PriorModule.from_pretrained(tmp_path)


def test_indices_in_the_weights_follow_from_the_configuration(tmp_path):
    prior = tiny_pipeline().prior
    prior.slot_level.fill_(9)
    prior.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="values in slot_level that do not follow"):
        type(prior).from_pretrained(tmp_path)
