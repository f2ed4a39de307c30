"""A bundle learns a new style from a few drawings: its token, what stays, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import TextToImagePipeline
from pipeline.cli.main import main
from pipeline.config.builtin import IconOptions
from pipeline.config.data import DataConfig, MixPart
from pipeline.config.experiment import Experiment
from pipeline.inference.known_prompts import KnownPrompts
from pipeline.stages.nearest_style import nearest_style
from pipeline.stages.prior import stream_config
from pipeline.stages.run import prompts_and_licences
from pipeline.stages.style import (
    DRAWINGS,
    _terms_of,
    known_styles,
    read_drawings,
    style_experiment,
    with_new_style,
)
from stage2_prior import PriorConfig, PriorModule
from tests.helpers.cli import fails
from tests.helpers.icons import body, write_set
from tests.helpers.pipelines import tiny_latent_pipeline, tiny_pipeline

CAPTIONS = ["a red heart", "a blue star, old style", "a star in old style", "two green rings"]
SHORT = [
    *("--prior.train.steps", "4", "--prior.train.eval-every", "2", "--trackers", "[]"),
    *("--prior.train.save-every", "4", "--prior.train.weight-decay", "0.5"),
]


def svg(colour: str, size: int = 8) -> str:
    square = f'<rect width="{size // 2}" height="{size // 2}" fill="{colour}"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{size}" height="{size}" '
        f'viewBox="0 0 {size} {size}">{square}</svg>'
    )


def write_svgs(folder: Path, count: int) -> Path:
    folder.mkdir()
    for i in range(count):
        (folder / f"thing-{i}.svg").write_text(svg(f"#{i * 20:02x}40c0"))
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a prior that sees the vectors of codes, as trained ones do."""
    folder = tmp_path_factory.mktemp("parent") / "bundle"
    data = {"source": "icons", "icons": {"sets": ["noto", "fluent-emoji-flat"]}}
    licences = [{"style": "noto", "licence": "Apache-2.0", "author": None}]
    trained_on = {"data": data, "licences": licences}
    plain = tiny_pipeline(captions=CAPTIONS, trained_on=trained_on, channels=4)
    text = plain.text
    stream = stream_config(plain.tokenizer, text.vocab_size, text.length, any_order=False)
    torch.manual_seed(0)
    prior = PriorModule(PriorConfig(width=32, depth=1, heads=2), stream)
    with torch.no_grad():
        for parameter in prior.parameters():  # new ones have zeros, which pass no gradient
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    prior.set_codebook(plain.tokenizer.code_vectors)
    prior.config.trained_order = "raster"
    known = KnownPrompts(("noto", "fluent"), ("red heart", "star"))
    pipe = TextToImagePipeline(
        plain.tokenizer, prior, text, trained_on=plain.trained_on, known_prompts=known
    )
    pipe.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_style_becomes_a_token_and_nothing_else_of_the_vocabulary_moves(bundle, tmp_path, capsys):
    drawings = write_svgs(tmp_path / "drawings", 8)
    command = ["finetune", "--bundle", str(bundle), "--data", str(drawings), "--style", "Ink Pen"]
    command += ["--name", "ink", "--output-dir", str(tmp_path / "runs"), *SHORT]
    assert main(command) == 0
    made = tmp_path / "runs" / "ink" / "bundle"
    said = capsys.readouterr().out.splitlines()[-1]
    assert f"--bundle {made} 'a red heart, ink-pen style'" in said
    before = TextToImagePipeline.from_pretrained(bundle)
    after = TextToImagePipeline.from_pretrained(made)
    assert (
        after.text.lengths(["a red heart, ink-pen style"])[0]
        < before.text.lengths(["a red heart, ink-pen style"])[0]
    )
    known = after.known_prompts
    assert known is not None and known.styles == ("noto", "fluent", "ink-pen")
    assert known.names == ("red heart", "star", *(f"thing {i}" for i in range(8)))
    licences = [one["licence"] for one in after.trained_on["licences"]]
    assert licences == ["Apache-2.0", None]
    old = before.text.vocab_size
    own = after.prior.text_embedding.weight
    assert torch.equal(own[:old], before.prior.text_embedding.weight)
    article, *styles = before.text.token_ids(["a", "a noto", "a fluent"])
    alike = own[[i for ids in styles for i in ids[len(article) :]]].mean(0)
    assert (own[old:] - alike).abs().max() < 0.01  # where it started, four small steps away
    assert len(own) > old
    assert after.tokenizer.fingerprint == before.tokenizer.fingerprint
    assert known_styles(made, after.trained_on) == ["noto", "fluent", "ink-pen"]
    assert main(command) == 0  # resumes: nothing is left to do
    capsys.readouterr()
    again = [*command[:2], str(made), *command[3:]]
    fails(capsys, again, "has the style ink-pen already (it has noto, fluent, ink-pen)")
    write_svgs(tmp_path / "others", 6)
    other = [*command[:4], str(tmp_path / "others"), *command[5:]]
    fails(capsys, other, "has other drawings, of an earlier run of this name; choose another")


