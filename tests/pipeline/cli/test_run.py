"""One tiny run from YAML to images, each command, and its errors."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import TextToImagePipeline
from pipeline.cli.main import COMMANDS, main
from pipeline.data.codes.dataset import CodesDataset, read_manifest
from pipeline.training.checkpoint import newest_checkpoint
from stage1_tokenizer import TokenizerModule
from stage1_tokenizer.metrics import psnr, ssim
from stage2_prior import PriorModule
from tests.helpers.cli import fails

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]


def test_training_errors_are_one_line(tiny_yaml, capsys):
    """Not behind the bar, which the error finds half drawn."""
    arguments = [
        "--tokenizer.model.num_codes",
        "512",
        "--tokenizer.model.vq.kmeans_iterations",
        "3",
    ]
    assert main(["train-tokenizer", "--config", str(tiny_yaml), *arguments]) == 1
    assert any(
        line.startswith("minidalle train-tokenizer: k-means")
        for line in capsys.readouterr().err.splitlines()
    )


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


@pytest.fixture
def bundle(finished_run, tmp_path) -> Path:
    """A copy of the finished bundle that a test may damage."""
    return Path(shutil.copytree(finished_run[1] / "bundle", tmp_path / "bundle"))


def test_run_writes_the_documented_folder(finished_run):
    folder = finished_run[1]
    for name in (
        "experiment.yaml",
        "tokenizer/config.json",
        "tokenizer/model.safetensors",
        "codes/codes.json",
        "prior/config.json",
        "tokenizer/checkpoints/step-6",
        "prior/checkpoints/step-6",
        "bundle/pipeline.json",
        "bundle/prior/model.safetensors",
        "bundle/tokenizer/model.safetensors",
        "bundle/text_tokenizer/tokenizer.json",
        "samples/reconstructions.png",
        "samples/prior.png",
        "samples/held-out-prompts.png",
        "samples/held-out-prompts.txt",
        "logs",
    ):
        assert (folder / name).exists(), name
    assert list((folder / "logs").rglob("events.out*"))
    assert not [p for p in folder.rglob("*") if p.suffix in (".pt", ".pkl", ".bin", ".ckpt")]
    assert not [p for p in folder.rglob("*") if "writing" in p.name]


def test_repeated_run_changes_nothing(finished_run, capsys):
    path, folder = finished_run
    before = {
        p: p.stat().st_mtime_ns
        for part in ("tokenizer", "codes", "prior")
        for p in (folder / part).rglob("*.*")
    }
    for command in ("train-tokenizer", "encode", "train-prior"):
        assert main([command, "--config", str(path)]) == 0
    assert before == {p: p.stat().st_mtime_ns for p in before}
    assert "next: minidalle generate" in capsys.readouterr().out


def test_prior_has_the_code_vectors_of_its_tokenizer(finished_run):
    bundle = finished_run[1] / "bundle"
    told = PriorModule.from_pretrained(bundle / "prior").code_vectors
    vectors = TokenizerModule.from_pretrained(bundle / "tokenizer").code_vectors
    torch.testing.assert_close(told * (vectors - vectors.mean(0)).std() + vectors.mean(0), vectors)


def test_codes_are_those_of_the_images(finished_run):
    from pipeline.config.load import load_experiment
    from pipeline.data.load import load_source
    from stage1_tokenizer import to_model_range

    path, folder = finished_run
    codes, source = (
        CodesDataset(folder / "codes", "train"),
        load_source(load_experiment(["--config", str(path)]).data, "train"),
    )
    tokenizer = TokenizerModule.from_pretrained(folder / "tokenizer")
    assert len(codes) == 40 and len(CodesDataset(folder / "codes", "held_out")) == 10
    expected = tokenizer.encode(to_model_range(torch.from_numpy(source.images([3, 7])))).flatten(1)
    assert (
        torch.from_numpy(codes.codes([3, 7])) == expected
    ).float().mean() > 0.8  # bf16 may turn a near tie
    assert codes.captions([3, 7]) == source.captions([3, 7]) and codes.source_rows([3, 7]) == [3, 7]


def test_generate_writes_numbered_images_a_grid_and_rows(finished_run, tmp_path, capsys):
    arguments = [
        "generate",
        "--bundle",
        finished_run[1] / "bundle",
        "a red circle",
        "a blue star",
        "--num-images",
        2,
        "--out",
        tmp_path / "a",
    ]
    assert main([str(a) for a in arguments]) == 0
    rows = [
        json.loads(line) for line in (tmp_path / "a" / "samples.jsonl").read_text().splitlines()
    ]
    assert [r["prompt"] for r in rows] == ["a red circle"] * 2 + ["a blue star"] * 2
    assert set(rows[0]) == {"prompt", "file", "seed", "log_likelihood"} and all(
        r["log_likelihood"] < 0 for r in rows
    )
    assert (
        all(size_of(tmp_path / "a" / r["file"]) == (32, 32) for r in rows)
        and (tmp_path / "a" / "grid.png").is_file()
    )
    assert "wrote 4 images" in capsys.readouterr().out
    (tmp_path / "prompts.txt").write_text("a blue star\n")
    assert (
        main(
            [
                "generate",
                "--bundle",
                str(finished_run[1] / "bundle"),
                "--prompts",
                str(tmp_path / "prompts.txt"),
                "--num-images",
                "2",
                "--out",
                str(tmp_path / "b"),
            ]
        )
        == 0
    )
    again = json.loads((tmp_path / "b" / "samples.jsonl").read_text().splitlines()[0])
    assert (tmp_path / "b" / again["file"]).read_bytes() == (
        tmp_path / "a" / rows[2]["file"]
    ).read_bytes()


def test_images_do_not_depend_on_the_batch(finished_run):
    pipe = TextToImagePipeline.from_pretrained(finished_run[1] / "bundle")
    together = pipe(
        ["a red circle", "a tiny cross"], num_images_per_prompt=3, seed=5, guidance_scale=2.0
    )
    alone = pipe("a tiny cross", num_images_per_prompt=3, seed=5, guidance_scale=2.0, batch_size=2)
    assert torch.equal(together.codes[3:], alone.codes) and together.codes.shape == (6, 4, 4)
    torch.testing.assert_close(together.log_likelihood[3:], alone.log_likelihood)
    assert [np.asarray(a).tobytes() for a in together.images[3:]] == [
        np.asarray(b).tobytes() for b in alone.images
    ]
    assert not torch.equal(
        alone.codes, pipe("a tiny cross", num_images_per_prompt=3, seed=6, guidance_scale=2.0).codes
    )


@pytest.mark.parametrize("bf16", [True, False])
def test_compiled_pipeline_samples_in_bf16_where_supported(finished_run, monkeypatch, bf16):
    monkeypatch.setattr("pipeline.runtime.devices.uses_bf16", lambda precision, device: bf16)
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    plain = TextToImagePipeline.from_pretrained(finished_run[1] / "bundle")
    pipe = TextToImagePipeline.from_pretrained(finished_run[1] / "bundle").compile()
    assert pipe.prior.dtype == (torch.bfloat16 if bf16 else torch.float32)
    out = pipe(["a red circle", "a tiny cross"], seed=5, guidance_scale=2.0)
    torch.testing.assert_close(
        out.log_likelihood,
        plain(["a red circle", "a tiny cross"], seed=5, guidance_scale=2.0).log_likelihood,
        rtol=0.1,
        atol=0.1,
    )
    assert torch.equal(pipe("a tiny cross", seed=5, guidance_scale=2.0).codes[0], out.codes[1])


def test_odd_prompts_are_generated(finished_run, tmp_path, capsys):
    pipe = TextToImagePipeline.from_pretrained(finished_run[1] / "bundle")
    assert len(pipe(["zxqv", "un élan 赤 🌞"]).images) == 2
    with pytest.warns(UserWarning, match="an empty prompt is sampled without a caption"):
        pipe("")
    assert (
        main(
            [
                "generate",
                "--bundle",
                str(finished_run[1] / "bundle"),
                "",
                "--num-images",
                "1",
                "--out",
                str(tmp_path / "x"),
            ]
        )
        == 0
    )
    assert "note: an empty prompt is sampled without a caption" in capsys.readouterr().out
    bundle = str(finished_run[1] / "bundle")
    fails(
        capsys,
        ["generate", "--bundle", bundle, "word " * 99, "--out", tmp_path / "y"],
        "text slots",
        "shorten",
    )
    assert not (tmp_path / "y").exists()
    assert (
        main(
            [
                "generate",
                "--bundle",
                bundle,
                "word " * 99,
                "--truncate",
                "--num-images",
                "1",
                "--out",
                str(tmp_path / "y"),
            ]
        )
        == 0
    )


def test_bad_sampling_options_are_named(finished_run, tmp_path, capsys):
    bundle = finished_run[1] / "bundle"
    fails(
        capsys,
        ["generate", "--bundle", bundle, "x", "--temperature=-1", "--out", tmp_path / "y"],
        "temperature is -1.0",
    )
    fails(
        capsys,
        ["generate", "--bundle", bundle, "x", "--num-images", 0, "--out", tmp_path / "y"],
        "num_images_per_prompt is 0",
    )
    fails(
        capsys,
        ["generate", "--bundle", bundle, "--out", tmp_path / "y"],
        "no prompt was given",
        status=2,
    )
    assert not (tmp_path / "y").exists()
    with pytest.raises(ValueError, match="no prompt was given"):
        TextToImagePipeline.from_pretrained(bundle)([])


def test_guidance_without_caption_dropout_is_refused(bundle, tmp_path, capsys):
    prior = PriorModule.from_pretrained(bundle / "prior")
    prior.config.trained_with_caption_dropout = False
    pipe = TextToImagePipeline.from_pretrained(bundle)
    TextToImagePipeline(pipe.tokenizer, prior, pipe.text, pipe.defaults).save_pretrained(
        tmp_path / "plain"
    )
    fails(
        capsys,
        [
            "generate",
            "--bundle",
            tmp_path / "plain",
            "x",
            "--guidance_scale",
            2,
            "--out",
            tmp_path / "y",
        ],
        "caption dropout",
    )
    fails(
        capsys,
        ["generate", "--bundle", tmp_path / "plain", "", "--out", tmp_path / "y"],
        "an empty prompt needs a prior trained with",
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: (b / "pipeline.json").unlink(), "holds no pipeline.json, so it is no bundle"),
        (
            lambda b: (b / "pipeline.json").write_text('{"format": 1'),
            "pipeline.json is truncated or corrupted",
        ),
        (
            lambda b: (b / "pipeline.json").write_text('{"format": 9}'),
            "bundle format 9, and this version reads 1",
        ),
        (lambda b: (b / "pipeline.json").write_text("[]"), "corrupted (it holds no JSON object)"),
        (
            lambda b: (b / "pipeline.json").write_text('{"format": 1, "sampling": {}}'),
            "does not describe a bundle",
        ),
        (
            lambda b: (b / "pipeline.json").write_text(
                '{"format": 1, "sampling": {"top_P": 1}, "trained_on": {}}'
            ),
            "options ['top_P']",
        ),
        (lambda b: shutil.rmtree(b / "prior"), "has no prior/"),
        (lambda b: (b / "tokenizer" / "model.safetensors").unlink(), "holds no model.safetensors"),
        (lambda b: (b / "prior" / "model.safetensors").write_bytes(b"\x10"), "cannot be read"),
        (lambda b: (b / "text_tokenizer" / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (
            lambda b: (b / "text_tokenizer" / "text.json").write_text("{}"),
            "not a whole text tokenizer",
        ),
        (
            lambda b: (b / "text_tokenizer" / "text.json").write_text("[]"),
            "not a whole text tokenizer",
        ),
    ],
)
def test_corrupted_bundle_is_named(bundle, capsys, tmp_path, damage, message):
    damage(bundle)
    fails(capsys, ["generate", "--bundle", bundle, "x", "--out", tmp_path / "y"], message)
    assert not (tmp_path / "y").exists()


def test_exchanged_bundle_part_is_named(bundle, capsys, tmp_path):
    tokenizer = TokenizerModule.from_pretrained(bundle / "tokenizer")
    with torch.no_grad():
        next(tokenizer.parameters()).add_(1)
    tokenizer.save_pretrained(bundle / "tokenizer")
    fails(
        capsys,
        ["generate", "--bundle", bundle, "x"],
        "bundle/tokenizer has fingerprint",
        "comes from another bundle",
    )


def test_mismatched_bundle_parts_are_refused(bundle):
    from stage1_tokenizer import TokenizerConfig

    pipe = TextToImagePipeline.from_pretrained(bundle)
    other = TokenizerModule(TokenizerConfig(image_size=32, num_codes=8, width=32))
    with pytest.raises(ValueError, match="give both from one bundle"):
        TextToImagePipeline(other, pipe.prior, pipe.text)
    pipe.text.length = 9
    with pytest.raises(ValueError, match="9 slots"):
        TextToImagePipeline(pipe.tokenizer, pipe.prior, pipe.text)


def test_reconstruct_writes_originals_and_reconstructions(finished_run, tmp_path, capsys):
    Image.new("L", (50, 40), 90).save(tmp_path / "grey.png")
    Image.effect_noise((96, 64), 50).save(tmp_path / "noise.png")
    (tmp_path / "broken.png").write_bytes(b"x")
    tokenizer, out = finished_run[1] / "tokenizer", tmp_path / "r"
    command = ["reconstruct", "--tokenizer", str(tokenizer), str(tmp_path / "noise.png")]
    assert main([*command, "--out", str(out)]) == 0
    assert size_of(out / "00000-noise.png") == (96, 64) and (out / "grid.png").is_file()
    assert "dB" in capsys.readouterr().out
    both = [*command, str(tmp_path / "grey.png"), "--out", str(out)]
    fails(
        capsys,
        both,
        "grey.png: pixels are 50x40",
        "multiples of 8; the nearest that fits is 48x40",
        "(the option size does)",
    )
    assert main([*both, "--size", "32"]) == 0 and size_of(out / "00001-grey.png") == (32, 32)
    assert main([*both, "--size", "48x40"]) == 0 and size_of(out / "00001-grey.png") == (48, 40)
    for file, message in (
        ("broken.png", "cannot be read as an image"),
        ("none.png", "there is no image"),
    ):
        fails(
            capsys,
            ["reconstruct", "--tokenizer", tokenizer, tmp_path / file, "--out", tmp_path / "q"],
            message,
        )
    fails(
        capsys,
        ["reconstruct", "--tokenizer", tmp_path / "none", tmp_path / "grey.png"],
        "there is no tokenizer in",
    )
    for wrong in ("0", "8x", "8x8x8", "big"):
        fails(
            capsys,
            [*command, "--size", wrong, "--out", tmp_path / "q"],
            f"--size is {wrong!r}; it must be a number",
            status=2,
        )
    fails(capsys, [*command, "--tile", "0", "--out", tmp_path / "q"], "--tile is 0", status=2)
    assert not (tmp_path / "q").exists()


def test_a_large_image_is_the_same_in_pieces(finished_run, tmp_path):
    Image.effect_noise((320, 192), 50).save(tmp_path / "photo.png")
    images = []
    for tile in ("64", "512"):
        command = [
            "reconstruct",
            "--tokenizer",
            str(finished_run[1] / "tokenizer"),
            str(tmp_path / "photo.png"),
            "--tile",
            tile,
        ]
        assert main([*command, "--out", str(tmp_path / tile)]) == 0
        with Image.open(tmp_path / tile / "00000-photo.png") as image:
            images.append(np.asarray(image).astype(int))
    assert images[0].shape == (192, 320, 3) and np.abs(images[0] - images[1]).max() <= 1


def test_evaluate_writes_every_promised_key(finished_run, tmp_path, capsys):
    out = tmp_path / "e.json"
    assert (
        main(
            [
                "evaluate",
                "--bundle",
                str(finished_run[1] / "bundle"),
                "--config",
                str(finished_run[0]),
                "--out",
                str(out),
                "--max-images",
                "12",
            ]
        )
        == 0
    )
    metrics = json.loads(out.read_text())
    for key in (
        "psnr",
        "ssim",
        "codebook_usage",
        "codebook_perplexity",
        "distinct_codes",
        "reencode_agreement",
        "reencode_agreement_jpeg95",
        "nats_per_code",
        "nats_per_text_token",
        "oracle_accuracy_real",
        "oracle_accuracy_reconstructed",
        "prompt_accuracy",
        "prompt_accuracy_new_pairs",
    ):
        assert isinstance(metrics[key], float), key
    assert metrics["oracle_accuracy_real"] == 1 and metrics["settings"]["images"] == 12
    assert "prompt_accuracy" in capsys.readouterr().out
    fails(
        capsys,
        [
            "evaluate",
            "--bundle",
            finished_run[1] / "bundle",
            "--config",
            finished_run[0],
            "--data.image_size",
            48,
        ],
        "images of 32 pixels and data.image_size is 48",
    )


def test_other_settings_in_a_run_folder_are_refused(finished_run, capsys):
    config = ["--config", finished_run[0]]
    fails(
        capsys,
        ["train-tokenizer", *config, "--tokenizer.model.num_codes", 8],
        "made with other settings (model)",
    )
    fails(
        capsys,
        ["encode", *config, "--encode.max_images", 20],
        "made with something else (encode.max_images 40 -> 20)",
    )
    fails(
        capsys,
        ["train-prior", *config, "--prior.model.depth", 2],
        "made with other settings (model)",
    )


def test_codes_of_another_tokenizer_are_refused(finished_run, tmp_path, capsys):
    path, folder = finished_run
    copy = shutil.copytree(folder, tmp_path / "runs" / "tiny")
    tokenizer = TokenizerModule.from_pretrained(copy / "tokenizer")
    with torch.no_grad():
        next(tokenizer.parameters()).add_(1)
    tokenizer.save_pretrained(copy / "tokenizer")
    made, now = read_manifest(copy / "codes")["tokenizer"], tokenizer.fingerprint
    again = ["--config", path, "--output_dir", tmp_path / "runs"]
    fails(
        capsys,
        ["encode", *again],
        f"made with something else (tokenizer {made} -> {now}); go back to that to keep them",
    )
    fails(capsys, ["train-prior", *again], f"were made by tokenizer {made}")


def test_stages_require_earlier_stages(tiny_yaml, capsys):
    fails(capsys, ["encode", "--config", tiny_yaml], "run `minidalle train-tokenizer`")
    fails(capsys, ["train-prior", "--config", tiny_yaml], "run `minidalle train-tokenizer`")


def test_long_captions_are_counted_or_truncated(finished_run, tmp_path, capsys):
    path, folder = finished_run
    copy = shutil.copytree(folder, tmp_path / "runs" / "tiny")
    for part in ("prior", "text_tokenizer"):
        shutil.rmtree(copy / part)
    arguments = [
        "train-prior",
        "--config",
        path,
        "--output_dir",
        tmp_path / "runs",
        "--text.max_length",
        9,
    ]
    fails(
        capsys,
        arguments,
        "of 50 captions need more than text.max_length=9 slots",
        "text.truncate=true",
    )
    assert not (
        copy / "text_tokenizer"
    ).exists()  # or the length that the message asks for would not be taken
    assert main([str(a) for a in arguments] + ["--text.truncate", "true"]) == 0
    assert "captions are truncated to text.max_length=9" in capsys.readouterr().out


def test_incomplete_codes_folder_is_named(finished_run, tmp_path, capsys):
    path, folder = finished_run
    copy = shutil.copytree(folder, tmp_path / "runs" / "tiny")
    (copy / "codes" / "codes.json").unlink()
    shutil.rmtree(copy / "prior")
    fails(
        capsys,
        ["train-prior", "--config", path, "--output_dir", tmp_path / "runs"],
        "holds no complete codes dataset",
    )
    shutil.copy(folder / "codes" / "codes.json", copy / "codes")
    next((copy / "codes").glob("train*.arrow")).unlink()
    fails(
        capsys,
        ["train-prior", "--config", path, "--output_dir", tmp_path / "runs"],
        "is missing; run `minidalle encode` again",
    )


def test_usage_errors_exit_with_status_2(capsys, tmp_path):
    fails(
        capsys, ["draw"], "'draw' is not a command; choose one of: run, train-tokenizer", status=2
    )
    fails(capsys, ["run"], "no configuration was given", status=2)
    fails(
        capsys,
        ["run", "--config", tmp_path / "none.yaml"],
        "there is no configuration file",
        status=1,
    )
    assert main([]) == 2 and main(["--help"]) == 0
    for command in COMMANDS:
        assert main([command, "--help"]) == 0
    assert main(["generate", "--nonsense"]) == 2


DIES_AT_STEP_47 = """
import os, signal, sys
from pipeline import cli
from pipeline.training import trainer
rate = trainer.learning_rate
def dies(step, config):
    if step == 47:
        os.kill(os.getpid(), signal.SIGKILL)
    return rate(step, config)
