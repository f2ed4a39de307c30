"""Priors of Gaussian latents through the pipeline: runs, resume, each kind, what is refused."""

from __future__ import annotations

import copy
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import pipeline
from pipeline import TextToImagePipeline
from pipeline.cli.main import main
from pipeline.config.experiment import Experiment
from pipeline.config.load import from_dict, load_experiment
from pipeline.data.load import load_source
from pipeline.data.readers.base import NoCaptions
from pipeline.stages import latent_prior
from pipeline.stages.sources import sources_of
from pipeline.training.trainer import Trainer
from stage1_tokenizer import TokenizerModule, to_model_range
from stage2_prior import LatentPriorModule
from tests.helpers.cli import fails
from tests.helpers.data import encoded
from tests.helpers.experiments import TINY
from tests.helpers.launch import CHECK, WATCHED, launch, settings
from tests.helpers.tokenizers import tiny_tokenizer

ROOT = Path(__file__).parents[3]
LATENT = {"kind": "realnvp", "transforms": 2, "width": 16, "components": 5}
CONDITIONAL = {**LATENT, "context_features": 8}


@pytest.fixture(autouse=True)
def few_captions(monkeypatch):
    """Rendering scenes takes time."""
    monkeypatch.setattr(latent_prior, "CAPTIONS", 40)


def tiny_values(folder: Path, **prior: Any) -> dict[str, Any]:
    """The tiny experiment with Gaussian latents, 4x4 positions of 4, in folder/runs."""
    values = copy.deepcopy(TINY) | {"output_dir": str(folder / "runs")}
    values["tokenizer"]["model"] |= {"quantizer": "gaussian", "image_size": 32}
    values["prior"]["latent"] = LATENT
    values["prior"]["train"]["threads"] = 1
    train = prior.pop("train", {})
    values["prior"] |= prior
    values["prior"]["train"] |= train
    return values


def with_tokenizer(values: dict[str, Any]) -> Experiment:
    """The experiment, with a tokenizer that is not trained in its run folder."""
    experiment = from_dict(Experiment, values)
    options = {k: v for k, v in values["tokenizer"]["model"].items() if k != "num_codes"}
    tiny_tokenizer(**options).save_pretrained(experiment.folder / "tokenizer")
    return experiment


def held_out(folder: Path) -> dict[str, float]:
    return json.loads((folder / "settings.json").read_text())["held_out"]


@pytest.mark.slow
def test_a_run_ends_with_a_bundle_that_generates_and_is_evaluated(tmp_path, capsys):
    values = tiny_values(tmp_path, latent=CONDITIONAL)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    assert main(["run", "--config", str(path)]) == 0, capsys.readouterr().err
    folder = tmp_path / "runs" / "tiny"
    assert (folder / "samples" / "held-out-prompts.png").is_file()
    assert len((folder / "samples" / "held-out-prompts.txt").read_text().splitlines()) == 16
    assert not (folder / "codes").exists()
    assert held_out(folder / "prior")["prior_nll"] > 0

    pipe = TextToImagePipeline.from_pretrained(folder / "bundle")
    assert pipe.prior.context_features == 8 and pipe.prior.config.trained_with_caption_dropout
    assert pipe.trained_on["sources"].keys() == {"train", "held_out"}
    capsys.readouterr()
    bundle = ["--bundle", str(folder / "bundle")]
    out = tmp_path / "images"
    generate = ["generate", *bundle, "a red circle", "", "--num-images", "2", "--out", str(out)]
    assert main(generate) == 0
    assert "note: an empty prompt is sampled without a caption" in capsys.readouterr().out
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["a red circle"] * 2 + [""] * 2
    assert all(np.isfinite(row["log_likelihood"]) for row in rows)
    fails(capsys, [*generate, "--top-k", 3], "generate: top_k is for bundles with codes, and this")
    image = str(next(out.glob("00000*.png")))
    fails(
        capsys,
        ["edit", *bundle, "--image", image, "--strength", 0.5],
        "edit: this bundle has Gaussian latents, and vary needs codes",
    )

    evaluate = ["evaluate", "--config", str(path), "--max-images", "5"]
    assert main(evaluate) == 0
    metrics = json.loads((folder / "evaluation.json").read_text())
    assert {"psnr", "ssim", "mutual_information", "bits_per_dimension"} <= metrics.keys()
    table = " ".join(capsys.readouterr().out.split())
    assert f"mutual_information {metrics['mutual_information']:.3f}" in table
    fails(
        capsys,
        [*evaluate, "--baseline-bundle", folder / "bundle"],
        "and comparing with an earlier bundle needs codes",
    )


