"""`compare-tokenizers`: every variant is trained and evaluated, resumed, also at equal time;
errors in its file."""

from __future__ import annotations

import fcntl
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline.cli.main import main
from pipeline.config.load import load_experiment
from pipeline.stages import compare_tokenizers, time_budget
from pipeline.stages.compare_tokenizers import load_comparison, steps_in_budget, table
from tests.helpers.cli import fails
from tests.helpers.experiments import TINY

pytestmark = pytest.mark.slow

ROWS = {
    "plain": None,
    "two levels": {
        "tokenizer": {
            "model": {"quantizer": "hierarchical", "hierarchical": {"width": 8}},
            "train": {"steps": 4},
        }
    },
}


@pytest.fixture
def bakeoff(tmp_path: Path) -> Path:
    path = tmp_path / "bakeoff.yaml"
    path.write_text(
        yaml.safe_dump({**TINY, "output_dir": str(tmp_path / "runs"), "variants": ROWS})
    )
    return path


def test_every_variant_is_trained_and_evaluated(bakeoff, tmp_path, capsys):
    assert main(["compare-tokenizers", "--config", str(bakeoff)]) == 0
    out, folder = capsys.readouterr().out, tmp_path / "runs" / "tiny"
    metrics = json.loads((folder / "comparison.json").read_text())
    assert list(metrics) == ["plain", "two levels"]
    for row in metrics.values():
        assert all(math.isfinite(value) for value in row.values())
        assert 0 < row["usage"] <= 1
    times = json.loads((folder / "times.json").read_text())
    assert list(times) == list(metrics)
    assert all(row["encoding_rate"] > 0 and row["minutes"] > 0 for row in times.values())
    assert (
        metrics["plain"]["bits_per_image"] == 16 * 4
        and metrics["two levels"]["bits_per_image"] == 20 * 4
    )
    assert [row["steps"] for row in metrics.values()] == [6, 4]
    prior = json.loads((folder / "plain" / "prior" / "settings.json").read_text())["held_out"]
    assert metrics["plain"]["nats_per_image"] == pytest.approx(16 * prior["nats_per_code"])
    tokenizer = json.loads((folder / "plain" / "tokenizer" / "settings.json").read_text())[
        "held_out"
    ]
    for name in ("psnr", "distinct_codes", "reencode_agreement"):
        assert metrics["plain"][name] == tokenizer[name]
    assert (folder / "comparison.md").read_text() in out
    for name in ("comparison.png", "reconstructions.png"):
        with Image.open(folder / name) as image:
            assert len(np.unique(np.asarray(image))) > 2


def test_two_comparisons_cannot_run_at_once(bakeoff, tmp_path, capsys):
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fails(
            capsys,
            ["compare-tokenizers", "--config", bakeoff],
            f"{folder} is in use by another process",
        )
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_finished_variants_are_kept_and_all_are_shown(bakeoff, tmp_path, capsys):
    assert main(["compare-tokenizers", "--config", str(bakeoff)]) == 0
    folder = tmp_path / "runs" / "tiny"
    capsys.readouterr()
    fails(
        capsys,
        ["compare-tokenizers", "--config", bakeoff, "--prior.train.steps", "7"],
        "made with other settings (prior)",
    )
    fails(
        capsys,
        ["compare-tokenizers", "--config", bakeoff, "--minutes", "1"],
        "made with other settings (minutes)",
    )
    before = {p: p.stat().st_mtime_ns for p in folder.glob("*/metrics.json")}
    stranger = folder / "a peer"
    stranger.mkdir()
    made = json.loads((folder / "plain" / "metrics.json").read_text())["made_with"]
    (stranger / "metrics.json").write_text(
        json.dumps(
            {"metrics": {"psnr": 1.0, "nats_per_image": 2.0}, "made_with": {**made, "tokenizer": 0}}
        )
    )
    np.save(stranger / "reconstructions.npy", np.load(folder / "plain" / "reconstructions.npy"))
    assert main(["compare-tokenizers", "--config", str(bakeoff)]) == 0
    assert before == {p: p.stat().st_mtime_ns for p in before}
    assert "| a peer | 1.0 |  |  |  |  |  |  | 2 |" in (folder / "comparison.md").read_text()
    (stranger / "metrics.json").write_text(
        json.dumps(
            {"metrics": {"psnr": 1.0, "nats_per_image": 2.0}, "made_with": {**made, "prior": 0}}
        )
    )
    assert main(["compare-tokenizers", "--config", str(bakeoff)]) == 0
    written = (folder / "comparison.md").read_text()
    assert (
        "| a peer |" not in written
        and "a peer is left out: it was made with other settings (prior)" in written
    )


