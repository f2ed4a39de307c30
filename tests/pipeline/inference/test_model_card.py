"""README.md of a bundle says what it is, what it learned from, and how it was measured."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image

import pipeline
from pipeline.inference.bundle import add_metrics
from pipeline.inference.known_prompts import KnownPrompts
from pipeline.inference.model_card import FILE
from pipeline.inference.pipeline import TextToImagePipeline
from tests.helpers.icons import write_names, write_styles
from tests.helpers.pipelines import tiny_icons_pipeline, tiny_pipeline

KNOWN = KnownPrompts(("blob", "noto"), ("red heart", "red star"))
EVALUATION = {
    "psnr": 21.25,
    "retrieval": 0.5,
    "intervals": {"retrieval": [0.4, 0.6, 100]},
    "settings": {"images": 100},
}


def evaluation_of(pipe, **changed):
    measured = {"tokenizer": pipe.tokenizer.fingerprint, "prior": pipe.prior.fingerprint}
    settings = EVALUATION["settings"] | {"fingerprints": measured | changed}
    return json.dumps(EVALUATION | {"settings": settings})


def test_a_card_tells_parts_use_and_fingerprints(tmp_path):
    pipe = tiny_icons_pipeline(KNOWN)
    pipe.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "transparent (RGBA) images of 16x16 pixels" in card
    assert '"red heart, noto style"' in card and "blob, noto, the names 2" in card
    assert f"`{pipe.prior.fingerprint}`" in card and f"`{pipe.tokenizer.fingerprint}`" in card
    count = sum(parameter.numel() for parameter in pipe.prior.parameters())
    assert f"{count:,} parameters" in card
    assert "Not evaluated yet" in card and "{{" not in card


def test_the_example_is_safe_to_paste_and_styles_cannot_break_the_page(tmp_path):
    name = "father's $(id) day"
    pipe = tiny_icons_pipeline(KnownPrompts(("<img src=x>",), (name,)))
    pipe.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    (line,) = re.findall("(?m)^minidalle generate .*$", card)
    assert shlex.split(line)[4] == f"{name}, <img src=x> style" and "'\"'\"'" in line
    assert f'pipe("{name}, <img src=x> style", num' in card
    assert "The styles are &lt;img src=x>, the names 1." in card


def test_licences_are_listed_and_cannot_break_the_page(tmp_path):
    sets = [
        {"style": "noto", "licence": "Apache-2.0", "author": "A <b>|Painter\n# x"},
        {
            "style": "blob",
            "licence": "MIT",
            "licence_url": "https://licences/mit",
            "author": "B",
            "author_url": "https://b/|",
        },
        {"style": "mine", "licence": None, "author": None},
    ]
    tiny_pipeline(trained_on={"licences": sets}).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "| noto | Apache-2.0 | A &lt;b>&#124;Painter\\n# x |" in card
    assert "| blob | MIT, https://licences/mit | B, https://b/&#124; |" in card
    assert "| mine | not stated | not stated |" in card


def test_a_card_names_no_folders_of_the_machine_that_trained(tmp_path):
    drawings = "/home/someone/mine/style-drawings"
    trained_on = {
        "configuration": {
            "data": {"source": drawings, "icons": {"sets": ["noto", "/home/someone/set.json"]}},
            "output_dir": "runs",
        },
        "data": {"source": drawings},
        "started_from": {"prior": "/home/someone/bundle"},
    }
    tiny_pipeline(trained_on=trained_on).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "someone" not in card
    assert "The source is `style-drawings`" in card and "prior from `bundle`" in card
    assert "source: style-drawings" in card and "- set.json" in card and "output_dir: runs" in card


@pytest.mark.parametrize(("repeats", "said"), [(1, "train on."), (3, "train on, repeats among")])
def test_a_card_says_that_repeats_are_counted(tmp_path, repeats, said):
    data = {"source": "icons", "icons": {"untoned_repeats": repeats}}
    trained_on = {"data": data, "num_images": {"train": 23825}}
    tiny_pipeline(trained_on=trained_on).save_pretrained(tmp_path)
    assert f"with 23,825 images to {said}" in (tmp_path / "README.md").read_text()


def test_a_card_names_the_fingerprints_of_what_it_started_from(tmp_path):
    parents = {"tokenizer": "aa11", "prior": {"prior": "bb22", "text_tokenizer": "cc33"}}
    tiny_pipeline(trained_on={"started_from": parents}).save_pretrained(tmp_path)
    said = "tokenizer from `aa11`, prior from `bb22`, text_tokenizer from `cc33`."
    assert said in (tmp_path / "README.md").read_text()


def test_metrics_are_added_and_the_rest_of_the_card_stays(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "bundle")
    card = tmp_path / "bundle" / "README.md"
    card.write_text(card.read_text() + "\n## Failures\n\nHands.\n")
    (tmp_path / "evaluation.json").write_text(evaluation_of(pipe))
    for _ in range(2):
        add_metrics(tmp_path / "bundle", tmp_path / "evaluation.json")
    text = card.read_text()
    assert text.count("| psnr | 21.25 |  |  |") == 1 and "Hands." in text
    assert "| retrieval | 0.5 | 0.4 to 0.6 | 100 |" in text and "Not evaluated" not in text


def test_metrics_of_other_weights_are_not_added(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "bundle")
    (tmp_path / "evaluation.json").write_text(evaluation_of(pipe, prior="0" * 16))
    add_metrics(tmp_path / "bundle", tmp_path / "evaluation.json")
    assert "Not evaluated yet" in (tmp_path / "bundle" / "README.md").read_text()


@pytest.fixture
def icons_run(finished_run, tmp_path):
    """A finished run whose configuration names icons."""
    pytest.importorskip("resvg_py")
    path, folder = finished_run
    shutil.copytree(folder, tmp_path / "runs" / "tiny")
    sets = write_styles(tmp_path / "sets")
    names = {"\U0001f9ff": "nazar amulet"}
    options = {
        "output_dir": str(tmp_path / "runs"),
        "data.source": "icons",
        "data.icons.folder": str(tmp_path / "sets"),
        "data.icons.sets": json.dumps(sets),
        "data.icons.annotations": str(write_names(tmp_path / "names", names)),
    }
    settings = [part for name, value in options.items() for part in (f"--{name}", value)]
    return pipeline.load_experiment(["--config", str(path), *settings])


def test_a_bundle_of_icons_has_styles_names_licences_and_configuration(icons_run):
    bundle = pipeline.assemble_bundle(icons_run)
    known = json.loads((bundle / "prompts.json").read_text())
    assert known["styles"] == ["style0", "style1"] and len(known["names"]) == 40
    card = (bundle / "README.md").read_text()
    assert "| style1 | MIT | A. Painter |" in card and "source: icons" in card
    assert str(icons_run.folder.parent) not in card.replace(icons_run.data.icons.folder, "")


def test_evaluating_a_run_writes_the_metrics_into_its_card(finished_run, tmp_path):
    path, folder = finished_run
    shutil.copytree(folder, tmp_path / "runs" / "tiny")
    settings = ["--config", str(path), "--output_dir", str(tmp_path / "runs")]
    experiment = pipeline.load_experiment(settings)
    bundle = experiment.folder / "bundle"
    pipeline.evaluate(bundle, experiment, experiment.folder / "evaluation.json", images=4)
    assert "on 4 held-out images" in (bundle / "README.md").read_text()
    pipeline.assemble_bundle(experiment)  # as `run` again does
    assert "on 4 held-out images" in (bundle / "README.md").read_text()


def test_a_card_is_kept_with_its_images_while_the_weights_are_the_same(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "first")
    with (tmp_path / "first" / FILE).open("a") as file:
        file.write("\n![Samples](samples.png)\n")
    Image.new("RGB", (4, 4)).save(tmp_path / "first" / "samples.png")
    pipe = TextToImagePipeline.from_pretrained(tmp_path / "first")
    pipe.save_pretrained(tmp_path / "same")
    for name in (FILE, "samples.png"):
        first = (tmp_path / "first" / name).read_bytes()
        assert (tmp_path / "same" / name).read_bytes() == first
    plain = pipe.defaults
    pipe.defaults = replace(plain, temperature=0.5)
    pipe.save_pretrained(tmp_path / "cooler")
    pipe.defaults = plain
    with torch.no_grad():
        pipe.prior.text_embedding.weight.add_(1)
    pipe.save_pretrained(tmp_path / "other")
    for name in ("cooler", "other"):
        assert "samples.png" not in (tmp_path / name / FILE).read_text()
        assert not (tmp_path / name / "samples.png").exists()