@torch.no_grad()
def test_evaluation_is_that_of_the_posterior_and_the_prior(tmp_path):
    values = tiny_values(tmp_path, latent=CONDITIONAL) | {"precision": "fp32"}
    experiment = with_tokenizer(values)
    with torch.enable_grad():
        pipeline.train_prior(experiment)
    bundle = pipeline.assemble_bundle(experiment)
    report = pipeline.evaluate(bundle, experiment, images=10).metrics
    pipe = TextToImagePipeline.from_pretrained(bundle)
    source = load_source(experiment.data, "held_out")
    images = torch.from_numpy(source.images(range(10)))
    posterior = pipe.tokenizer.posterior(to_model_range(images))
    z = posterior.sample(torch.Generator().manual_seed(0))
    context = pipe.prior.encode_text(pipe.text.encode(source.captions(range(10))))
    log_prior = pipe.prior.log_prob(z, context)
    kl = (posterior.log_prob(z) - log_prior).mean()
    divergence = report["mutual_information"] + report["marginal_kl_given_captions"]
    assert divergence == pytest.approx(float(kl), rel=1e-5)
    nll = pipe.tokenizer.likelihood.exact_nll(
        images.permute(0, 3, 1, 2), pipe.tokenizer.latent_parameters(z)
    )
    assert report["elbo_reconstruction"] == pytest.approx(-float(nll.mean()), rel=1e-5)
    # The stage measured the same prior, of all its held-out images.
    stage = held_out(experiment.folder / "prior")["prior_nll"]
    assert stage == pytest.approx(-float(log_prior.mean()), rel=1e-5)


