"""Bundles that come with the package are found by name, and lie in the wheel."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import pipeline.config.shipped_bundles as shipped
from pipeline.cli.main import main
from pipeline.config.experiment import to_dict
from pipeline.config.inheritance import saved_prior_config, stage_folder
from pipeline.config.load import load_experiment, load_values
from pipeline.config.shipped_bundles import bundle_folder
from pipeline.inference.bundle import read_description
from pipeline.inference.pipeline import TextToImagePipeline
from pipeline.stages.finetune import check_init_from, parent_bundle, tokenizer_identity
from tests.helpers.cli import fails
from tests.helpers.pipelines import tiny_icons_pipeline, tiny_pipeline

ROOT = Path(__file__).parents[3]


@pytest.fixture
def package_data(tmp_path, monkeypatch):
    """The folder of shipped bundles with a small one of icons; the working directory is empty."""
    folder = tmp_path / "package" / "bundles"
    tiny_icons_pipeline().save_pretrained(folder / "icons")
    monkeypatch.setattr(shipped, "FOLDER", folder)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder


def test_a_shipped_bundle_is_loaded_by_its_name(package_data):
    pipe = TextToImagePipeline.from_pretrained("icons")
    assert pipe.tokenizer.own_config.channels == 4
    assert pipe("a red heart").images[0].mode == "RGBA"


def test_generate_uses_icons_where_no_bundle_is_given(package_data, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # which --offline would set for later tests, too
    assert main(["generate", "a red heart", "--num-images", "1"]) == 0
    assert main(["generate", "a red heart", "--num-images", "1", "--bundle", "icons"]) == 0
    capsys.readouterr()
    assert main(["generate", "--help"]) == 0
    assert "icons, which comes with the package" in " ".join(capsys.readouterr().out.split())


def test_other_commands_take_the_name(package_data, capsys):
    assert main(["generate", "a red heart", "--num-images", "1"]) == 0
    image = next(Path("images").glob("00000*.png"))
    packed = ["--bundle", "icons", "--prompt", "a red heart"]
    assert main(["likelihood", str(image), *packed]) == 0
    assert main(["compress", str(image), *packed, "--out", "image.mdc"]) == 0
    again = ["decompress", "image.mdc", "--bundle", "icons", "--out", "again.png"]
    assert main(again) == 0
    assert Path("again.png").is_file()


def test_a_training_starts_from_it_by_its_name(package_data):
    start = {"init_from": "icons", "frozen": True}
    values = {"name": "more", "tokenizer": start, "prior": {"init_from": "icons"}}
    experiment = load_values({"data": {"source": "icons"}} | values, [])
    pipe = TextToImagePipeline.from_pretrained("icons")
    assert experiment.tokenizer.model == pipe.tokenizer.own_config
    assert experiment.prior.model == saved_prior_config(package_data / "icons/prior")[0]
    check_init_from(experiment.tokenizer, experiment.prior, experiment.text.max_length)
    assert tokenizer_identity(experiment.tokenizer) == pipe.tokenizer.fingerprint
    assert stage_folder("icons", "prior") == package_data / "icons/prior"
    assert parent_bundle(experiment) == package_data / "icons"


def test_a_bundle_of_that_name_here_comes_first_and_is_reported(package_data, caplog):
    caplog.set_level("INFO", "pipeline")
    tiny_pipeline().save_pretrained("icons")
    assert TextToImagePipeline.from_pretrained("icons").tokenizer.own_config.channels == 3
    assert "using the folder icons, not the bundle of that name in the package" in caplog.text


def test_a_run_of_that_name_here_is_started_from_and_not_the_package(package_data):
    tiny_pipeline().save_pretrained("icons/bundle")
    shutil.copytree("icons/bundle/prior", "icons/prior")
    assert stage_folder("icons", "prior") == Path("icons/prior")
    assert stage_folder("icons", "tokenizer") == package_data / "icons/tokenizer"


def test_a_parent_that_the_installation_lacks_is_none(package_data):
    values = {"name": "more", "data": {"source": "icons"}, "prior": {"init_from": "icons"}}
    experiment = load_values(values | {"tokenizer": {"init_from": "icons", "frozen": True}}, [])
    shutil.rmtree(package_data)
    assert parent_bundle(experiment) is None


def test_without_a_bundle_option_the_folder_here_does_not_count(package_data, capsys):
    tiny_pipeline().save_pretrained("icons")
    assert main(["generate", "a red heart", "--num-images", "1"]) == 0
    assert "using the folder" not in capsys.readouterr().err


def test_a_folder_of_that_name_that_is_no_bundle_does_not_count(package_data):
    Path("icons").mkdir()
    Path("icons/heart.svg").write_text("<svg/>")
    assert bundle_folder("icons") == package_data / "icons"


def test_an_installation_without_the_bundle_is_one_clear_error(package_data, capsys):
    shutil.rmtree(package_data)
    for arguments in ([], ["--bundle", "icons"]):
        fails(
            capsys,
            ["generate", "a red heart", *arguments],
            "this installation lacks the bundle 'icons'",
            "install mini-dalle again",
        )


def test_other_names_stay_paths(package_data):
    assert bundle_folder("runs/icons/bundle") == Path("runs/icons/bundle")
    with pytest.raises(FileNotFoundError, match=r"holds no pipeline\.json, so it is no bundle"):
        TextToImagePipeline.from_pretrained("emoji")


@pytest.mark.slow
def test_the_wheel_has_the_shipped_bundles(tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    for package in ("pipeline", "stage1_tokenizer", "stage2_prior"):
        shutil.copytree(ROOT / package, project / package)
    shutil.rmtree(project / "pipeline/bundles", ignore_errors=True)
    tiny_icons_pipeline().save_pretrained(project / "pipeline/bundles/icons")
    build = "import setuptools.build_meta as b; b.build_wheel('.')"
    subprocess.run([sys.executable, "-c", build], cwd=project, check=True, capture_output=True)
    (wheel,) = project.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if "/bundles/" in name}
    there = (project / "pipeline/bundles").rglob("*")
    assert packed == {str(path.relative_to(project)) for path in there if path.is_file()}
    assert "pipeline/bundles/icons/prior/model.safetensors" in packed


@pytest.mark.slow
@pytest.mark.parametrize(("colour", "channel"), [("red", 0), ("green", 1), ("blue", 2)])
def test_the_bundle_in_the_package_draws_what_prompts_say(colour, channel):
    pipe = TextToImagePipeline.from_pretrained("icons")
    (heart,) = pipe(f"a {colour} heart, twemoji style").images
    image = np.asarray(heart, dtype=float)
    assert image.shape == (64, 64, 4) and image[0, 0, 3] < 64 < 192 < image[28, 32, 3]
    solid = image[image[..., 3] > 128][:, :3].mean(0)
    assert solid.argmax() == channel


def test_the_bundle_in_the_package_is_that_of_the_shipped_configuration():
    folder = ROOT / "pipeline/bundles/icons"
    recorded = read_description(folder)["trained_on"]["configuration"]
    shipped_yaml = to_dict(load_experiment(["--config", str(ROOT / "configs/icons.yaml")]))
    # A setting that came later has its default.
    loaded = to_dict(load_values(recorded, []))
    assert [loaded[name] for name in recorded] == [shipped_yaml[name] for name in recorded]
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 15e6


def test_the_card_of_the_bundle_in_the_package_has_samples_failures_and_metrics():
    folder = ROOT / "pipeline/bundles/icons"
    card = (folder / "README.md").read_text()
    assert "(samples.png)" in card and (folder / "samples.png").is_file()
    assert "Failures: " in card and "| style_cell |" in card


def test_the_drawings_behind_the_bundle_in_the_package_may_be_used_and_are_attributed():
    """No set asks to share alike; every author and licence is in the card."""
    folder = ROOT / "pipeline/bundles/icons"
    card = (folder / "README.md").read_text()
    terms = read_description(folder)["trained_on"]["licences"]
    assert len(terms) == 4
    for one in terms:
        assert one["licence"] in ("Apache-2.0", "MIT", "CC-BY-4.0")
        assert all(one[name] in card for name in ("author", "author_url", "licence_url"))
