"""`Report`: its table and its JSON."""

from __future__ import annotations

import json

import pytest

from pipeline.config.load import load_experiment
from pipeline.evaluation.evaluate import Report, evaluate
from pipeline.evaluation.forgetting import OLD, Forgetting
from tests.helpers.cli import fails


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
        }
    )
    assert [line.split() for line in report.table().splitlines()] == [
        ["psnr", "20.500"],
        ["codebook_usage", "50.0%"],
        ["codebook_perplexity_level_1", "7.250"],
        ["distinct_codes", "1,352"],
        ["reencode_agreement", "78.6%"],
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
