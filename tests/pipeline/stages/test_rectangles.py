"""Runs on images that are no squares, from the first command to the last, and frozen tokenizers at
another size than they were trained at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from pipeline import TextToImagePipeline
from pipeline.cli.main import main
from pipeline.config.load import load_experiment
from pipeline.data.codes.dataset import read_manifest
from pipeline.doctor.diagnose import diagnose
from pipeline.doctor.suggest_config import as_yaml
from pipeline.stages.estimate import estimate
from pipeline.stages.finetune import parent_bundle
from stage1_tokenizer import TokenizerModule
from tests.helpers.cli import fails
from tests.helpers.experiments import TINY
from tests.helpers.pipelines import tiny_pipeline
from tests.helpers.tokenizers import LATENT_KINDS, tiny_tokenizer

pytestmark = pytest.mark.slow

WIDE = [32, 48]


def write_images(folder: Path) -> Path:
    """30 images of 52x36 (width x height): a colour at the left and another at the right."""
    folder.mkdir()
    for number in range(30):
        image = Image.new("RGB", (52, 36), (8 * number, 40, 200))
        image.paste((250, 250 - 8 * number, 10), (26, 0, 52, 36))
        image.save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"number {number}")
    return folder


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.copy()


def write_yaml(folder: Path, images: Path, **sections: Any) -> list[str]:
    """Arguments of a run on the images at 32x48."""
    values = TINY | {
        "name": "wide",
        "output_dir": str(folder / "runs"),
        "data": {"source": str(images), "image_size": WIDE, "val_fraction": 0.3},
        "prior": {**TINY["prior"], "train": TINY["prior"]["train"] | {"code_order": "random"}},
    }
    (folder / "wide.yaml").write_text(yaml.safe_dump(values | sections))
    return ["--config", str(folder / "wide.yaml")]


def frozen(bundle: Path) -> dict[str, Any]:
    return {"train": TINY["tokenizer"]["train"], "init_from": str(bundle), "frozen": True}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def wide(tmp_path_factory, images) -> tuple[list[str], Path]:
    """A finished run on rectangles: (arguments, folder). Tests must not change it."""
    folder = tmp_path_factory.mktemp("wide")
    arguments = write_yaml(folder, images)
    assert main(["run", *arguments]) == 0
    return arguments, folder / "runs" / "wide"


@pytest.fixture(scope="module")
def square(tmp_path_factory) -> Path:
    """A bundle of images of 32x32, with random weights. Tests must not change it."""
    bundle = tmp_path_factory.mktemp("square") / "bundle"
    tiny_pipeline(image_size=32).save_pretrained(bundle)
    return bundle


def test_a_run_on_rectangles_draws_edits_and_judges_them(wide, tmp_path, capsys):
    arguments, run = wide
    bundle = ["--bundle", str(run / "bundle")]
    assert read_manifest(run / "codes")["levels"][0]["grid"] == [4, 6]
    out = ["--out", f"{tmp_path}/g"]
    assert main(["generate", *bundle, "number 3", "--num-images", "2", *out]) == 0
    drawn = sorted((tmp_path / "g").glob("0*.png"))
    assert [opened(path).size for path in drawn] == [(48, 32)] * 2
    mask = Image.new("L", (48, 32))
    mask.paste(255, (24, 0, 48, 16))
    mask.save(tmp_path / "mask.png")
    edit = ["edit", *bundle, "--image", str(drawn[0]), "--prompt", "number 3"]
    assert main([*edit, "--mask", f"{tmp_path}/mask.png", "--out", f"{tmp_path}/e"]) == 0
    before = opened(drawn[0])
    after = opened(next((tmp_path / "e").glob("0*.png")))
    for kept in ((0, 0, 24, 32), (0, 16, 48, 32)):
        assert before.crop(kept).tobytes() == after.crop(kept).tobytes()
    before.crop((0, 0, 20, 30)).save(tmp_path / "small.png")
    grown = [*edit[:4], f"{tmp_path}/small.png", *edit[5:], "--outpaint-at", "28", "2"]
    assert main([*grown, "--out", f"{tmp_path}/o"]) == 0
    larger = opened(next((tmp_path / "o").glob("0*.png")))
    assert larger.crop((28, 2, 48, 32)).tobytes() == before.crop((0, 0, 20, 30)).tobytes()
    judged = ["--max-images", "4", "--out", f"{tmp_path}/judged.json"]
    assert main(["evaluate", *arguments, *bundle, *judged]) == 0
    assert json.loads((tmp_path / "judged.json").read_text())
    assert main(["likelihood", *bundle, str(drawn[0]), "--out", f"{tmp_path}/l"]) == 0
    fails(
        capsys,
        ["evaluate", *arguments, *bundle, "--data.image_size", "[48, 32]"],
        "makes images of [32, 48] pixels and data.image_size is [48, 32]",
    )
    Image.new("RGB", (32, 48)).save(tmp_path / "turned.png")
    fails(
        capsys,
        ["likelihood", *bundle, tmp_path / "turned.png"],
        "turned.png is 32x48 and this prior draws 48x32",
    )


def test_a_run_on_rectangles_is_not_done_again(wide):
    arguments, run = wide
    weights = [run / stage / "model.safetensors" for stage in ("tokenizer", "prior")]
    before = [path.stat().st_mtime_ns for path in weights]
    assert main(["run", *arguments]) == 0
    assert before == [path.stat().st_mtime_ns for path in weights]


def test_a_frozen_square_tokenizer_makes_codes_of_rectangles(square, images, tmp_path):
    """Made for 32x32, used at 32x48: the same weights and codes, and a prior of the new grid."""
    arguments = write_yaml(tmp_path, images, tokenizer=frozen(square), name="frozen")
    experiment = load_experiment(arguments)
    assert experiment.tokenizer.model.image_size == (32, 48)
    assert main(["run", *arguments]) == 0
    assert main(["train-tokenizer", *arguments]) == 0  # the copy is found again
    pipe = TextToImagePipeline.from_pretrained(tmp_path / "runs" / "frozen" / "bundle")
    assert pipe.tokenizer.size == (32, 48) and pipe.prior.stream.image_length == 8 * 12
    weights = TokenizerModule.from_pretrained(square / "tokenizer").state_dict()
    assert all(torch.equal(weights[k], v) for k, v in pipe.tokenizer.state_dict().items())
    # The bundle of squares is no base to measure forgetting by.
    assert parent_bundle(experiment) is None
    assert parent_bundle(load_experiment([*arguments, "--data.image_size", "32"])) == square


def test_a_tokenizer_is_trained_further_on_rectangles(square, images, tmp_path):
    section = frozen(square) | {"frozen": False}
    arguments = write_yaml(tmp_path, images, tokenizer=section, name="further")
    assert main(["train-tokenizer", *arguments, "--tokenizer.train.steps", "2"]) == 0
    assert TokenizerModule.from_pretrained(tmp_path / "runs/further/tokenizer").size == (32, 48)


def test_what_fits_one_size_is_refused_at_another(square, images, tmp_path, capsys):
    prior = {"train": TINY["prior"]["train"], "init_from": str(square)}
    arguments = write_yaml(tmp_path, images, tokenizer=frozen(square), prior=prior)
    fails(
        capsys,
        ["train-tokenizer", *arguments],
        "knows grids of 8x8 codes, and data.image_size [32, 48] makes 8x12; set data.image_size=32",
    )
    vector = tiny_tokenizer(**LATENT_KINDS["gaussian vector"], image_size=32)
    vector.save_pretrained(tmp_path / "vector")
    arguments = write_yaml(tmp_path, images, tokenizer=frozen(tmp_path / "vector"))
    fails(
        capsys,
        ["train-tokenizer", *arguments],
        "one latent vector is for images of 32x32 (width x height), and 48x32 are asked for",
    )
    arguments = write_yaml(tmp_path, images, tokenizer=frozen(square))
    fails(
        capsys,
        ["run", *arguments, "--data.image_size", "[34, 48]"],
        "image_size [34, 48] is not a multiple of 4",
        "nearest size that fits is [32, 48]",
        status=2,
    )


def test_memory_is_estimated_and_a_configuration_suggested_for_rectangles(wide, tmp_path):
    experiment = load_experiment(wide[0])
    assert set(estimate(experiment)) == {"tokenizer", "prior"}
    suggestion = diagnose(experiment.data).suggestion
    (tmp_path / "s.yaml").write_text(as_yaml(suggestion, "minidalle run"))
    suggested = load_experiment(["--config", str(tmp_path / "s.yaml")])
    assert suggested.data.image_size == (32, 48) and not suggested.data.upscale
    assert suggested.tokenizer.model.grid == (8, 12)
