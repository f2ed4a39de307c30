"""Suggested configurations: by sizes, number of images and captions. Every suggestion loads."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pipeline.config.builtin import ShapesOptions
from pipeline.config.data import DataConfig, FilterOptions, MixPart
from pipeline.config.experiment import Experiment
from pipeline.config.load import load_experiment
from pipeline.data.load import load_sources
from pipeline.doctor.diagnose import diagnose
from pipeline.doctor.report import Suggestion
from pipeline.doctor.suggest_config import _CODES, _length, _steps, as_yaml, name_of
from pipeline.doctor.text_report import as_table
from stage2_prior import TextConfig


def make(folder, sizes, texts=None):
    folder.mkdir()
    for number, size in enumerate(sizes):
        coarse = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size if isinstance(size, tuple) else (size, size)).save(
            folder / f"{number:03}.png"
        )
        (folder / f"{number:03}.txt").write_text(texts[number] if texts else f"number {number}")
    return folder


def loaded(suggestion: Suggestion, tmp_path) -> Experiment:
    path = tmp_path / "suggested.yaml"
    path.write_text(as_yaml(suggestion, "minidalle run --config suggested.yaml"))
    return load_experiment(["--config", str(path)])


def suggested(tmp_path, sizes, texts=None, *, text=None, largest=256, **options) -> Experiment:
    data = DataConfig(source=str(make(tmp_path / "images", sizes, texts)), **options)
    experiment = loaded(diagnose(data, text=text, largest=largest).suggestion, tmp_path)
    train, held_out = load_sources(experiment.data)
    assert len(train) and len(held_out)
    return experiment


@pytest.mark.parametrize(
    ("sizes", "expected", "upscale", "factor"),
    [
        ([70] * 30, 64, False, 8),
        ([100] * 27 + [50] * 3, 96, False, 8),  # a tenth may be left out
        ([100] * 26 + [50] * 4, 48, False, 8),
        ([(400, 300)] * 30, 256, False, 16),
        ([20] * 30, 16, False, 4),
        ([40] * 30, 32, False, 4),
        ([10] * 30, 16, True, 4),
    ],
)
def test_suggested_size_skips_at_most_a_tenth(tmp_path, sizes, expected, upscale, factor):
    experiment = suggested(tmp_path, sizes)
    assert (
        experiment.data.image_size,
        experiment.data.upscale,
        experiment.tokenizer.model.downsample_factor,
    ) == (expected, upscale, factor)


@pytest.mark.slow
def test_larger_size_is_opt_in_and_filters_are_kept(tmp_path):
    experiment = suggested(
        tmp_path,
        [600] * 20 + [(900, 300)] * 20,
        largest=512,
        filter=FilterOptions(max_aspect=1.5),
        flip=True,
    )
    assert (
        experiment.data.image_size == 512
        and experiment.data.filter.max_aspect == 1.5
        and experiment.data.flip
    )
    source = experiment.data.source
    for options, expected in (
        ({"filter": FilterOptions(max_size=700)}, 384),
        ({"filter": FilterOptions(min_size=100)}, 96),
        ({"filter": FilterOptions(min_size=100), "upscale": True}, 384),
    ):
        data = DataConfig(source=source, image_size=64, **options)
        found = loaded(diagnose(data, largest=384).suggestion, tmp_path)
        # Of the long ones 300 pixels are the shorter side, so that half are left out where nothing
        # else leaves them out.
        assert found.data.image_size == (
            expected if options["filter"].max_size or expected == 96 else 256
        ), options
        assert {name: getattr(found.data, name) for name in options} == options


def test_text_length_covers_the_longest_caption_but_for_outliers(tmp_path):
    texts = ["a b c d e"] * 40
    experiment = suggested(tmp_path, [64] * 40, texts, text=TextConfig(vocab_size=300))
    assert (
        experiment.text.max_length % 8,
        experiment.text.truncate,
        experiment.text.vocab_size,
    ) == (0, False, 300)
    lengths = np.full(1000, 10)
    assert _length(lengths)[:2] == (16, False)
    lengths[0] = 30
    assert _length(lengths)[:2] == (32, False)
    lengths[0] = 300
    assert _length(lengths)[:2] == (16, True)
    lengths[:50] = 300
    assert _length(lengths)[:2] == (304, False)


def test_steps_are_those_of_the_shipped_experiment_and_bounded():
    assert (_steps("tokenizer", 3440), _steps("prior", 3440)) == (2600, 4300)  # configs/emoji.yaml
    assert (_steps("tokenizer", 10), _steps("prior", 10)) == (1000, 2000)
    assert (_steps("tokenizer", 200_000), _steps("prior", 200_000)) == (20_000, 40_000)
    assert _steps("prior", 32_000_000) == 1_000_000  # one pass
    counts = [count for count, _ in _CODES]
    assert counts == sorted(counts) and dict(_CODES)[30_000] == 1024


def test_few_images_give_two_nonempty_splits(tmp_path):
    experiment = suggested(tmp_path, [64] * 4, val_fraction=0.0001)
    train, held_out = load_sources(experiment.data, require_captions=False)
    assert (len(train), len(held_out)) == (3, 1)
    one = make(tmp_path / "one", [64])
    assert diagnose(DataConfig(source=str(one))).suggestion is None


def test_mixtures_and_synthetic_sources_are_suggested_unchanged(tmp_path):
    folder = make(tmp_path / "images", [100] * 40)
    mix = [MixPart(source="shapes", weight=2.0), MixPart(source=str(folder))]
    experiment = loaded(
        diagnose(DataConfig(mix=mix, shapes=ShapesOptions(grid_cells=8)), images=40).suggestion,
        tmp_path,
    )
    assert (
        experiment.data.mix == mix
        and experiment.data.image_size == 96
        and experiment.data.shapes.grid_cells == 8
    )
    shapes = loaded(
        diagnose(
            DataConfig(source="shapes", shapes=ShapesOptions(max_objects=2)), images=40
        ).suggestion,
        tmp_path,
    )
    assert (
        shapes.data.image_size,
        shapes.data.shapes.max_objects,
        shapes.tokenizer.model.num_codes,
        shapes.encode.max_images,
    ) == (64, 2, 512, 60_000)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("path/to/my cats", "my-cats"),
        ("table.csv", "table"),
        ("shards/*.tar", "shards"),
        ("user/data-set", "data-set"),
        ("..", "mine"),
    ],
)
def test_the_run_is_named_after_the_source(source, name):
    assert name_of(DataConfig(source=source)) == name


@pytest.mark.parametrize(("transparent", "alpha", "channels"), [(10, "keep", 4), (5, "white", 3)])
def test_transparency_is_kept_where_a_quarter_of_the_images_has_it(
    tmp_path, transparent, alpha, channels
):
    folder = make(tmp_path / "images", [40] * 30)
    for number in range(transparent):
        path = folder / f"{number:03}.png"
        with Image.open(path) as image:
            image.putalpha(100)
            image.save(path)
    diagnosis = diagnose(DataConfig(source=str(folder)))
    experiment = loaded(diagnosis.suggestion, tmp_path)
    assert (experiment.data.alpha, experiment.tokenizer.model.channels) == (alpha, channels)
    assert diagnosis.sources[0].transparent == transparent
    assert f"transparency           {transparent} images" in as_table(diagnosis)
    found = [one.text for one in diagnosis.findings if "have transparency" in one.text]
    assert len(found) == 1 and "set data.alpha=keep and tokenizer.model.channels=4" in found[0]


def test_a_colour_that_was_given_for_transparency_stays(tmp_path):
    folder = make(tmp_path / "images", [40] * 30)
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            image.putalpha(100)
            image.save(path)
    data = DataConfig(source=str(folder), alpha="#203040")
    assert loaded(diagnose(data).suggestion, tmp_path).data.alpha == "#203040"