def test_rows_from_before_a_setting_existed_have_its_default(tmp_path):
    config = Path(__file__).parents[3] / "configs" / "shapes.yaml"
    where = ["--name", "row", "--output_dir", str(tmp_path), "--prior.objective.code_corruption"]
    experiment = load_experiment(["--config", str(config), *where, "0"])
    compare_tokenizers.write_metrics(experiment, None, {"psnr": 1.0})
    path = experiment.folder / "metrics.json"
    written = json.loads(path.read_text())
    del written["made_with"]["prior"]["objective"]["code_corruption"]
    del written["made_with"]["tokenizer"]["model"]["gaussian"]
    path.write_text(json.dumps(written))
    assert compare_tokenizers.is_complete(experiment, None)
    written["made_with"]["prior"]["objective"]["code_corruption"] = 0.1
    path.write_text(json.dumps(written))
    with pytest.raises(ValueError, match=r"made with other settings \(prior\)"):
        compare_tokenizers.is_complete(experiment, None)


def test_the_table_keeps_rows_from_before_a_setting_existed(bakeoff):
    comparison = load_comparison(["--config", str(bakeoff)])
    experiment = next(iter(comparison.variants.values()))
    peer = comparison.folder / "a peer"
    peer.mkdir(parents=True)
    compare_tokenizers.write_metrics(experiment, None, {"failed": "out of memory"})
    written = json.loads((experiment.folder / "metrics.json").read_text())
    (experiment.folder / "metrics.json").unlink()
    del written["made_with"]["prior"]["objective"]["code_corruption"]
    (peer / "metrics.json").write_text(json.dumps(written))
    compare_tokenizers.write_report(comparison)
    notes = (comparison.folder / "comparison.md").read_text()
    assert "a peer failed: out of memory" in notes and "left out" not in notes


def test_variant_with_other_settings_is_named_before_training(bakeoff, monkeypatch, capsys):
    assert main(["compare-tokenizers", "--config", str(bakeoff)]) == 0
    (
        bakeoff.parent / "runs" / "tiny" / "plain" / "metrics.json"
    ).unlink()  # due again, and before the one that is refused
    monkeypatch.setattr(
        compare_tokenizers, "run_variant", lambda experiment, minutes: pytest.fail("work was begun")
    )
    values = yaml.safe_load(bakeoff.read_text())
    values["variants"]["two levels"]["tokenizer"]["train"]["steps"] = 5
    bakeoff.write_text(yaml.safe_dump(values))
    fails(
        capsys,
        ["compare-tokenizers", "--config", bakeoff],
        "two levels was made with other settings (tokenizer)",
    )


def test_another_precision_is_another_comparison(bakeoff, capsys):
    assert main(["compare-tokenizers", "--config", str(bakeoff), "--precision", "fp32"]) == 0
    fails(
        capsys, ["compare-tokenizers", "--config", bakeoff], "made with other settings (precision)"
    )


def test_failing_variant_is_named_and_other_metrics_are_kept(bakeoff, capsys):
    values = yaml.safe_load(bakeoff.read_text())
    values["variants"]["unfit"] = {
        "tokenizer": {"model": {"num_codes": 512, "vq": {"kmeans_iterations": 3}}}
    }
    bakeoff.write_text(yaml.safe_dump(values))
    assert main(["compare-tokenizers", "--config", str(bakeoff)]) == 1
    assert "variant unfit: k-means needs a vector per code" in capsys.readouterr().err
    written = (bakeoff.parent / "runs" / "tiny" / "comparison.md").read_text()
    assert "| plain |" in written and "| two levels |" in written


def test_training_time_survives_a_kill_of_the_prior(bakeoff, monkeypatch):
    def killed(experiment):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare_tokenizers, "train_prior", killed)
    with pytest.raises(KeyboardInterrupt):
        compare_tokenizers.compare_tokenizers(load_comparison(["--config", str(bakeoff)]))
    monkeypatch.undo()
    assert main(["compare-tokenizers", "--config", str(bakeoff)]) == 0
    times = json.loads((bakeoff.parent / "runs" / "tiny" / "times.json").read_text())
    assert all(row["minutes"] > 0 and row["training_rate"] > 0 for row in times.values())


