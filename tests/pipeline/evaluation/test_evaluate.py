"""`Report`: its table and its JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.cli.main import main
from pipeline.config.experiment import Experiment
from pipeline.config.load import from_dict, load_experiment
from pipeline.data.load import load_source
from pipeline.evaluation import evaluate as evaluation
from pipeline.evaluation.accuracy import Accuracy
from pipeline.evaluation.codebook_report import codebook_page
from pipeline.evaluation.elbo_surgery import surgery_metrics
from pipeline.evaluation.evaluate import Report, evaluate
from pipeline.evaluation.forgetting import OLD, Forgetting
from tests.helpers.cli import fails
from tests.helpers.pipelines import tiny_pipeline


@pytest.mark.parametrize("images", [0, -1])
def test_fewer_images_than_one_are_refused(tiny_yaml, tmp_path, capsys, images):
    experiment = load_experiment(["--config", str(tiny_yaml)])
    with pytest.raises(ValueError, match=f"^images is {images}; it must be at least 1$"):
        evaluate(tmp_path / "bundle", experiment, images=images)
    fails(
        capsys,
        ["evaluate", "--config", tiny_yaml, "--max-images", images],
        f"evaluate: --max-images is {images}; it must be at least 1\n",
        status=2,
    )


def test_fractions_are_shown_as_percent_and_other_metrics_as_they_are():
    report = Report(
        {
            "psnr": 20.5,
            "codebook_usage": 0.5,
            "codebook_perplexity_level_1": 7.25,
            "distinct_codes": 1352.0,
            "reencode_agreement": 0.786,
            "elbo_reconstruction": -250.5,
            "mutual_information": 6.0,
            "marginal_kl_fixed_prior": 12.25,
        }
    )
    assert [line.split() for line in report.table().splitlines()] == [
        ["psnr", "20.500"],
        ["codebook_usage", "50.0%"],
        ["codebook_perplexity_level_1", "7.250"],
        ["distinct_codes", "1,352"],
        ["reencode_agreement", "78.6%"],
        ["elbo_reconstruction", "-250.500"],
        ["mutual_information", "6.000"],
        ["marginal_kl_fixed_prior", "12.250"],
    ]
    assert Report().table() == ""


def test_the_json_has_every_metric_with_settings_and_forgetting(tmp_path):
    lost = Forgetting({OLD: {"nats_per_code": {"before": 1.0, "after": 2.0}}}, ["a note"])
    report = Report({"psnr": 20.5}, {"images": 3}, lost)
    report.save(tmp_path / "new" / "evaluation.json")
    assert json.loads((tmp_path / "new" / "evaluation.json").read_text()) == {
        "psnr": 20.5,
        "settings": {"images": 3},
        "forgetting": {
            "metrics": {OLD: {"nats_per_code": {"before": 1.0, "after": 2.0}}},
            "notes": ["a note"],
        },
    }
    assert report.table().endswith("  note: a note")


def test_accuracies_have_intervals_in_the_table_and_beside_the_metrics_in_the_json(tmp_path):
    report = Report(settings={"seed": 0, "sampling": {"temperature": 0.5, "top_k": None}})
    report.add({"psnr": 20.5, "prompt_accuracy": Accuracy(466, 500)})
    assert report.metrics == {"psnr": 20.5, "prompt_accuracy": 0.932}
    psnr, accuracy, settings = report.table().splitlines()
    assert "interval" not in psnr
    assert accuracy.endswith("93.2%  95% interval 90.6% to 95.1%, of 500")
    assert settings == "  measured with seed 0, temperature 0.5"
    report.save(tmp_path / "evaluation.json")
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written["prompt_accuracy"] == 0.932
    low, high, count = written["intervals"]["prompt_accuracy"]
    assert (low, high) == pytest.approx(Accuracy(466, 500).interval) and count == 500
    assert set(written["intervals"]) == {"prompt_accuracy"}


@pytest.mark.parametrize(("images", "warnings"), [(5, 1), (60, 0)])
def test_an_accuracy_of_few_images_is_warned_of_in_one_line(
    tiny_yaml, finished_run, tmp_path, capsys, images, warnings
):
    given = ["--bundle", finished_run[1] / "bundle", "--max-images", images]
    out = ["--out", tmp_path / "evaluation.json"]
    arguments = ["evaluate", "--config", tiny_yaml, *given, *out]
    assert main([str(part) for part in arguments]) == 0
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("warning")]
    assert len(lines) == warnings
    for line in lines:
        assert "is of few images (95% interval " in line and "evaluate on more images" in line
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written["intervals"]["prompt_accuracy"][2] == images
    assert written["settings"]["seed"] == 0
    assert written["settings"]["data"]["source"] == "shapes"
    assert "prompt_accuracy " in captured.out and f", of {images}" in captured.out


def test_parts_of_the_elbo_are_in_fp32_as_the_bits_are(tmp_path, monkeypatch):
    pipe = tiny_pipeline(image_size=32, quantizer="gumbel", likelihood="discretized_logistic")
    pipe.save_pretrained(tmp_path / "bundle")
    values = {
        "name": "tiny",
        "output_dir": str(tmp_path),
        "precision": "bf16",
        "data": {"source": "shapes", "image_size": 32},
        "tokenizer": {"model": {"image_size": 32}},
        "encode": {"max_images": 10},
    }
    experiment = from_dict(Experiment, values)
    monkeypatch.setattr(evaluation, "_codes_metrics", lambda *given: {})
    metrics = evaluate(tmp_path / "bundle", experiment, images=4).metrics
    held_out = load_source(experiment.data, "held_out", tmp_path)
    images = torch.from_numpy(held_out.images(range(4)))
    ids = pipe.text.encode(held_out.captions(range(4)), truncate=True)
    parts = surgery_metrics(pipe.tokenizer, pipe.prior, images, ids, pipe.text.encode([""]))
    assert parts and {name: metrics[name] for name in parts} == pytest.approx(parts, rel=1e-6)
    assert metrics["bits_per_dimension"] > 0


@pytest.mark.slow
def test_every_metric_of_shapes_is_in_the_documentation(finished_run, tmp_path):
    out = tmp_path / "out.json"
    config, folder = finished_run
    command = ["evaluate", "--config", str(config), "--bundle", str(folder / "bundle")]
    assert main([*command, "--max-images", "4", "--out", str(out)]) == 0
    page = (Path(__file__).parents[3] / "docs/evaluation.md").read_text()
    found = json.loads(out.read_text())
    names = {name for name, value in found.items() if not isinstance(value, dict)}
    assert {"psnr", "nats_per_code", "bits_per_dimension"} <= names
    of_level = re.compile(r"_level_\d+$")
    of_claim = re.compile(r"(?<=_of)_\w+$")
    listed = {of_claim.sub("_...", of_level.sub("", name)) for name in names}
    assert not {name for name in listed if f"`{name}`" not in page}


@pytest.mark.slow
def test_evaluating_again_writes_the_same_bytes(finished_run, tmp_path):
    """What the evaluation took is in a file of its own."""
    config, folder = finished_run
    command = ["evaluate", "--config", str(config), "--bundle", str(folder / "bundle")]
    for name in ("a", "b"):
        assert main([*command, "--max-images", "10", "--out", str(tmp_path / f"{name}.json")]) == 0
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert json.loads((tmp_path / "a.times.json").read_text())["seconds"] > 0


def test_a_path_to_the_runs_own_bundle_updates_its_card(tiny_yaml, tmp_path, monkeypatch):
    experiment = load_experiment(["--config", str(tiny_yaml)])
    bundle = experiment.folder / "bundle"
    bundle.mkdir(parents=True)
    monkeypatch.chdir(experiment.folder)
    for given in (bundle, str(bundle), "bundle", "../tiny/bundle"):
        assert evaluation.is_own(experiment, given), given
    for given in ("../bundle", "user/name", tmp_path):
        assert not evaluation.is_own(experiment, given), given


def test_what_would_stop_an_evaluation_at_its_end_is_refused_before(
    tiny_yaml, tmp_path, monkeypatch, capsys
):
    experiment = load_experiment(["--config", str(tiny_yaml)])
    bundle = tmp_path / "other"
    tiny_pipeline(image_size=experiment.data.size[0]).save_pretrained(bundle)

    def measured(*arguments: object) -> None:
        raise AssertionError("it must be refused before anything is measured")

    monkeypatch.setattr(evaluation, "held_out_source", measured)
    with pytest.raises(ValueError, match=r"is a folder; give a file for the metrics"):
        evaluate(bundle, experiment, tmp_path)
    with pytest.raises(FileNotFoundError, match="typo"):
        evaluate(bundle, experiment, before=tmp_path / "typo")
    experiment.folder.mkdir(parents=True)
    (experiment.folder / "evaluation.json").write_text("{}")
    fails(
        capsys,
        ["evaluate", "--config", tiny_yaml, "--bundle", bundle],
        "has the metrics of the run's own bundle; add --out FILE",
        status=2,
    )
    assert (experiment.folder / "evaluation.json").read_text() == "{}"


@pytest.mark.parametrize(("channels", "alpha"), [(3, "white"), (4, "keep")])
def test_images_of_other_channels_are_refused_with_the_setting(
    tiny_yaml, tmp_path, channels, alpha
):
    bundle = tmp_path / "other"
    size = load_experiment(["--config", str(tiny_yaml)]).data.size[0]
    tiny_pipeline(image_size=size, channels=channels).save_pretrained(bundle)
    settings = ["--data.alpha", "keep", "--tokenizer.model.channels", "4"] if channels == 3 else []
    experiment = load_experiment(["--config", str(tiny_yaml), *settings])
    with pytest.raises(
        ValueError, match=rf"has images of {channels} channels.*data\.alpha={alpha}"
    ):
        evaluate(bundle, experiment)
    images = np.zeros((2, size, size, 7 - channels), np.uint8)
    with pytest.raises(
        ValueError, match=rf"has images of {channels} channels.*data\.alpha={alpha}"
    ):
        codebook_page(bundle / "tokenizer", images, tmp_path / "page")