trainer.learning_rate = dies
cli.main(sys.argv[1:])
"""


def test_killed_run_resumes_without_loss(tiny_yaml):
    """kill -9 in the midst of a step; the same command goes on and ends with the uninterrupted
    run's weights."""
    arguments = ["train-tokenizer", "--config", str(tiny_yaml), "--tokenizer.train.steps", "60"]
    command = [sys.executable, "-m", "pipeline.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    runs = tiny_yaml.parent / "runs" / "tiny" / "tokenizer"
    killed = subprocess.run(
        [sys.executable, "-c", DIES_AT_STEP_47, *arguments],
        env=environment,
        check=False,
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL
    assert newest_checkpoint(runs / "checkpoints") is not None and "held_out" not in json.loads(
        (runs / "settings.json").read_text()
    )
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert "resuming from" in done.stdout
    whole = [*command, "--output_dir", str(tiny_yaml.parent / "whole")]
    subprocess.run(whole, env=environment, check=True, capture_output=True)
    one, two = (
        TokenizerModule.from_pretrained(tiny_yaml.parent / where / "tiny" / "tokenizer")
        for where in ("runs", "whole")
    )
    assert one.fingerprint == two.fingerprint


def test_psnr_and_ssim_match_hand_computation():
    a = np.zeros((1, 16, 16, 3), dtype=np.uint8)
    b = a + 10
    assert psnr(a, a) == float("inf") and psnr(a, b) == pytest.approx(20 * np.log10(25.5))
    assert ssim(a, a) == pytest.approx(1)
    c1 = (0.01 * 255) ** 2
    assert ssim(a, b) == pytest.approx(c1 / (100 + c1))
    noise = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    assert ssim(noise, noise[::-1].copy()) < 0.2
