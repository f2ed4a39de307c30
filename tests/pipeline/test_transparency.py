"""A run on images with transparency: RGBA from the files to the PNGs, in every way of using a
bundle."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageDraw

import pipeline
from pipeline.cli.main import main
from pipeline.config.load import load_experiment
from pipeline.evaluation.metrics import mean_psnr, sampled, tokenizer_metrics
from pipeline.inference.pipeline import TextToImagePipeline
from pipeline.likelihood.compression import compress, decompress
from stage1_tokenizer import from_pil, pixels
from stage1_tokenizer.pixels import image_array
from stage1_tokenizer.transparency import on_background
from tests.helpers.cli import fails
from tests.helpers.experiments import TINY
from tests.helpers.pipelines import tiny_pipeline

COLOURS = {"red": (230, 30, 30, 255), "green": (20, 180, 40, 255), "blue": (30, 60, 220, 128)}


def draw_discs(folder: Path, count: int) -> Path:
    """Discs on clear ground; blue ones are half transparent."""
    folder.mkdir()
    for number in range(count):
        colour = list(COLOURS)[number % 3]
        image = Image.new("RGBA", (40, 40))
        left = 2 + number * 5 % 15
        ImageDraw.Draw(image).ellipse((left, 4, left + 20, 24), fill=COLOURS[colour])
        image.save(folder / f"{number:03}.png")
        (folder / f"{number:03}.txt").write_text(f"a {colour} disc")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, Path]:
    """The settings and the folder of a finished run. Tests must not change it."""
    folder = tmp_path_factory.mktemp("transparent")
    values = json.loads(json.dumps(TINY))
    data = {"source": str(draw_discs(folder / "images", 30)), "image_size": 32, "val_fraction": 0.2}
    values["data"] = data | {"alpha": "keep"}
    values["tokenizer"]["model"] |= {"channels": 4, "likelihood": "discretized_logistic"}
    values["prior"]["train"]["code_order"] = "random"
    values["prior"]["objective"] = {"caption_dropout": 0.1}
    values["output_dir"] = str(folder / "runs")
    path = folder / "discs.yaml"
    path.write_text(yaml.safe_dump(values))
    assert main(["run", "--config", str(path)]) == 0
    return path, folder / "runs" / "tiny"


@pytest.fixture(scope="module")
def pipe(run) -> TextToImagePipeline:
    return TextToImagePipeline.from_pretrained(run[1] / "bundle")


def half_clear(mode: str = "RGBA") -> Image.Image:
    """Straight values that do not all survive premultiplying."""
    values = np.random.default_rng(3).integers(0, 256, (32, 32, 4), dtype=np.uint8)
    values[:8] = 0
    return Image.fromarray(values).convert(mode)


def test_generated_files_have_alpha_and_sheets_have_none(run, tmp_path):
    assert pipeline.generate(run[1] / "bundle", ["a red disc"], tmp_path, num_images=3) == 3
    for file in sorted(tmp_path.glob("0*.png")):
        with Image.open(file) as image:
            assert image.mode == "RGBA" and image.size == (32, 32)
            assert image.getchannel("A").getextrema()[0] < 255
    for sheet in (tmp_path / "grid.png", run[1] / "samples" / "reconstructions.png"):
        with Image.open(sheet) as image:
            assert image.mode == "RGB"
            colours = {colour for _, colour in image.getcolors(2**20) or []}
            assert {(216, 216, 216), (255, 255, 255)} <= colours or "grid" in sheet.name


def test_saved_images_are_those_of_the_codes(pipe, tmp_path):
    output = pipe("a red disc", num_images_per_prompt=2, seed=1)
    for number, (image, codes) in enumerate(zip(output.images, output.codes, strict=True)):
        image.save(tmp_path / f"{number}.png")
        with Image.open(tmp_path / f"{number}.png") as saved:
            expected = pipe.tokenizer.to_images(codes[None])[0]
            assert saved.mode == "RGBA" and saved.tobytes() == expected.tobytes()


def test_an_edit_keeps_straight_pixels_outside_the_mask(pipe):
    original = half_clear()
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (8, 8, 24, 24))
    for image in pipe.edit(original, mask, "a red disc", num_images=2).images:
        assert image.mode == "RGBA"
        outside = np.asarray(mask) == 0
        assert np.array_equal(np.asarray(image)[outside], np.asarray(original)[outside])


def test_a_smaller_image_is_extended_with_its_own_pixels_kept(pipe):
    small = half_clear().crop((0, 4, 16, 20))
    for image in pipe.outpaint(small, "a red disc", at=(8, 8)).images:
        assert image.mode == "RGBA"
        assert image.crop((8, 8, 24, 24)).tobytes() == small.tobytes()
    assert pipe.vary(half_clear(), 0.5, "a red disc").images[0].mode == "RGBA"


def test_images_with_and_without_alpha_are_scored_and_captioned(pipe):
    clear = Image.new("RGBA", (32, 32))
    scores = pipe.score([clear, half_clear(), half_clear("RGB")], ["a red disc"] * 3)
    assert torch.isfinite(scores.log_likelihood).all()


def test_a_likelihood_is_that_of_premultiplied_pixels(pipe):
    """Colours under clear pixels change nothing."""
    hidden = Image.new("RGBA", (32, 32), (200, 100, 50, 0))
    images = [hidden, Image.new("RGBA", (32, 32)), half_clear(), half_clear("RGB")]
    found = pipe.likelihood(images, ["a red disc"] * 4)
    assert torch.isfinite(found.nats).all()
    assert found.nats[0] == found.nats[1] != found.nats[2]
    assert found.dimensions == 32 * 32 * 4
    bits = found.nats[2] / (4096 * math.log(2))
    assert float(found.bits_per_dimension[2]) == pytest.approx(float(bits))
    assert pipe.surprise(images[2], "a red disc")[0].pixels.shape == (32, 32)
    with pytest.raises(ValueError, match="mode CMYK, and a likelihood is that of 8-bit RGBA"):
        pipe.likelihood(Image.new("CMYK", (32, 32)), "a red disc")


def test_compressed_images_come_back_premultiplied_and_the_pipelines_own_exactly(pipe, caplog):
    pytest.importorskip("constriction")
    parts = pipe.tokenizer, pipe.prior, pipe.text
    own = pipe("a red disc").images[0]
    with caplog.at_level(logging.WARNING):
        packed = compress(*parts, own, "a red disc")
        assert not caplog.messages
        assert decompress(*parts, packed.data).image.tobytes() == own.tobytes()
        other = compress(*parts, half_clear(), "a red disc")
        assert [message for message in caplog.messages if "premultiplied" in message]
    back = decompress(*parts, other.data).image
    assert back.mode == "RGBA" and back.tobytes() == other.image.tobytes()
    assert np.array_equal(image_array(back), image_array(half_clear()))
    assert other.bits_per_dimension == 8 * len(other.data) / (32 * 32 * 4)


def test_reconstructions_and_codes_of_files_keep_alpha(run, tmp_path):
    files = sorted((run[1].parents[1] / "images").glob("*.png"))[:3]
    lines = pipeline.reconstruct(run[1] / "tokenizer", files, tmp_path / "out", size=(32, 32))
    assert all("dB" in line for line in lines[:3])
    for file in sorted((tmp_path / "out").glob("0*.png")):
        with Image.open(file) as image:
            assert image.mode == "RGBA"
    codes = tmp_path / "codes"
    named = [str(file) for file in files]
    tokenizer = ["--tokenizer", str(run[1] / "tokenizer"), "--out", str(codes)]
    assert main(["encode", *named, *tokenizer]) == 0


def test_metrics_compare_all_four_channels_and_samples_lie_on_white(run, pipe):
    experiment = load_experiment(["--config", str(run[0])])
    source = pipeline.load_source(experiment.data, "held_out")
    found = tokenizer_metrics(pipe, source, 4)
    assert found.real.shape == found.drawn.shape == (4, 32, 32, 4)
    assert found.metrics["psnr"] == mean_psnr(source.images(range(4)), found.drawn)
    shown = sampled(pipe, ["a red disc"])
    image = pipe("a red disc").images[0]
    assert np.array_equal(shown[0], on_background(image_array(image)))


def test_a_bundle_of_four_channels_is_evaluated_and_its_codes_are_shown(run, tmp_path):
    experiment = load_experiment(["--config", str(run[0])])
    report = pipeline.evaluate(run[1] / "bundle", experiment, tmp_path / "r.json", images=4)
    assert report.metrics["psnr"] > 0
    source = pipeline.load_source(experiment.data, "held_out")
    pipeline.codebook_page(run[1] / "tokenizer", source.images(range(4)), tmp_path / "page")
    with Image.open(tmp_path / "page" / "alone.png") as image:
        assert image.mode == "RGB"


def test_what_starts_from_four_channels_keeps_transparency(run, capsys):
    """Unless another setting contradicts it, which is one error that names both."""
    start = ["--config", str(run[0]), "--tokenizer.init_from", str(run[1] / "bundle")]
    values = yaml.safe_load(run[0].read_text())
    del values["data"]["alpha"]
    values["tokenizer"].pop("model")
    path = run[0].with_name("started.yaml")
    path.write_text(yaml.safe_dump(values))
    start[1] = str(path)
    experiment = load_experiment([*start, "--tokenizer.frozen", "true"])
    assert experiment.data.alpha == "keep" and experiment.tokenizer.model.channels == 4
    both = "data.alpha is white", "tokenizer.model.channels is 4"
    fails(capsys, ["train-tokenizer", *start, "--data.alpha", "white"], *both, status=2)


def test_transparency_in_an_rgb_pipeline_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(pixels, "_laid_on_white", [])
    three = tiny_pipeline()
    clear = Image.new("RGBA", (16, 16), (9, 9, 9, 0))
    with caplog.at_level(logging.WARNING):
        scores = three.score([clear, clear], ["a red heart"] * 2)
    assert len(caplog.messages) == 1 and "laid on white" in caplog.text
    white = three.score([Image.new("RGB", (16, 16), "white")], ["a red heart"])
    assert scores.log_likelihood[0] == white.log_likelihood[0]
    assert three("a red heart").images[0].mode == "RGB"


def test_any_tool_reads_a_file_as_the_array_it_was(pipe):
    images = pipe("a red disc", num_images_per_prompt=2).images
    again = from_pil(images, channels=4)
    assert np.array_equal(again.numpy(), np.stack([image_array(image) for image in images]))
