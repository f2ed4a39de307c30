"""The same command again: after a kill, with other settings, other images, a full disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from pipeline.cli.main import main
from pipeline.config.load import load_experiment
from pipeline.stages.run import assemble_bundle
from pipeline.training import trainer
from stage1_tokenizer import TokenizerModule
from stage2_prior import PriorModule, TextTokenizer
from tests.helpers.cli import fails
from tests.helpers.experiments import TINY

pytestmark = pytest.mark.slow


@pytest.fixture
def run(finished_run, tmp_path) -> tuple[list[str], Path]:
    """Arguments and folder of a copy of the finished run."""
    path, folder = finished_run
    copy = Path(shutil.copytree(folder, tmp_path / "runs" / "tiny"))
    return ["--config", str(path), "--output_dir", str(tmp_path / "runs")], copy


def unfinished(stage: Path) -> None:
    settings = json.loads((stage / "settings.json").read_text())
    for name in ("settings.json", "settings.backup.json"):
        (stage / name).write_text(json.dumps({"format": 1, "settings": settings["settings"]}))


def test_changed_settings_after_a_kill_are_refused(run, capsys):
    """With a checkpoint they are refused; without one there is nothing to lose, and the text
    tokenizer is rebuilt too."""
    arguments, folder = run
    unfinished(folder / "prior")
    longer = ["train-prior", *arguments, "--text.max_length", "40"]
    fails(capsys, longer, "made with other settings (text)")
    shutil.rmtree(folder / "prior" / "checkpoints")
    assert main(longer) == 0
    assert TextTokenizer.load(folder / "text_tokenizer").length == 40
    capsys.readouterr()
    unfinished(folder / "tokenizer")
    fails(capsys, longer, "tokenizer is not finished yet; run `minidalle train-tokenizer`")


def test_finished_stage_accepts_more_steps_only(run, capsys):
    arguments, folder = run
    fails(
        capsys,
        ["train-prior", *arguments, "--prior.train.learning_rate", "1e-4"],
        "made with other settings (train.learning_rate)",
    )
    fails(
        capsys,
        ["train-prior", *arguments, "--prior.train.steps", "4"],
        "made with other settings (train.steps)",
    )
    before = PriorModule.from_pretrained(folder / "prior").fingerprint
    assert (
        main(
            [
                "train-prior",
                *arguments,
                "--prior.train.log_every",
                "1",
                "--prior.train.eval_every",
                "2",
            ]
        )
        == 0
    )
    assert PriorModule.from_pretrained(folder / "prior").fingerprint == before
    assert main(["train-prior", *arguments, "--prior.train.steps", "8"]) == 0
    assert PriorModule.from_pretrained(folder / "prior").fingerprint != before
    assert "resuming from" in capsys.readouterr().out


def test_a_killed_prior_ends_as_an_uninterrupted_one(run, monkeypatch, capsys):
    """With Muon, the best weights kept and dropout: everything that has a state or draws random
    numbers."""
    arguments, folder = run
    shutil.rmtree(folder / "prior")
    other = Path(shutil.copytree(folder, folder.parent.parent / "other" / "tiny"))
    options = [
        "--prior.train.optimizer",
        "muon",
        "--prior.train.save_best",
        "true",
        "--prior.model.dropout",
        "0.2",
    ]
    assert main(["train-prior", *arguments, *options]) == 0
    capsys.readouterr()
    fails(
        capsys,
        ["train-prior", *arguments, *options, "--prior.train.eval_every", "2"],
        "other settings (train.eval_every)",
    )
    step = trainer.Trainer.train_step

    def killed(self: trainer.Trainer, number: int, batch: object):
        if number == 5:
            raise KeyboardInterrupt
        return step(self, number, batch)

    again = ["train-prior", *arguments[:2], "--output_dir", str(other.parent), *options]
    monkeypatch.setattr("pipeline.training.trainer.Trainer.train_step", killed)
    assert main(again) == 130
    assert (other / "prior" / "checkpoints" / "step-4").is_dir() and not (
        other / "prior" / "model.safetensors"
    ).exists()
    monkeypatch.setattr("pipeline.training.trainer.Trainer.train_step", step)
    assert main(again) == 0
    assert (
        PriorModule.from_pretrained(other / "prior").fingerprint
        == PriorModule.from_pretrained(folder / "prior").fingerprint
    )


DISCRIMINATOR = [
    "--tokenizer.objective.discriminator.weight",
    "1",
    "--tokenizer.objective.discriminator.width",
    "16",
    "--tokenizer.objective.discriminator.lecam",
    "0.1",
    "--tokenizer.train.optimizer",
    "muon",
]
VARIANTS = {
    "discriminator since step 3": [
        *DISCRIMINATOR,
        "--tokenizer.objective.discriminator.start",
        "3",
    ],
    "discriminator after the kill": [
        *DISCRIMINATOR,
        "--tokenizer.objective.discriminator.start",
        "5",
    ],
    "score function": ["--tokenizer.model.quantizer", "score_function"],
    "residual": [
        "--tokenizer.model.quantizer",
        "residual",
        "--tokenizer.model.residual.shared",
        "true",
    ],
    "gaussian": ["--tokenizer.model.quantizer", "gaussian"],
    "gaussian vector": [
        "--tokenizer.model.quantizer",
        "gaussian",
        "--tokenizer.model.gaussian.latents",
        "vector",
        "--tokenizer.model.gaussian.free_bits",
        "0.1",
    ],
    "perceptual": [
        "--tokenizer.objective.perceptual.weight",
        "1",
        "--tokenizer.model.likelihood",
        "logit_laplace",
    ],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_killed_tokenizer_ends_as_an_uninterrupted_one(tiny_yaml, tmp_path, monkeypatch, variant):
    """With every part that has a state of its own: the discriminator, its optimizer and anchors,
    baselines, shared books."""
    step, fingerprints = trainer.Trainer.train_step, []

    def killed(self: trainer.Trainer, number: int, batch: object):
        if number == 5:
            raise KeyboardInterrupt
        return step(self, number, batch)

    for name in ("whole", "cut"):
        arguments = [
            "train-tokenizer",
            "--config",
            str(tiny_yaml),
            "--name",
            name,
            *VARIANTS[variant],
        ]
        if name == "cut":
            monkeypatch.setattr("pipeline.training.trainer.Trainer.train_step", killed)
            assert main(arguments) == 130
            assert (tmp_path / "runs" / name / "tokenizer" / "checkpoints" / "step-4").is_dir()
            monkeypatch.setattr("pipeline.training.trainer.Trainer.train_step", step)
        assert main(arguments) == 0
        fingerprints.append(
            TokenizerModule.from_pretrained(tmp_path / "runs" / name / "tokenizer").fingerprint
        )
        weights = load_file(
            tmp_path
            / "runs"
            / name
            / "tokenizer"
            / "checkpoints"
            / "step-6"
            / "weights.safetensors"
        )
        assert any(key.startswith("discriminator.") for key in weights) == variant.startswith(
            "discriminator"
        )
        if variant.startswith("discriminator"):
            fingerprints.append(
                {
                    key: value.tolist()
                    for key, value in weights.items()
                    if key.startswith("discriminator.")
                }
            )
    half = len(fingerprints) // 2
    assert fingerprints[:half] == fingerprints[half:]


def folder_of_images(folder: Path, count: int) -> None:
    folder.mkdir(exist_ok=True)
    for i in range(count):
        Image.new("RGB", (32, 32), (i * 8, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"shade {i}")


@pytest.fixture
def own_folder(tmp_path) -> list[str]:
    """Arguments of a run on a folder of 12 images."""
    folder_of_images(tmp_path / "images", 12)
    values = {
        **TINY,
        "output_dir": str(tmp_path / "runs"),
        "data": {"source": str(tmp_path / "images"), "image_size": 32, "val_fraction": 0.3},
        "encode": {"max_val_images": 10},
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(values))
    return ["--config", str(tmp_path / "own.yaml")]


def test_changed_images_are_another_run(own_folder, tmp_path, capsys):
    for stage in ("train-tokenizer", "encode", "train-prior"):
        assert main([stage, *own_folder]) == 0
    capsys.readouterr()
    folder_of_images(tmp_path / "images", 13)
    fails(capsys, ["train-tokenizer", *own_folder], "made with other settings (images)")
    fails(
        capsys,
        ["encode", *own_folder],
        "holds codes made with something else (",
        "train images or captions of the source ",
    )
    shutil.rmtree(tmp_path / "runs" / "tiny" / "codes")
    assert main(["encode", *own_folder]) == 0
    capsys.readouterr()
    fails(capsys, ["train-prior", *own_folder], "made with other settings (codes)")


def test_empty_validation_split_is_reported_before_writing(own_folder, tmp_path, capsys):
    fails(
        capsys,
        ["run", *own_folder, "--data.val_fraction", "0"],
        "12 images to train on and 0 held out",
        "raise data.val_fraction (now 0.0)",
    )
    assert not (tmp_path / "runs").exists()


def test_a_held_out_caption_that_is_too_long_is_counted(own_folder, tmp_path, capsys):
    from pipeline.config.load import load_experiment
    from pipeline.data.load import load_source

    held_out = load_source(load_experiment(own_folder).data, "held_out").captions([0])[0]
    (tmp_path / "images" / f"{held_out.removeprefix('shade ')}.txt").write_text("z" * 99)
    for stage in ("train-tokenizer", "encode"):
        assert main([stage, *own_folder]) == 0
    capsys.readouterr()
    fails(
        capsys,
        ["train-prior", *own_folder],
        "1 of 12 captions need more than text.max_length=48 slots",
    )


def test_another_optimizer_after_a_kill_is_refused(run, capsys):
    arguments, folder = run
    path = folder / "tokenizer" / "settings.json"
    written = path.read_text().replace('"adamw"', '"muon"').replace('"held_out": {', '"other": {')
    for name in ("settings.json", "settings.backup.json"):
        (folder / "tokenizer" / name).write_text(written)
    fails(
        capsys,
        ["train-tokenizer", *arguments, "--tokenizer.train.optimizer", "muon"],
        "made with the optimizers ['tokenizer/adamw']",
    )


@pytest.mark.parametrize(
    "where",
    [
        "pipeline.training.checkpoint.save_file",
        "stage1_tokenizer.model.TokenizerModule.save_pretrained",
    ],
)
def test_full_disk_is_reported_and_the_last_checkpoint_kept(run, capsys, monkeypatch, where):
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    arguments, folder = run
    checkpoints = folder / "tokenizer" / "checkpoints"
    monkeypatch.setattr(where, full)
    assert main(["train-tokenizer", *arguments, "--tokenizer.train.steps", "8"]) == 1
    error = capsys.readouterr().err
    assert (
        "No space left on device" in error
        and "free some space" in error
        and "Traceback" not in error
    )
    assert (checkpoints / "step-6" / "state.json").is_file() and not list(checkpoints.glob(".*"))
    monkeypatch.undo()
    assert main(["train-tokenizer", *arguments, "--tokenizer.train.steps", "8"]) == 0
    assert TokenizerModule.from_pretrained(folder / "tokenizer")


def test_missing_or_truncated_manifests_are_named(run, capsys):
    """Truncated, empty or absent: one line each, and nothing is mixed."""
    arguments, folder = run
    settings = folder / "tokenizer" / "settings.json"
    backup = folder / "tokenizer" / "settings.backup.json"
    whole = settings.read_text()
    for content in ("{}", '{"settings": {}}', whole[:40]):
        settings.write_text(content)
        backup.write_text(content)
        fails(capsys, ["train-tokenizer", *arguments], "settings.json is truncated or corrupted")
    settings.unlink()
    backup.unlink()
    fails(
        capsys,
        ["train-tokenizer", *arguments, "--tokenizer.train.steps", "8"],
        "has the checkpoint step-6 and no settings.json",
    )
    settings.write_text(whole)
    manifest = folder / "codes" / "codes.json"
    manifest.write_text(manifest.read_text()[:100])
    fails(
        capsys,
        ["encode", *arguments],
        "codes.json is truncated or corrupted",
        f"move {folder / 'codes'} away and run `minidalle encode` again",
    )
    manifest.unlink()
    (folder / "codes" / "plan.json").write_text('{"format": 1}')
    fails(capsys, ["encode", *arguments], "plan.json is truncated or corrupted (tokenizer is None)")
    shutil.rmtree(folder / "codes")
    fails(
        capsys,
        ["train-prior", *arguments],
        "holds no complete codes dataset; run `minidalle encode` first",
    )


@pytest.mark.parametrize("stage", ["tokenizer", "prior"])
def test_one_flipped_bit_of_a_finished_stage_is_refused_and_rebuilt(run, capsys, stage):
    """It is not delivered into a bundle; the command that the error names makes it whole."""
    arguments, folder = run
    weights = folder / stage / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    remedy = f"or run `minidalle train-{stage}`, which delivers it again"
    with pytest.raises(ValueError, match=f"was changed or damaged since.*{remedy}"):
        assemble_bundle(load_experiment(arguments))
    assert main([f"train-{stage}", *arguments]) == 0
    assert "is delivered again from its last checkpoint" in capsys.readouterr().err
    assert weights.read_bytes() == whole


def test_a_link_in_the_place_of_weights_is_replaced_and_not_followed(run, tmp_path):
    arguments, folder = run
    weights = folder / "prior" / "model.safetensors"
    whole = weights.read_bytes()
    (tmp_path / "mine").write_text("kept")
    weights.unlink()
    weights.symlink_to(tmp_path / "mine")
    assert main(["train-prior", *arguments]) == 0
    assert weights.read_bytes() == whole and not weights.is_symlink()
    assert (tmp_path / "mine").read_text() == "kept"


def test_corrupted_weights_of_a_finished_stage_are_rebuilt(run, capsys):
    arguments, folder = run
    weights = folder / "tokenizer" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    for stage in ("encode", "train-prior"):
        fails(
            capsys,
            [stage, *arguments],
            "cannot be read",
            "or run `minidalle train-tokenizer`, which delivers it again from its last",
        )
    assert main(["train-tokenizer", *arguments]) == main(["encode", *arguments]) == 0
    assert "resuming from" in capsys.readouterr().out and weights.read_bytes() == whole
    weights.unlink()
    assert main(["train-tokenizer", *arguments]) == 0 and weights.read_bytes() == whole
