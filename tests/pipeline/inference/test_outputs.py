"""Where images are written: never over what is read, and refused before anything is computed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from PIL import Image

from pipeline.cli.main import main
from pipeline.inference.generate import edit, generate, reconstruct
from pipeline.inference.likelihood_report import likelihood_report
from tests.helpers.cli import fails
from tests.helpers.pipelines import tiny_latent_pipeline, tiny_pipeline

PROMPT = "a red heart"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outputs") / "bundle"
    pipe = tiny_pipeline(any_order=True)
    pipe.prior.config.trained_order = "random"
    pipe.save_pretrained(folder)
    return folder


def content(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_an_edit_does_not_overwrite_the_image_or_the_mask(bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", PROMPT, "--bundle", str(bundle), "--num-images", "2"]) == 0
    before = content(Path("images"))
    image = Path("images/00000-a-red-heart.png")
    for mask, strength in ((None, 0.5), (Path("images/00001-a-red-heart.png"), None)):
        with pytest.raises(ValueError, match=r"is read, and would be overwritten; choose another"):
            edit(
                bundle,
                image if mask is None else Path("images/grid.png"),
                PROMPT,
                Path("images"),
                mask=mask,
                strength=strength,
                num_images=2,
            )
    assert content(Path("images")) == before
    edited = ["edit", "--bundle", str(bundle), "--image", str(image), "--strength", "0.5"]
    assert main([*edited, "--prompt", PROMPT]) == 0
    assert content(Path("images")) == before and Path("edited/00003-a-red-heart.png").is_file()


def test_a_reconstruction_does_not_overwrite_what_it_is_of(bundle, tmp_path):
    for name in ("grid.png", "00000-cat.png"):
        Image.new("RGB", (16, 16), "red").save(tmp_path / name)
    with pytest.raises(ValueError, match=r"grid\.png is read, and would be overwritten"):
        reconstruct(bundle / "tokenizer", [tmp_path / "grid.png"], tmp_path)
    assert Image.open(tmp_path / "grid.png").getpixel((0, 0)) == (255, 0, 0)
    reconstruct(bundle / "tokenizer", [tmp_path / "00000-cat.png"], tmp_path)
    assert (tmp_path / "00000-00000-cat.png").is_file()


def test_a_file_in_place_of_the_folder_is_refused_before_a_bundle_is_read(tmp_path, capsys):
    out = tmp_path / "out.txt"
    out.write_text("kept")
    for command in (
        ["generate", PROMPT, "--bundle", tmp_path / "missing"],
        ["edit", "--bundle", tmp_path / "missing", "--image", out, "--strength", "0.5"],
        ["reconstruct", out, "--tokenizer", tmp_path / "missing"],
    ):
        fails(capsys, [*command, "--out", out], f"{out} is a file; name a folder for the images")
    assert out.read_text() == "kept"


def test_long_names_of_files_are_cut_in_those_that_are_written(bundle, tmp_path):
    file = tmp_path / f"{'猫' * 80}.png"
    Image.new("RGB", (16, 16), "red").save(file)
    reconstruct(bundle / "tokenizer", [file], tmp_path / "a")
    likelihood_report(bundle, [file], [PROMPT], out=tmp_path / "b")
    for folder in ("a", "b"):
        assert (tmp_path / folder / f"00000-{'猫' * 60}.png").is_file()


def test_a_prompt_that_is_ignored_may_be_long(tmp_path, caplog):
    for context, is_refused in ((0, False), (8, True)):
        folder = tmp_path / str(context)
        tiny_latent_pipeline(context_features=context).save_pretrained(folder)
        if is_refused:
            with pytest.raises(ValueError, match="shorten it, or set truncate"):
                generate(folder, ["a red heart " * 20], tmp_path / "out", num_images=1)
        else:
            assert generate(folder, ["a red heart " * 20], tmp_path / "out", num_images=1) == 1


def test_a_bundle_of_latents_says_that_it_compiles_nothing():
    with pytest.raises(ValueError, match="has Gaussian latents, and compile needs codes"):
        tiny_latent_pipeline().compile()