def test_judging_again_gives_the_same_bytes(bakeoff):
    """Times are in files of their own."""
    folder = bakeoff.parent / "runs" / "tiny"
    names = ("comparison.json", "comparison.md", "reconstructions.png", "plain/metrics.json")
    arguments = ["compare-tokenizers", "--config", str(bakeoff)]
    assert main(arguments) == 0
    before = [(folder / name).read_bytes() for name in names]
    (folder / "plain" / "metrics.json").unlink()
    assert main(arguments) == 0
    assert [(folder / name).read_bytes() for name in names] == before


def test_missing_compiler_is_reported_before_training(bakeoff, monkeypatch, capsys):
    monkeypatch.setattr("pipeline.runtime.devices.has_cpp_compiler", lambda: False)
    command = ["compare-tokenizers", "--config", bakeoff, "--prior.train.compile", "on"]
    fails(capsys, command, "train.compile is on, and there is no C++ compiler")
    assert not (bakeoff.parent / "runs").exists()


def test_minutes_replace_steps(bakeoff, monkeypatch, capsys):
    monkeypatch.setattr(
        "pipeline.stages.compare_tokenizers.steps_in_budget",
        lambda experiment, seconds: int(seconds / 2),
    )
    assert main(["compare-tokenizers", "--config", str(bakeoff), "--minutes=0.3"]) == 0
    metrics = json.loads((bakeoff.parent / "runs" / "tiny" / "comparison.json").read_text())
    assert [row["steps"] for row in metrics.values()] == [9, 9]


@pytest.mark.parametrize("compiled", [True, False])
def test_few_steps_are_compiled_if_timing_was_compiled(compiled, bakeoff, monkeypatch):
    seen = []

    def train(experiment):
        seen.append((experiment.tokenizer.train.steps, experiment.tokenizer.train.compile))
        raise FloatingPointError("enough")

    monkeypatch.setattr(compare_tokenizers, "steps_in_budget", lambda experiment, seconds: 9)
    monkeypatch.setattr(compare_tokenizers, "should_compile", lambda train, device: compiled)
    monkeypatch.setattr(compare_tokenizers, "train_tokenizer", train)
    assert main(["compare-tokenizers", "--config", str(bakeoff), "--minutes=1"]) == 0
    assert seen == 2 * [(9, "on" if compiled else "off")]


def test_number_of_steps_follows_from_step_time(bakeoff, monkeypatch):
    """By a clock that goes on by 2 s whenever it is read, once before the steps and once in each: 2
    s before the first, then 2 s each."""
    experiment = load_comparison(["--config", str(bakeoff)]).variants["plain"]
    monkeypatch.setattr(
        time_budget, "time", SimpleNamespace(perf_counter=itertools.count(0.0, 2.0).__next__)
    )
    assert [steps_in_budget(experiment, seconds) for seconds in (1.0, 20.0, 201.0)] == [1, 9, 99]


@pytest.mark.parametrize(("seconds", "steps"), [(25.0, 20), (29.0, 24), (36.0, 27), (15.0, 10)])
def test_late_discriminator_start_slows_the_remaining_steps(seconds, steps, bakeoff, monkeypatch):
    """5 s before the first step and 1 s per step; 7 s and 2 s with the discriminator, which starts
    at step 25."""
    monkeypatch.setattr(
        "pipeline.stages.time_budget._seconds_per_step",
        lambda experiment, discriminator: (7.0, 2.0) if discriminator else (5.0, 1.0),
    )
    arguments = [
        "--tokenizer.objective.discriminator.weight=0.1",
        "--tokenizer.objective.discriminator.start=25",
    ]
    assert (
        steps_in_budget(
            load_comparison(["--config", str(bakeoff), *arguments]).variants["plain"], seconds
        )
        == steps
    )


