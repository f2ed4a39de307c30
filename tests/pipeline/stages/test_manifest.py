"""`StageRun`: settings are recorded before training, compared afterwards, and keep what `auto`
chose. Probing for `auto` changes no weight."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import reduce
from operator import getitem

import pytest
from safetensors.torch import load_file

from pipeline.cli.main import main
from pipeline.config.experiment import Experiment, to_dict
from pipeline.config.load import load_experiment
from pipeline.stages.manifest import StageRun, read_settings
from stage1_tokenizer import TokenizerModule


@pytest.fixture
def experiment(tiny_yaml) -> Experiment:
    return load_experiment(["--config", str(tiny_yaml)])


def stage_run(experiment: Experiment, seed: int = 0, **changes: object) -> StageRun:
    train = replace(experiment.tokenizer.train, **changes)
    return StageRun(experiment, "tokenizer", train, {"seed": seed})


def test_a_stage_is_complete_once_it_is_finalized(experiment):
    run = stage_run(experiment)
    assert not run.is_complete() and not run.folder.exists()
    run.begin()
    assert read_settings(run.folder)["settings"] == run.settings
    assert not stage_run(experiment).is_complete()
    run.finalize(TokenizerModule(experiment.tokenizer.model), {"nll": 1.0, "broken": float("nan")})
    assert read_settings(run.folder)["held_out"] == {"nll": 1.0}
    assert stage_run(experiment).is_complete()


def test_a_complete_stage_allows_what_changes_no_weight_and_refuses_the_rest(experiment):
    run = stage_run(experiment)
    run.begin()
    run.finalize(TokenizerModule(experiment.tokenizer.model), {})
    assert stage_run(experiment, log_every=7, eval_every=1).is_complete()
    assert not stage_run(experiment, steps=100).is_complete()
    for other, name in (
        (stage_run(experiment, seed=1), r"\(seed\)"),
        (stage_run(experiment, steps=1), r"\(train.steps\)"),
        (stage_run(experiment, save_best=True, eval_every=1), r"train.eval_every"),
    ):
        with pytest.raises(ValueError, match=name):
            other.is_complete()


def test_a_stage_made_before_a_setting_existed_has_its_default(experiment):
    """Of a section of the model and of a field of the training."""
    model = to_dict(experiment.tokenizer)["model"]
    inputs = {"model": {name: value for name, value in model.items() if name != "gaussian"}}
    train = experiment.tokenizer.train
    run = StageRun(experiment, "tokenizer", train, inputs)
    run.begin()
    run.finalize(TokenizerModule(experiment.tokenizer.model), {})
    settings = run.folder / "settings.json"
    settings.write_text(settings.read_text().replace('"ema_decay"', '"unknown"'))
    assert StageRun(experiment, "tokenizer", train, {"model": model}).is_complete()
    changed = replace(train, ema_decay=0.5)
    with pytest.raises(ValueError, match=r"\(train.ema_decay\)"):
        StageRun(experiment, "tokenizer", changed, {"model": model}).is_complete()
    model["gaussian"]["free_bits"] = 0.5
    with pytest.raises(ValueError, match=r"\(model\)"):
        StageRun(experiment, "tokenizer", train, {"model": model}).is_complete()


def test_data_are_known_by_their_images_and_not_by_their_path(experiment):
    data = {"source": "here", "mix": [], "flip": False}
    inputs = {"data": data, "images": ["a", "b"]}
    train = experiment.tokenizer.train

    def of(counts: list[int | None], **changes: object) -> StageRun:
        return StageRun(experiment, "tokenizer", train, inputs | changes, num_images=counts)

    run = of([1000, 10])
    run.begin()
    run.finalize(TokenizerModule(experiment.tokenizer.model), {})
    assert of([1000, 10], data={**data, "source": "/moved/there"}).is_complete()
    assert of([1000, 10], data={**data, "split_column": "none"}).is_complete()
    newer = of([1000, 10], images=["other", "b"])
    newer.earlier = {"images": ["a", "b"]}  # as an earlier version calls the same images
    assert newer.is_complete()
    more = of([1052, 13], images=["c", "d"], data={**data, "source": "there"})
    with pytest.raises(
        ValueError,
        match=r"\(images\): of here -> there: 1,000 -> 1,052 images to train on \(\+52\), "
        r"10 -> 13 images held out \(\+3\)\. To go on, put the images back .*; or move .* away$",
    ):
        more.is_complete()
    with pytest.raises(ValueError, match="of here: the same number of images, of which files"):
        of([1000, 10], images=["c", "d"]).is_complete()
    with pytest.raises(
        ValueError,
        match=r"\(data\): data\.flip False -> True\. To go on, give the earlier values to keep",
    ):
        of([1000, 10], data={**data, "flip": True}).is_complete()


def test_data_inside_recorded_codes_are_known_by_their_images_too(experiment):
    codes = {"settings": {"data": {"source": "here", "mix": []}}, "sources": {"train": "a"}}
    train = experiment.tokenizer.train
    run = StageRun(experiment, "tokenizer", train, {"codes": codes})
    run.begin()
    run.finalize(TokenizerModule(experiment.tokenizer.model), {})
    moved = {**codes, "settings": {"data": {"source": "there", "mix": []}}}
    assert StageRun(experiment, "tokenizer", train, {"codes": moved}).is_complete()
    other = {**codes, "sources": {"train": "b"}}
    with pytest.raises(ValueError, match=r"\(codes\): codes\.sources\.train a -> b"):
        StageRun(experiment, "tokenizer", train, {"codes": other}).is_complete()


def test_an_interrupted_attempt_keeps_what_auto_chose(experiment):
    stage_run(experiment, batch_size=4).begin()
    assert stage_run(experiment, batch_size="auto").train.batch_size == 4
    assert stage_run(experiment, batch_size=8).train.batch_size == 8


DISCRIMINATOR = [
    "--tokenizer.objective.discriminator.weight=0.1",
    "--tokenizer.objective.discriminator.start=0",
    "--tokenizer.model.vq.dead_code_threshold=0.9",
    "--tokenizer.model.vq.dead_code_check_every=2",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [DISCRIMINATOR, ["--tokenizer.model.quantizer=score_function"]], ids=["vq", "score"]
)
def test_auto_trains_the_tokenizer_that_the_chosen_numbers_train(tiny_yaml, tmp_path, options):
    """The probe's steps leave no trace in weights, codebooks, baselines or the discriminator."""
    command = ["train-tokenizer", "--config", str(tiny_yaml), *options]
    auto = "--tokenizer.train.gradient_accumulation_steps=auto"
    assert main([*command, "--name", "auto", auto]) == 0
    assert main([*command, "--name", "given"]) == 0
    weights = [
        load_file(tmp_path / "runs" / name / "tokenizer/checkpoints/step-6/weights.safetensors")
        for name in ("auto", "given")
    ]
    assert (
        read_settings(tmp_path / "runs/auto/tokenizer")["settings"]["train"][
            "gradient_accumulation_steps"
        ]
        == 1
    )
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert value.equal(weights[1][name]), name


