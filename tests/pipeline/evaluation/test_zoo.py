"""`zoo`: every model is trained and evaluated once; the table says what the results are; what
cannot be compared is refused before any training."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline.cli.main import main
from pipeline.evaluation import zoo
from pipeline.evaluation.evaluate import Report
from pipeline.evaluation.mean import Mean
from pipeline.evaluation.zoo import load_zoo, table
from pipeline.stages import time_budget
from tests.helpers.cli import fails
from tests.helpers.experiments import TINY

MODELS = {
    "VAE": {"tokenizer": {"model": {"quantizer": "gaussian"}}},
    "flow": {
        "tokenizer": {"model": {"quantizer": "gaussian"}},
        "prior": {"latent": {"kind": "realnvp", "transforms": 2, "context_features": 4}},
    },
    "dVAE": {"tokenizer": {"model": {"quantizer": "gumbel"}}},
}
ZOO = {
    **TINY,
    "tokenizer": {
        "model": {**TINY["tokenizer"]["model"], "likelihood": "discretized_logistic"},
        "train": {**TINY["tokenizer"]["train"], "compile": "off"},
    },
    "prior": {
        **TINY["prior"],
        "latent": {"kind": "standard", "width": 8},
        "train": {**TINY["prior"]["train"], "compile": "off"},
    },
    "minutes": 1,
    "variants": MODELS,
}


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "zoo.yaml"
    values = {**ZOO, "output_dir": str(folder / "runs"), **changes}
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Path, list[tuple[str, str, float]]]:
    """The YAML of a zoo that was run, and which budgets were asked for: (stage, model, seconds)."""
    path = written(tmp_path_factory.mktemp("zoo"))
    budgets = []

    def steps(stage: str, count: int) -> Any:
        def of(experiment, seconds):
            budgets.append((stage, experiment.name, seconds))
            return count

        return of

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo, "steps_in_budget", steps("tokenizer", 3))
        patch.setattr(zoo, "prior_steps_in_budget", steps("prior", 2))
        assert main(["zoo", "--config", str(path), "--log-level", "error"]) == 0
    return path, budgets


@pytest.mark.slow
def test_every_model_is_trained_and_evaluated(done):
    folder = done[0].parent / "runs" / "tiny"
    results = json.loads((folder / "results.json").read_text())
    assert list(results) == list(MODELS)
    for name, row in results.items():
        evaluation = json.loads((folder / name / "evaluation.json").read_text())
        assert row["bits_per_dimension"] == evaluation["bits_per_dimension"]
        assert row["interval"] == evaluation["intervals"]["bits_per_dimension"][:2]
        assert row["psnr"] == evaluation["psnr"]
        assert row["distortion"] + row["rate"] == pytest.approx(row["bits_per_dimension"])
        assert row["interval"][0] < row["bits_per_dimension"] < row["interval"][1]
        assert row["images"] == 10
    times = json.loads((folder / "times.json").read_text())
    assert list(times) == list(MODELS)
    for row in times.values():
        assert row["samples_per_second"] > 0
        assert all(minutes > 0 for minutes in row["minutes"].values())
    assert [row["sees_captions"] for row in results.values()] == [False, True, True]
    assert [row["steps"] for row in results.values()] == [
        {"tokenizer": 3},
        {"tokenizer": 3, "prior": 2},
        {"tokenizer": 3, "prior": 2},
    ]
    assert list(times["dVAE"]["minutes"]) == ["tokenizer", "codes", "prior"]


@pytest.mark.slow
def test_both_stages_share_the_minutes_of_a_model(done):
    path, budgets = done
    folder = path.parent / "runs" / "tiny"
    minutes = {
        name: row["minutes"]
        for name, row in json.loads((folder / "times.json").read_text()).items()
    }
    # A model without a prior to train gives all of its time to the tokenizer.
    assert budgets[0] == ("tokenizer", "VAE", 60.0)
    assert [budget[:2] for budget in budgets[1:]] == [
        ("tokenizer", "flow"),
        ("prior", "flow"),
        ("tokenizer", "dVAE"),
        ("prior", "dVAE"),
    ]
    assert budgets[1][2] == budgets[3][2] == 30.0
    assert budgets[2][2] == pytest.approx(60 - 60 * minutes["flow"]["tokenizer"])
    spent = minutes["dVAE"]["tokenizer"] + minutes["dVAE"]["codes"]
    assert budgets[4][2] == pytest.approx(60 - 60 * spent)


@pytest.mark.slow
def test_table_and_samples_show_the_results(done):
    folder = done[0].parent / "runs" / "tiny"
    results = json.loads((folder / "results.json").read_text())
    shown = (folder / "table.md").read_text()
    assert shown == table(results)
    for name, row in results.items():
        line = next(line for line in shown.splitlines() if line.startswith(f"| {name} |"))
        low, high = row["interval"]
        assert f"| {row['bits_per_dimension']:.3f} ({low:.3f} to {high:.3f}) |" in line
        assert f"| {row['distortion']:.3f} | {row['rate']:.3f} |" in line
        assert f"| {row['psnr']:.1f} |" in line
    for name in results:
        samples = np.load(folder / name / "samples.npy")
        assert samples.shape == (8, 32, 32, 3) and samples.dtype == np.uint8
    with Image.open(folder / "samples.png") as sheet:
        held_out_and_models = 1 + len(results)
        assert sheet.height > held_out_and_models * 96 and sheet.width > 8 * 96


@pytest.mark.slow
def test_finished_models_are_not_trained_again(done, monkeypatch, capsys):
    path = done[0]
    folder = path.parent / "runs" / "tiny"
    before = {file: file.stat().st_mtime_ns for file in folder.glob("*/*/*.safetensors")}
    monkeypatch.setattr(zoo, "run_model", lambda *given: pytest.fail("a model was trained again"))
    (folder / "table.md").unlink()
    assert main(["zoo", "--config", str(path)]) == 0
    assert "| flow | yes |" in (folder / "table.md").read_text()
    assert before == {file: file.stat().st_mtime_ns for file in before} and before
    changed = ["zoo", "--config", path, "--minutes", "2"]
    fails(capsys, changed, "VAE was made with other settings (minutes)")
    changed = ["zoo", "--config", path, "--tokenizer-fraction", "0.4"]
    fails(capsys, changed, "VAE was made with other settings (tokenizer_fraction)")
    changed = ["zoo", "--config", path, "--tokenizer-fraction", "0.4"]
    fails(capsys, changed, "VAE was made with other settings (tokenizer_fraction)")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flow", "dVAE"])
def test_number_of_prior_steps_follows_from_step_time(name, done, monkeypatch):
    """By a clock that goes on by 2 s whenever it is read, once before the steps and once in each: 2
    s before the first, then 2 s each."""
    experiment = load_zoo(["--config", str(done[0])]).models[name]
    clock = SimpleNamespace(perf_counter=itertools.count(0.0, 2.0).__next__)
    monkeypatch.setattr(time_budget, "time", clock)
    monkeypatch.setattr(time_budget, "_TRIAL_STEPS", 6)
    count = time_budget.prior_steps_in_budget
    assert [count(experiment, seconds) for seconds in (-1.0, 20.0, 201.0)] == [1, 9, 99]


@pytest.mark.slow
def test_diverging_model_is_reported_and_others_are_shown(done, monkeypatch, capsys):
    values = yaml.safe_load(done[0].read_text())
    values["variants"] = {**MODELS, "broken": MODELS["dVAE"]}
    path = done[0].with_name("one-more.yaml")
    path.write_text(yaml.safe_dump(values, sort_keys=False))

    def diverges(experiment, zoo):
        raise FloatingPointError("tokenizer: loss is not finite at step 3")

    monkeypatch.setattr(zoo, "run_model", diverges)
    assert main(["zoo", "--config", str(path)]) == 0
    shown = (path.parent / "runs" / "tiny" / "table.md").read_text()
    assert "broken failed: tokenizer: loss is not finite at step 3" in shown
    assert "| VAE | no |" in shown and "| broken |" not in shown


@pytest.mark.slow
def test_parts_of_the_elbo_are_those_of_the_evaluation(done, monkeypatch):
    """A prior that sees captions has the marginal KL given captions; a point has no parts."""
    parts = {"mutual_information": 2.25, "marginal_kl_fixed_prior": 50.0, "marginal_kl": 40.0}
    given_captions = {"marginal_kl_given_captions": 30.0}
    models = load_zoo(["--config", str(done[0])]).models
    rows = {}
    for name, more in {"VAE": parts, "flow": parts | given_captions, "dVAE": {}}.items():
        report = Report(settings={"images": 10})
        report.add({key: 1.0 for key in ("distortion_bits_per_dimension", "psnr")} | more)
        report.add({"rate_bits_per_dimension": 0.5, "bits_per_dimension": Mean(1.5, 1.0, 10)})
        monkeypatch.setattr(zoo, "evaluate", lambda *given, kept=report, **others: kept)
        rows[name] = zoo._judge(models[name])
    assert (rows["VAE"]["mutual_information"], rows["VAE"]["marginal_kl"]) == (2.25, 40.0)
    lines = table(rows).splitlines()
    assert "| 1.000 | 0.500 | 2.2 | 50.0 | 40.0 | 1.0 |" in lines[2]
    assert "| 1.000 | 0.500 | 2.2 | 50.0 | 30.0 | 1.0 |" in lines[3]
    assert "| 1.000 | 0.500 |  |  |  | 1.0 |" in lines[4]
    assert "log 10 = 2.3" in lines[-1] and "is 2,129 nats per image" in lines[-1]


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"variants": {}}, [], "has no 'variants' to compare"),
        ({"minutes": None}, [], "there are no 'minutes', the training time of a model"),
        ({"minutes": 0}, [], "minutes is 0.0; it must be above 0 and finite"),
        ({}, ["--minutes", "-1"], "minutes is -1.0; it must be above 0 and finite"),
        ({"tokenizer_fraction": 1}, [], "tokenizer_fraction is 1.0; it must be in (0, 1)"),
        ({"tokenizer_fraction": "half"}, [], "tokenizer_fraction is 'half'; it must be a number"),
        ({"colour": "red"}, [], "minidalle zoo: colour"),
        ({"variants": {"a": {"colour": "red"}}}, [], "variant a: colour"),
        (
            {"variants": {"a": {"data": {"image_size": 64}}}},
            [],
            "variant a: data cannot differ between variants; a zoo compares models on the same",
        ),
        (
            {"variants": {"a": {"tokenizer": {"train": {"batch_size": "auto"}}}}},
            [],
            "variant a: tokenizer.train.batch_size or tokenizer.train.gradient_accumulation_steps",
        ),
    ],
)
def test_invalid_zoos_are_named(changes, arguments, message, tmp_path, capsys):
    path = written(tmp_path, **changes)
    assert main(["zoo", "--config", str(path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_decoder_without_probability_is_refused_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(zoo, "run_model", lambda *given: pytest.fail("a model was trained"))
    last = {"black and white": {"tokenizer": {"model": {"likelihood": "bernoulli"}}}}
    path = written(tmp_path, variants={**MODELS, **last})
    fails(
        capsys,
        ["zoo", "--config", path],
        "variant black and white: tokenizer.model.likelihood is bernoulli, which gives images of "
        "this data no probability; choose discretized_logistic",
    )
    assert not (tmp_path / "runs").exists()