@pytest.mark.slow
def test_embeddings_of_new_entries_are_trained_beside_lora(bundle, tmp_path):
    drawings = write_svgs(tmp_path / "ink", 8)
    command = ["finetune", "--bundle", str(bundle), "--data", str(drawings), *SHORT]
    command += ["--output-dir", str(tmp_path / "runs"), "--prior.train.learning-rate"]
    ends = []
    for name, rate in (("slow", "1e-9"), ("fast", "1e-2")):
        assert main([*command, rate, "--name", name]) == 0
        prior = TextToImagePipeline.from_pretrained(tmp_path / "runs" / name / "bundle").prior
        ends.append(prior.text_embedding.weight)
    old = TextToImagePipeline.from_pretrained(bundle).text.vocab_size
    moved = (ends[0] - ends[1]).abs().amax(1)
    assert (moved[:old] == 0).all() and (moved[old:] > 1e-3).any()


def test_drawings_are_named_by_captions_or_files_and_keep_their_alpha(tmp_path):
    folder = tmp_path / "drawings"
    folder.mkdir()
    for i, size in enumerate([(16, 16), (64, 64), (8, 8)]):
        Image.new("RGBA", size, (200, 0, 0, 40 * i)).save(folder / f"green-cat_{i}.png")
    (folder / "metadata.jsonl").write_text(
        json.dumps({"file_name": "green-cat_1.png", "text": "a lion\nof two lines"}) + "\n"
    )
    found = read_drawings(folder, 16)
    names = [drawing.name for drawing in found]
    assert names == ["green cat 0", "a lion of two lines", "green cat 2"]
    assert found[2].content == (folder / "green-cat_2.png").read_bytes()


def test_svgs_are_found_at_any_depth_beside_images_and_named_by_their_captions(
    tmp_path, monkeypatch
):
    names = {"1f600": "grinning face", "2764": "red heart"}
    monkeypatch.setattr("pipeline.stages.style.emoji_names", lambda _: names)
    folder = write_svgs(tmp_path / "drawings", 1)
    (folder / "more").mkdir()
    (folder / "more" / "UPPER.SVG").write_text(svg("red"))
    (folder / "more" / "b.svg").write_text(svg("blue"))
    (folder / "more" / "b.txt").write_text("\ufeff\n a lion \nof two lines\n")
    (folder / "1F600.svg").write_text(svg("grey"))
    (folder / "redheart.svg").write_text(svg("black"))
    (folder / "c.txt").write_bytes(b"\xff")
    (folder / "c.svg").write_text(svg("green"))
    Image.new("RGB", (8, 8)).save(folder / "cat.png")
    names = {drawing.name for drawing in read_drawings(folder, 16)}
    assert names == {"thing 0", "UPPER", "a lion", "cat", "grinning face", "red heart"}


def test_drawings_of_an_iconify_file_keep_its_licence(bundle, tmp_path, caplog):
    caplog.set_level("INFO")
    drawings = {f"thing-{i}": body("red", i) for i in range(6)}
    path = write_set(tmp_path, "ink", drawings) / "icons.json"
    for data, expected in ((path, "MIT"), (write_svgs(tmp_path / "svgs", 6), None)):
        name = ["--name", data.stem, "--output-dir", str(tmp_path / "runs")]
        experiment = style_experiment(bundle, data, style="ink", settings=name)
        _, licences = with_new_style(bundle, experiment.data)
        assert [one["licence"] for one in licences] == ["Apache-2.0", expected]
        assert ("states no licence" in caplog.text) == (expected is None)


