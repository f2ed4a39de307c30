"""A tokenizer of Gaussian latents through the pipeline: it trains, resumes and reconstructs, and
commands that need codes refuse it before they work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from pipeline import TextToImagePipeline
from pipeline.cli.main import main
from stage1_tokenizer import TokenizerModule
from tests.helpers.cli import fails
from tests.helpers.pipelines import tiny_pipeline
from tests.helpers.tokenizers import tiny_tokenizer

GAUSSIAN = ["--tokenizer.model.quantizer", "gaussian"]
VECTOR = [*GAUSSIAN, "--tokenizer.model.gaussian.latents", "vector"]


@pytest.fixture
def noise(tmp_path) -> Path:
    """An image file of 48x32 pixels."""
    Image.effect_noise((48, 32), 50).save(tmp_path / "noise.png")
    return tmp_path / "noise.png"


@pytest.mark.slow
@pytest.mark.parametrize("options", [GAUSSIAN, VECTOR], ids=["grid", "vector"])
def test_gaussian_tokenizer_trains_and_reconstructs(options, tiny_yaml, tmp_path, noise, capsys):
    command = ["train-tokenizer", "--config", str(tiny_yaml), *options]
    assert main([*command, "--tokenizer.train.save_best", "true"]) == 0, capsys.readouterr().err
    folder = tmp_path / "runs" / "tiny" / "tokenizer"
    assert f"next: minidalle train-prior --config {tiny_yaml}" in capsys.readouterr().out
    held_out = json.loads((folder / "settings.json").read_text())["held_out"]
    assert held_out["elbo"] == -(held_out["nll"] + held_out["kl"])
    assert not any(name.startswith(("codebook", "dead", "distinct")) for name in held_out)
    assert (tmp_path / "runs" / "tiny" / "samples" / "reconstructions.png").is_file()
    assert TokenizerModule.from_pretrained(folder).latent_dim == {2: 64, 4: 64}[len(options)]
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert main([*command, "--tokenizer.train.save_best", "true"]) == 0
    assert (folder / "model.safetensors").stat().st_mtime_ns == before

    out = tmp_path / "reconstructed"
    reconstruct = ["reconstruct", "--tokenizer", str(folder), str(noise), "--out", str(out)]
    if options is VECTOR:
        fails(
            capsys,
            reconstruct,
            "noise.png: pixels are 48x32 (width x height) and this tokenizer's one latent vector "
            "is for 32x32; crop or resize to it first (the option size does)",
        )
        reconstruct += ["--size", "32"]
    assert main(reconstruct) == 0
    with Image.open(out / "00000-noise.png") as image:
        assert image.size == ((32, 32) if options is VECTOR else (48, 32))


def test_encode_refuses_gaussian_latents(tiny_yaml, tmp_path, capsys):
    fails(
        capsys,
        ["encode", "--config", tiny_yaml, *GAUSSIAN],
        "tokenizer.model.quantizer is gaussian, which has Gaussian latents, and `minidalle encode` "
        "needs codes; choose another quantizer (vq), or use `minidalle run`, which trains a prior "
        "of the latents",
    )
    assert not (tmp_path / "runs").exists()


def test_a_comparison_refuses_gaussian_latents_before_training(tiny_yaml, tmp_path, capsys):
    values = yaml.safe_load(tiny_yaml.read_text())
    values["variants"] = {"vq": None, "vae": {"tokenizer": {"model": {"quantizer": "gaussian"}}}}
    path = tmp_path / "comparison.yaml"
    path.write_text(yaml.safe_dump(values))
    fails(
        capsys,
        ["compare-tokenizers", "--config", path],
        "variant vae: tokenizer.model.quantizer is gaussian, which has Gaussian latents, and "
        "`minidalle compare-tokenizers` needs codes",
        status=2,
    )
    assert not (tmp_path / "runs").exists()


def test_commands_refuse_the_folder_of_a_gaussian_tokenizer(tiny_yaml, tmp_path, capsys):
    folder = tmp_path / "gaussian" / "tokenizer"
    tiny_tokenizer(quantizer="gaussian", image_size=32).save_pretrained(folder)
    configured = ["--config", tiny_yaml, "--tokenizer", folder]
    for command in (["codebook", *configured], ["encode", *configured, "--out", tmp_path / "c"]):
        fails(
            capsys,
            command,
            f"this tokenizer has Gaussian latents, and `minidalle {command[0]}` needs codes; "
            "train one with tokenizer.model.quantizer=vq, or use its latents (in Python: posterior "
            "and decode_latents)",
        )
    assert not (tmp_path / "c").exists()


def test_text_to_image_refuses_gaussian_latents():
    pipe = tiny_pipeline()
    with pytest.raises(ValueError, match="Gaussian latents, and TextToImagePipeline needs codes"):
        TextToImagePipeline(tiny_tokenizer(quantizer="gaussian"), pipe.prior, pipe.text)


def test_estimate_of_gaussian_latents_has_a_prior_only_within_the_tokenizer(tiny_yaml, capsys):
    assert main(["estimate", "--config", str(tiny_yaml), *GAUSSIAN]) == 0
    out = capsys.readouterr().out
    assert out.startswith("tokenizer: ")
    assert "\nprior: of Gaussian latents, not estimated on its own\nnext: " in out
    assert f"next: minidalle run --config {tiny_yaml}" in out
    joint = ["--prior.joint", "true", "--prior.latent.width", "1024"]
    assert main(["estimate", "--config", str(tiny_yaml), *GAUSSIAN, *joint]) == 0
    assert capsys.readouterr().out != out  # the tokenizer's training takes the prior's memory, too