@pytest.mark.parametrize("kind", ["maf", "vamp"])
def test_a_killed_prior_ends_as_an_uninterrupted_one(kind, tmp_path, monkeypatch):
    """With everything that draws random numbers or has a state: caption dropout, the posterior's
    noise, Muon, EMA, the best weights."""
    options = {
        "latent": {**CONDITIONAL, "kind": kind},
        "train": {"optimizer": "muon", "save_best": True},
    }
    whole = with_tokenizer(tiny_values(tmp_path / "whole", **options))
    before = TokenizerModule.from_pretrained(whole.folder / "tokenizer").fingerprint
    pipeline.train_prior(whole)
    parts = with_tokenizer(tiny_values(tmp_path / "parts", **options))
    step = Trainer.train_step

    def killed(self: Trainer, number: int, batch: object):
        if number == 5:
            raise KeyboardInterrupt
        return step(self, number, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        pipeline.train_prior(parts)
    monkeypatch.setattr(Trainer, "train_step", step)
    assert not (parts.folder / "prior" / "model.safetensors").exists()
    pipeline.train_prior(parts)
    ours, theirs = (load_file(one.folder / "prior" / "model.safetensors") for one in (whole, parts))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert held_out(whole.folder / "prior") == held_out(parts.folder / "prior")
    assert TokenizerModule.from_pretrained(whole.folder / "tokenizer").fingerprint == before


@pytest.mark.parametrize("kind", ["standard", "aggregated", "mixture"])
def test_each_kind_is_delivered_in_a_bundle(kind, tmp_path):
    experiment = with_tokenizer(tiny_values(tmp_path, latent={**LATENT, "kind": kind}))
    folder = pipeline.train_prior(experiment)
    assert held_out(folder)["prior_nll"] > 0
    assert (folder / "checkpoints").exists() == (kind == "mixture")
    assert (experiment.folder / "samples" / "prior.png").is_file()
    pipe = TextToImagePipeline.from_pretrained(pipeline.assemble_bundle(experiment))
    assert pipe("", num_images_per_prompt=2).latents.isfinite().all()
    if kind == "aggregated":
        images = load_source(experiment.data, "train").images(range(5))
        posterior = pipe.tokenizer.posterior(to_model_range(torch.from_numpy(images)))
        torch.testing.assert_close(pipe.prior.prior.means, posterior.mean)
        torch.testing.assert_close(pipe.prior.prior.log_stds, posterior.log_std)


def test_a_complete_prior_is_not_trained_again_and_other_settings_are_refused(tmp_path):
    experiment = with_tokenizer(tiny_values(tmp_path))
    folder = pipeline.train_prior(experiment)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    free = tiny_values(tmp_path, model={"depth": 3}, train={"log_every": 1})
    assert pipeline.train_prior(from_dict(Experiment, free)) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    other = tiny_values(tmp_path, latent={**LATENT, "width": 8})
    with pytest.raises(ValueError, match=r"was made with other settings \(latent\)"):
        pipeline.train_prior(from_dict(Experiment, other))
    shutil.rmtree(experiment.folder / "tokenizer")
    with pytest.raises(FileNotFoundError, match="run `minidalle train-tokenizer`"):
        pipeline.train_prior(experiment)


def test_a_joint_prior_is_trained_with_the_tokenizer_and_delivered(tmp_path):
    values = tiny_values(tmp_path, joint=True) | {"precision": "fp32"}
    experiment = from_dict(Experiment, values)
    tokenizer = pipeline.train_tokenizer(experiment)
    weights = load_file(tokenizer / "checkpoints" / "step-6" / "weights.safetensors")
    assert any(name.startswith("latent_prior.") for name in weights)
    trained = LatentPriorModule.from_pretrained(tokenizer / "latent_prior")
    delivered = pipeline.train_prior(experiment)
    assert LatentPriorModule.from_pretrained(delivered).fingerprint == trained.fingerprint
    assert not (delivered / "checkpoints").exists()
    # The tokenizer's own bound is that of this prior.
    evaluated = pipeline.evaluate(pipeline.assemble_bundle(experiment), experiment, images=10)
    parts = evaluated.metrics
    divergence = parts["mutual_information"] + parts["marginal_kl"]
    assert divergence == pytest.approx(held_out(tokenizer)["kl"], rel=1e-4)
    elbo = parts["elbo_reconstruction"] - divergence
    assert elbo == pytest.approx(held_out(tokenizer)["elbo"], rel=1e-4)

    separate = tiny_values(tmp_path) | {"precision": "fp32"}
    afterwards = from_dict(Experiment, separate)
    with pytest.raises(ValueError, match=r"made with other settings \(latent_prior\)"):
        pipeline.train_tokenizer(afterwards)
    shutil.rmtree(tokenizer / "latent_prior")
    shutil.rmtree(delivered)
    with pytest.raises(FileNotFoundError, match=r"latent_prior is not there yet; run `minidalle"):
        pipeline.train_prior(experiment)


@pytest.mark.parametrize("kind", ["aggregated", "vamp"])
def test_more_components_than_images_are_refused(kind, tmp_path):
    values = tiny_values(tmp_path, latent={**LATENT, "kind": kind})
    values["data"]["shapes"]["num_scenes"] = 4
    with pytest.raises(
        ValueError,
        match=rf"^prior\.latent\.components is 5 and there are 4 images to train on; {kind} takes "
        "one per component, set it lower$",
    ):
        pipeline.train_prior(with_tokenizer(values))


def test_streams_are_refused_before_any_work(tmp_path):
    values = tiny_values(tmp_path)
    values["data"] = {"source": str(tmp_path), "image_size": 32, "streaming": True}
    for stage in (pipeline.run, pipeline.train_prior):
        with pytest.raises(ValueError, match=r"^data\.streaming is on, and a prior of Gaussian"):
            stage(from_dict(Experiment, values))
    assert not (tmp_path / "runs" / "tiny" / "tokenizer").exists()


def test_the_shipped_vae_runs_at_a_tiny_size(tmp_path, capsys):
    experiment = load_experiment(["--config", str(ROOT / "configs" / "vae.yaml")])
    assert not experiment.tokenizer.model.has_codes and experiment.prior.latent.kind == "realnvp"
    tiny = [
        *("--output_dir", str(tmp_path), "--encode.max_val_images", "4"),
        *("--tokenizer.model.width", "32", "--tokenizer.train.steps", "1"),
        *("--tokenizer.train.batch_size", "2", "--tokenizer.train.optimizer", "adamw"),
        *("--prior.latent.width", "8", "--prior.latent.transforms", "2"),
        *("--prior.train.steps", "1", "--prior.train.batch_size", "2"),
    ]
    command = ["run", "--config", str(ROOT / "configs" / "vae.yaml"), *tiny]
    assert main(command) == 0, capsys.readouterr().err
    assert TextToImagePipeline.from_pretrained(tmp_path / "vae" / "bundle")


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_one_conditional_prior(tmp_path):
    """Captions and noise differ by process; the weights do not."""
    values = tiny_values(tmp_path, latent=CONDITIONAL)
    values["data"]["shapes"]["num_scenes"] = 40
    launch(tmp_path, 2, "run", *settings(tmp_path, **values), script=WATCHED + CHECK)
    first, second = (torch.load(tmp_path / f"prior-{rank}-of-2.pt") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert TextToImagePipeline.from_pretrained(tmp_path / "runs" / "tiny" / "bundle")


@pytest.mark.parametrize("joint", [False, True])
def test_an_unconditional_prior_needs_no_captions(joint, tmp_path):
    """All images are used where some have captions, and a stage that was begun with those alone
    resumes with them."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02}.png").write_bytes(encoded((6 * i, 0, 0), (32, 32)))
    values = tiny_values(tmp_path, joint=joint)
    values["data"] = {"source": str(folder), "image_size": 32, "val_fraction": 0.3}
    experiment = from_dict(Experiment, values)
    bundle = pipeline.run(experiment)
    assert pipeline.evaluate(bundle, experiment, tmp_path / "evaluation.json").metrics

    conditional = copy.deepcopy(values) | {"name": "conditional"}
    conditional["prior"] |= {"latent": CONDITIONAL, "joint": False}
    with pytest.raises(
        NoCaptions, match=r"context_features is 8; a prior with 0 needs no captions"
    ):
        pipeline.run(from_dict(Experiment, conditional))


def test_a_prior_that_began_with_captioned_images_resumes_with_them(tmp_path, monkeypatch):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02}.png").write_bytes(encoded((6 * i, 0, 0), (32, 32)))
        if i % 2:
            (folder / f"{i:02}.txt").write_text(f"shade {i}")
    values = tiny_values(tmp_path)
    values["data"] = {"source": str(folder), "image_size": 32, "val_fraction": 0.3}
    experiment = with_tokenizer(values)
    every = latent_prior.latent_sources(experiment)
    with monkeypatch.context() as earlier:
        captioned = partial(sources_of, experiment.data, experiment.folder, 10)
        earlier.setattr(latent_prior, "every_image", lambda *_: captioned())
        pipeline.train_prior(experiment)
    assert sum(len(source) for source in every.values()) == 40
    resumed = latent_prior.latent_sources(experiment)
    assert sum(len(source) for source in resumed.values()) == 20
    pipeline.train_prior(experiment)  # is not refused