def test_a_folder_of_other_images_states_its_licence_and_needs_no_renderer(tmp_path, monkeypatch):
    folder = tmp_path / "ink"
    folder.mkdir()
    for i in range(6):
        Image.new("RGBA", (8, 8), (40 * i, 0, 0, 255)).save(folder / f"thing-{i}.png")
    (folder / "info.json").write_text(json.dumps({"license": {"spdx": "MIT"}}))
    monkeypatch.setattr("pipeline.data.builtin.svg.importlib.util.find_spec", lambda _: None)
    assert len(read_drawings(folder, 16)) == 6
    assert _terms_of(folder, "ink")["licence"] == "MIT"


@pytest.fixture
def bare_bundle(bundle, tmp_path):
    """A bundle that states no licences, and whose names were too many to be kept."""
    folder = tmp_path / "bare"
    shutil.copytree(bundle, folder)
    for name, part, value in (
        ("pipeline.json", "trained_on", {"data": {"source": "icons"}}),
        ("prompts.json", "names", []),
    ):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {part: value}))
    return folder


@pytest.mark.parametrize("licence", ["CC-BY-SA-4.0", None])
def test_a_new_style_keeps_its_licence_where_the_parent_states_none(bare_bundle, tmp_path, licence):
    drawings = {f"thing-{i}": body("red", i) for i in range(6)}
    path = write_set(tmp_path, "ink", drawings, licence=licence)
    where = ["--output-dir", str(tmp_path / "runs")]
    experiment = style_experiment(bare_bundle, path, settings=where)
    assert experiment.name == "ink"
    known, licences = with_new_style(bare_bundle, experiment.data)
    assert [(one["style"], one["licence"]) for one in licences] == (
        [("ink", licence)] if licence else []
    )
    assert known == KnownPrompts(("noto", "fluent", "ink"), ())


@pytest.mark.parametrize(
    ("given", "style"), [("ink/icons.json", "ink"), ("pen.json", "pen"), ("ink", "ink")]
)
def test_a_style_is_called_by_its_folder_or_its_file(bundle, tmp_path, given, style):
    drawings = {f"thing-{i}": body("red", i) for i in range(6)}
    made = write_set(tmp_path, "ink", drawings) / "icons.json"
    (tmp_path / "pen.json").write_text(made.read_text())
    where = ["--output-dir", str(tmp_path / "runs")]
    experiment = style_experiment(bundle, tmp_path / given, settings=where)
    assert experiment.name == style


def test_icons_in_a_mixture_keep_their_licences(tmp_path):
    write_set(tmp_path, "ink", {"thing": body("red")}, licence="CC-BY-4.0")
    parts = [MixPart(source="icons"), MixPart(source=str(tmp_path / "photos"))]
    icons = IconOptions(folder=str(tmp_path), sets=["ink"])
    experiment = Experiment(name="both", data=DataConfig(mix=parts, icons=icons))
    known, found = prompts_and_licences(experiment)
    assert known is None and [one["licence"] for one in found] == ["CC-BY-4.0"]


class Painter:
    """Draws a style in its colour, whatever the name."""

    colours: ClassVar = {"noto": (250, 0, 0, 255), "fluent": (0, 0, 250, 255)}

    def __init__(self) -> None:
        self.prompts: list[str] = []

    def __call__(self, prompts, truncate):
        assert truncate
        self.prompts += prompts
        colours = [self.colours[prompt.split(", ")[1].split()[0]] for prompt in prompts]
        return SimpleNamespace(images=[Image.new("RGBA", (16, 16), one) for one in colours])


@pytest.fixture
def painter(monkeypatch):
    painter = Painter()
    monkeypatch.setattr(
        "pipeline.stages.nearest_style.TextToImagePipeline",
        SimpleNamespace(from_pretrained=lambda _: painter),
    )
    return painter


def test_the_nearest_style_is_that_of_the_least_squared_error_on_white(painter, tmp_path):
    blue = np.zeros((16, 16, 4), np.uint8)
    blue[..., 2:] = 200
    red = np.full((16, 16, 3), (255, 30, 30), np.uint8)
    assert nearest_style(tmp_path, {"star": blue}, ["noto", "fluent"]) == "fluent"
    assert nearest_style(tmp_path, {"star": red}, ["noto", "fluent"]) == "noto"
    assert painter.prompts[:2] == ["star, noto style", "star, fluent style"]


