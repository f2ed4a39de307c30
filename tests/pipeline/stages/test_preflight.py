"""What would stop a later stage of `minidalle run` is an error before the first step."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from PIL import Image

from pipeline import load_experiment
from pipeline.stages import manifest, preflight, run
from pipeline.stages.preflight import check_run
from stage2_prior import TextTokenizer
from tests.helpers.data import encoded, write_shard


@pytest.fixture
def folder(tmp_path):
    """Twenty images; the last caption is far longer than the text slots."""
    made = tmp_path / "images"
    made.mkdir()
    for i in range(20):
        Image.new("RGB", (32, 32), (10 * i, 0, 0)).save(made / f"{i:02}.png")
        details = ", ".join(f"detail {k}" for k in range(60 if i == 19 else 1))
        (made / f"{i:02}.txt").write_text(f"shade {i}, {details}")
    return made


@pytest.fixture
def checked(tiny_yaml, folder):
    """Checks a run on the folder with these settings."""

    def check(*settings: object) -> None:
        options = [
            "--data.source",
            folder,
            "--data.val_fraction",
            "0.3",
            "--encode.max_images=null",
        ]
        every = ["--config", tiny_yaml, *options, *settings]
        check_run(load_experiment([str(one) for one in every]))

    return check


def test_long_captions_are_counted_before_the_first_step(checked):
    with pytest.raises(
        ValueError,
        match=r"1 of 20 captions need more than text\.max_length=48 slots \(the longest \d+: "
        r".*set text\.max_length=\d+, or cut them with text\.truncate=true",
    ):
        checked()


def test_truncated_captions_are_reported_before_the_first_step(checked, caplog):
    with caplog.at_level("INFO"):
        checked("--text.truncate", "true")
    assert "1 of 20 captions are truncated to text.max_length=48 slots" in caplog.text


def test_captions_that_are_not_encoded_are_not_checked(checked):
    checked("--encode.max_images", 2, "--encode.max_val_images", 1, "--data.val_fraction", "0.5")


def test_images_without_captions_are_refused_before_the_first_step(checked, folder):
    for file in folder.glob("*.txt"):
        file.unlink()
    with pytest.raises(
        ValueError, match=r"(?s)20 images and no captions.*`minidalle encode` work without them"
    ):
        checked()


def test_long_captions_of_a_streams_first_images_are_reported_before_the_first_step(
    checked, tmp_path, caplog
):
    """A text tokenizer that is given refuses them; one that learns from all may need fewer
    slots."""
    samples = [
        (f"{i:02}", {"png": encoded((9 * i, 0, 0), (32, 32)), "txt": b"a long shade, " * 30})
        for i in range(20)
    ]
    write_shard(tmp_path / "0.tar", samples)
    stream = ["--data.source", tmp_path / "0.tar", "--data.streaming", "true"]
    TextTokenizer.train(["a shade"], vocab_size=300, length=48).save(tmp_path / "text")
    with pytest.raises(ValueError, match=r"captions need more than text\.max_length=48 slots"):
        checked(*stream, "--text.pretrained", tmp_path / "text")
    checked(*stream)
    assert "held-out images of the stream: " in caplog.text
    assert "captions need more than text.max_length=48 slots" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["--sampling.num_inference_steps=17", "--prior.train.code_order=random"],
            r"sampling\.num_inference_steps is 17; an image has 16 codes",
        ),
        (
            ["--tokenizer.model.quantizer=gaussian", "--prior.latent.kind=vamp"],
            r"prior\.latent\.components is \d+ and there are \d+ images to train on; vamp",
        ),
    ],
)
def test_settings_that_stop_the_prior_are_refused_before_the_first_step(checked, settings, message):
    with pytest.raises(ValueError, match=message):
        checked("--text.truncate", "true", *settings)


def test_batches_that_do_not_split_are_refused_before_the_first_step(checked, monkeypatch):
    three = SimpleNamespace(num_processes=3)
    monkeypatch.setattr(preflight, "distributed_state", lambda timeout: three)
    with pytest.raises(
        ValueError,
        match=r"^prior\.train\.batch_size 8 does not split evenly over 3 processes; choose",
    ):
        checked("--tokenizer.train.batch_size", 9)


def test_a_batch_whose_micro_batches_are_auto_must_split_too(checked, monkeypatch):
    three = SimpleNamespace(num_processes=3)
    monkeypatch.setattr(preflight, "distributed_state", lambda timeout: three)
    auto = ("--prior.train.gradient_accumulation_steps", "auto")
    with pytest.raises(ValueError, match=r"^prior\.train\.batch_size 8 does not split evenly"):
        checked("--tokenizer.train.batch_size", 9, *auto)
    checked(
        *("--tokenizer.train.batch_size", 9, "--prior.train.batch_size", 9, *auto),
        *("--text.truncate", "true"),
    )


def test_a_prior_that_is_not_trained_needs_no_batch_that_splits(checked, monkeypatch):
    three = SimpleNamespace(num_processes=3)
    monkeypatch.setattr(preflight, "distributed_state", lambda timeout: three)
    gaussian = ("--tokenizer.model.quantizer=gaussian", "--tokenizer.train.batch_size=9")
    checked(*gaussian, "--prior.latent.kind=standard")
    with pytest.raises(ValueError, match=r"^prior\.train\.batch_size 8 does not split evenly"):
        checked(*gaussian, "--prior.latent.kind=realnvp")


def test_a_longer_tokenizer_of_a_run_with_a_prior_of_latents_is_refused(tiny_yaml, tmp_path):
    settings = ["--config", str(tiny_yaml), "--tokenizer.model.quantizer=gaussian"]
    experiment = load_experiment(settings)
    train = {"steps": experiment.tokenizer.train.steps}
    written = {"format": manifest.FORMAT, "settings": {"train": train}}
    for stage in ("tokenizer", "prior"):
        (experiment.folder / stage).mkdir(parents=True)
        content = json.dumps(written | {"held_out": {"nll": 1.0}})
        (experiment.folder / stage / "settings.json").write_text(content)
    longer = load_experiment([*settings, "--tokenizer.train.steps=99"])
    with pytest.raises(
        ValueError, match=r"prior is of the latents of the tokenizer after \d+ steps"
    ):
        check_run(longer)
    (experiment.folder / "prior" / "settings.json").write_text(json.dumps(written))
    check_run(longer)  # an attempt that made nothing


def test_a_missing_package_is_named_before_the_first_step(checked, monkeypatch):
    monkeypatch.setattr(preflight, "check_init_from", lambda *options: None)
    monkeypatch.setattr("pipeline.stages.finetune.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"prior\.lora_rank is 2, which needs peft"):
        checked(
            *("--prior.lora_rank=2", "--prior.init_from=b"),
            *("--tokenizer.init_from=b", "--tokenizer.frozen=true"),
        )


def test_a_run_checks_before_it_trains(tiny_yaml, monkeypatch):
    def check(experiment):
        raise ValueError("found early")

    monkeypatch.setattr(run, "check_run", check)
    monkeypatch.setattr(run, "train_tokenizer", None)
    with pytest.raises(ValueError, match="found early"):
        run.run(load_experiment(["--config", str(tiny_yaml)]))