def test_a_backup_of_other_settings_is_reported_with_both_values(experiment, caplog):
    """As after a flipped bit that leaves valid JSON. A kill leaves a backup without metrics, which
    is completed."""
    run = stage_run(experiment)
    run.begin()
    before_metrics = (run.folder / "settings.backup.json").read_text()
    run.finalize(TokenizerModule(experiment.tokenizer.model), {"nll": 1.0})
    (run.folder / "settings.backup.json").write_text(before_metrics)
    settings = run.folder / "settings.json"
    assert stage_run(experiment).is_complete() and not caplog.messages
    assert (run.folder / "settings.backup.json").read_bytes() == settings.read_bytes()
    settings.write_text(settings.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(ValueError, match=r"\(seed\)"):
        stage_run(experiment).is_complete()
    (line,) = caplog.messages
    assert "settings.json is used and differs from settings.backup.json" in line
    assert "(settings.seed 0 -> 1)" in line


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("settings.train.steps", "many"),
        ("settings.train.steps", True),
        ("settings.train.steps", -6),
        ("settings.train.batch_size", []),
        ("settings.train", None),
        ("settings.images", "a"),
        ("settings.sources", []),
        ("settings.codes", 3),
        ("settings.codes.tokenizer", 3),
        ("settings.data.mix", {}),
        ("settings.num_images", [1, "x"]),
        ("settings.init_from", 3),
        ("settings", []),
        ("held_out", "done"),
        ("held_out.nll", float("nan")),
    ],
)
def test_settings_of_another_type_are_restored_from_the_backup(experiment, caplog, place, value):
    inputs = {"data": {"mix": []}, "codes": {"tokenizer": "a"}, "seed": 0}
    run = StageRun(experiment, "tokenizer", experiment.tokenizer.train, inputs)
    run.begin()
    run.finalize(TokenizerModule(experiment.tokenizer.model), {"nll": 1.0})
    path = run.folder / "settings.json"
    content = json.loads(path.read_text())
    *outer, last = place.split(".")
    reduce(getitem, outer, content)[last] = value
    path.write_text(json.dumps(content))
    assert read_settings(run.folder)["settings"] == run.settings
    assert f"({place}" in caplog.text and "it is restored from settings.backup.json" in caplog.text
    assert run.is_complete()


def test_numbers_of_an_attempt_that_made_nothing_hold_for_the_same_inputs_alone(experiment):
    run = stage_run(experiment, batch_size=1024)
    run.begin()
    assert stage_run(experiment, batch_size="auto").train.batch_size == 1024
    assert stage_run(experiment, seed=1, batch_size="auto").train.batch_size == "auto"
    run.finalize(TokenizerModule(experiment.tokenizer.model), {})
    assert stage_run(experiment, seed=1, batch_size="auto").train.batch_size == 1024