@pytest.mark.parametrize(("names", "start"), [(6, ["fluent"]), (4, ["noto", "fluent"])])
def test_a_new_style_starts_as_the_nearest_where_enough_names_are_known(
    bundle, painter, tmp_path, monkeypatch, names, start
):
    known = KnownPrompts(("noto", "fluent"), tuple(f"thing {i}" for i in range(names)))
    monkeypatch.setattr("pipeline.stages.style.read_known_prompts", lambda _: known)
    drawings = tmp_path / "ink"
    drawings.mkdir()
    for i in range(8):
        Image.new("RGBA", (20, 60), (10, 10, 240, 255)).save(drawings / f"Thing {i}.png")
    settings = ["--output-dir", str(tmp_path / "runs"), "--data.crop", "random"]
    experiment = style_experiment(bundle, drawings, settings=settings)
    assert experiment.text.new_tokens_like == start
    written = Path(experiment.data.source).rglob("*.txt")
    captions = {path.read_text().partition(",")[0] for path in written}
    assert captions == {f"{'thing' if i < names else 'Thing'} {i}" for i in range(8)}
    asked = len(painter.prompts)
    assert asked == (12 if names == 6 else 0)
    settings += ["--text.new_tokens_like", "[noto]"]
    assert style_experiment(bundle, drawings, settings=settings).text.new_tokens_like == ["noto"]
    assert len(painter.prompts) == asked  # what is given needs no samples


def test_styles_of_a_bundle_are_those_that_prompts_may_ask_for(bundle):
    """Not the names of its sets' files, which may be others."""
    trained_on = {"data": {"source": "icons", "icons": {"sets": ["mine.json"]}}}
    assert known_styles(bundle, trained_on) == ["noto", "fluent"]
    assert known_styles(bundle / "none", trained_on) == ["mine"]


def test_a_drawing_that_may_run_something_is_left_out_and_named(tmp_path, caplog):
    folder = write_svgs(tmp_path / "drawings", 2)
    (folder / "bad.svg").write_text(svg("red").replace("<rect", "<script/><rect"))
    assert [drawing.name for drawing in read_drawings(folder, 16)] == ["thing 0", "thing 1"]
    assert "the drawing of bad is left out" in caplog.text


@pytest.mark.slow
def test_images_of_any_size_are_learned_from(bundle, tmp_path):
    folder = tmp_path / "ink"
    folder.mkdir()
    for i in range(6):
        size = (8 + 8 * i, 8 + 8 * i)
        Image.new("RGBA", size, (200, 0, 0, 40 * i)).save(folder / f"cat {i}.png")
    command = ["finetune", "--bundle", str(bundle), "--data", str(folder), *SHORT]
    assert main([*command, "--output-dir", str(tmp_path / "runs")]) == 0
    kept = tmp_path / "runs" / "ink" / DRAWINGS
    held_out = [path.read_text() for path in (kept / "valid").glob("*.txt")]
    assert held_out == ["cat 4, ink style\na cat 4, ink style\nink cat 4\na cat 4 in ink style"]
    assert len(list((kept / "train").glob("*.png"))) == 5


def test_what_no_style_can_be_learned_from_is_one_line(bundle, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    few = write_svgs(tmp_path / "few", 4)
    enough = write_svgs(tmp_path / "enough", 6)
    latent = tmp_path / "latent"
    tiny_latent_pipeline().save_pretrained(latent)
    for given, said in {
        (str(bundle), str(empty), "ink"): "there are no drawings in",
        (str(bundle), str(tmp_path / "none"), "ink"): "there are no drawings in",
        (str(bundle), str(few), "ink"): "has 4 drawings that can be used, and a style needs at",
        (str(bundle), str(enough), "Noto"): "has the style noto already (it has noto, fluent)",
        (str(bundle), str(enough), "a/b"): "the style is called 'a/b'; give a name of letters",
        (str(latent), str(enough), "ink"): "needs codes",
        (str(tmp_path), str(enough), "ink"): "so it is no bundle",
    }.items():
        command = ["finetune", "--bundle", given[0], "--data", given[1], "--style", given[2]]
        fails(capsys, [*command, "--output-dir", str(tmp_path / "runs")], said)
    assert not (tmp_path / "runs").exists()