def test_step_time_with_a_discriminator_includes_it(bakeoff, monkeypatch):
    seen = []

    def task(experiment, *rest):
        seen.append(
            (
                experiment.tokenizer.objective.discriminator.weight,
                experiment.tokenizer.objective.discriminator.start,
            )
        )
        return build(experiment, *rest)

    build = time_budget.TokenizerTraining
    monkeypatch.setattr(time_budget, "TokenizerTraining", task)
    arguments = [
        "--tokenizer.objective.discriminator.weight=0.1",
        "--tokenizer.objective.discriminator.start=25",
    ]
    steps_in_budget(
        load_comparison(["--config", str(bakeoff), *arguments]).variants["plain"], 600.0
    )
    assert seen == [(0.0, 25), (0.1, 0)]


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"variants": None}, [], "has no 'variants' to compare"),
        ({"variants": {"a": 3}}, [], "has no 'variants' to compare"),
        (
            {
                "variants": {
                    "a": {"tokenizer": {"model": {"downsample_factor": 7}}},
                    "b": {"prior": {"model": {"heads": 3}}},
                }
            },
            [],
            r"(?s)variant a: .*factor is 7.*variant b: .*heads 3",
        ),
        ({"variants": {"a": {"colour": "red"}}}, [], "variant a: .*colour"),
        ({"variants": {"a/b": None}}, [], "name is 'a/b'"),
        ({"minutes": "many"}, [], "minutes is 'many'; it must be a number"),
        (
            {"variants": {"a": {"output_dir": "b"}}},
            [],
            "variant a: output_dir cannot differ between variants",
        ),
        (
            {"variants": {"a": {"tokenizer": {"frozen": True, "init_from": "b"}}}},
            [],
            "variant a: tokenizer.frozen is on",
        ),
        ({}, ["--minutes", "0"], "minutes is 0.0; it must be above 0"),
        ({}, ["--minutes", "inf"], "minutes is inf; it must be above 0 and finite"),
    ],
)
def test_invalid_comparison_files_are_named(bakeoff, change, arguments, message, capsys):
    import re

    values = yaml.safe_load(bakeoff.read_text()) | change
    bakeoff.write_text(yaml.safe_dump(values))
    assert main(["compare-tokenizers", "--config", str(bakeoff), *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_missing_or_unreadable_file_is_named(tmp_path, capsys):
    assert main(["compare-tokenizers", "--config", str(tmp_path / "none.yaml")]) == 1
    assert "there is no configuration file" in capsys.readouterr().err
    assert main(["compare-tokenizers"]) == 2
    assert "no configuration was given" in capsys.readouterr().err
    (tmp_path / "broken.yaml").write_text("variants: [")
    assert main(["compare-tokenizers", "--config", str(tmp_path / "broken.yaml")]) == 2
    assert "is not readable YAML" in capsys.readouterr().err


@pytest.mark.parametrize("minutes", [[], ["--minutes=1"]])
def test_diverging_variant_is_reported_and_others_are_evaluated(
    minutes, bakeoff, monkeypatch, capsys
):
    judge = compare_tokenizers.run_variant

    def diverges(experiment, minutes):
        if experiment.name == "plain":
            raise FloatingPointError("tokenizer: loss is not finite at step 3")
        return judge(experiment, minutes)

    monkeypatch.setattr(compare_tokenizers, "run_variant", diverges)
    monkeypatch.setattr(compare_tokenizers, "steps_in_budget", lambda experiment, seconds: 4)
    assert main(["compare-tokenizers", "--config", str(bakeoff), *minutes]) == 0
    table = (bakeoff.parent / "runs" / "tiny" / "comparison.md").read_text()
    assert (
        "| two levels |" in table
        and "plain failed: tokenizer: loss is not finite at step 3" in table
        and "| plain |" not in table
    )


@pytest.mark.parametrize("name", ["compare-tokenizers", "codebook", "reconstruct"])
def test_single_process_commands_refuse_several_processes(name, bakeoff, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = {
        "compare-tokenizers": ["--config", bakeoff],
        "codebook": ["--tokenizer", bakeoff.parent, "--config", bakeoff],
        "reconstruct": ["--tokenizer", bakeoff.parent, "image.png"],
    }
    fails(capsys, [name, *arguments[name]], "is the work of one process; start it without torchrun")


def test_table_leaves_unknown_metrics_empty():
    lines = table(
        {
            "one": {
                "psnr": 25.26,
                "usage": 0.951,
                "distinct_codes": 352.0,
                "reencode_agreement": 0.7857,
                "ssim": 0.8765,
                "steps": 2000,
            }
        }
    ).splitlines()
    assert lines[2].startswith("| one | 25.3 | 0.876 | 95.1% |  | 352 | 78.6% |  |  | 2,000 |")
