"""`forgetting` on tiny bundles: what is compared, and what the notes say."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.data import DataConfig
from pipeline.config.experiment import to_dict
from pipeline.config.load import load_values
from pipeline.data.load import load_source
from pipeline.data.map_source import MappedSource
from pipeline.evaluation.forgetting import NEW, OLD, Forgetting, forgetting
from tests.helpers.data import photo
from tests.helpers.pipelines import CAPTIONS, tiny_pipeline


def folder_of(path: Path, first: int) -> DataConfig:
    """Twenty images with captions, from photo number `first` on."""
    path.mkdir()
    for number in range(20):
        photo(first + number).save(path / f"{number:02}.png")
        (path / f"{number:02}.txt").write_text(CAPTIONS[number % len(CAPTIONS)])
    return DataConfig(source=str(path), image_size=16, val_fraction=0.4)


@pytest.fixture
def old_data(tmp_path) -> DataConfig:
    return folder_of(tmp_path / "old", 0)


@pytest.fixture
def experiment(tmp_path):
    data = folder_of(tmp_path / "new", 100)
    values = {
        "name": "tuned",
        "output_dir": str(tmp_path / "runs"),
        "data": {"source": data.source, "image_size": 16, "val_fraction": 0.4},
        "precision": "fp32",
    }
    return load_values(values, ["--tokenizer.model.downsample_factor=4"])


def bundle(folder: Path, data: DataConfig | None = None, **options) -> Path:
    """A tiny bundle that says it was trained on `data`."""
    trained_on = {}
    if data is not None:
        fingerprint = load_source(data, "held_out").fingerprint
        trained_on = {"data": to_dict(data), "sources": {"held_out": fingerprint}}
    tiny_pipeline(trained_on=trained_on, **options).save_pretrained(folder)
    return folder


def test_a_bundle_forgets_nothing_against_itself(tmp_path, old_data, experiment):
    before = bundle(tmp_path / "before", old_data)
    found = forgetting(before, before, experiment, images=5)
    assert found.notes == [] and list(found.metrics) == [OLD, NEW]
    for metrics in found.metrics.values():
        assert list(metrics) == ["nats_per_code", "nats_per_text_token"]
        assert all(value["before"] == value["after"] for value in metrics.values())
    assert found.metrics[OLD]["nats_per_code"] != found.metrics[NEW]["nats_per_code"]


def test_other_tokenizers_are_noted_and_compared_by_psnr(tmp_path, old_data, experiment):
    before = bundle(tmp_path / "before", old_data)
    after = bundle(tmp_path / "after", num_codes=16)
    found = forgetting(before, after, experiment, images=5)
    assert len(found.notes) == 1 and "the tokenizers differ" in found.notes[0]
    psnr = found.metrics[NEW]["psnr"]
    assert psnr["before"] != psnr["after"] and set(found.metrics[OLD]) == set(found.metrics[NEW])


def test_other_vocabularies_are_noted(tmp_path, old_data, experiment):
    before = bundle(tmp_path / "before", old_data)
    after = bundle(tmp_path / "after", captions=["yellow squares", "yellow moons"])
    (note,) = forgetting(before, after, experiment, images=5).notes
    assert "the vocabularies differ" in note


def test_old_data_that_changed_are_noted_and_measured(tmp_path, old_data, experiment):
    before = bundle(tmp_path / "before", old_data)
    for path in Path(old_data.source).glob("*.txt"):
        path.write_text("another caption")
    found = forgetting(before, before, experiment, images=5)
    assert found.notes == ["the old data have changed since the bundle was trained on them"]
    assert set(found.metrics) == {OLD, NEW}


@pytest.mark.parametrize(
    ("trained_on", "why"),
    [
        ({}, "does not describe them"),
        ({"data": {"sourse": "x"}}, "sourse"),
        ({"data": {"source": "user/set", "image_size": 16}}, "the bundle names data that"),
        (
            {"data": {"source": "https://a.test/0.tar", "image_size": 16, "streaming": True}},
            "https://a.test/0.tar needs the network",
        ),
    ],
)
def test_a_bundle_without_its_data_is_noted(tmp_path, experiment, trained_on, why):
    tiny_pipeline(trained_on=trained_on).save_pretrained(tmp_path / "before")
    found = forgetting(tmp_path / "before", tmp_path / "before", experiment, images=5)
    assert set(found.metrics) == {NEW}
    assert "the old data cannot be read" in found.notes[0] and why in found.notes[0]


def test_bundles_of_unlike_image_size_are_refused(tmp_path, old_data, experiment):
    before = bundle(tmp_path / "before", old_data)
    after = bundle(tmp_path / "after", image_size=32)
    with pytest.raises(ValueError, match=r"makes images of 16 pixels and .* of 32"):
        forgetting(before, after, experiment)


def test_no_images_to_judge_on_are_refused(tmp_path, old_data, experiment, monkeypatch):
    before = bundle(tmp_path / "before", old_data)
    for images in (0, -1):
        with pytest.raises(ValueError, match=f"^images is {images}; it must be at least 1$"):
            forgetting(before, before, experiment, images=images)
    monkeypatch.setattr(MappedSource, "__len__", lambda source: 0)
    with pytest.raises(ValueError, match="no image of the old data is held out"):
        forgetting(before, before, experiment)


def test_the_table_has_a_line_per_data_and_metric():
    values = {"nats_per_code": {"before": 2.5, "after": 2.25}, "psnr": {"before": 9, "after": 19.5}}
    lines = Forgetting({OLD: values}, ["something"]).table().splitlines()
    assert lines[0] == "  what fine-tuning changed:"
    assert lines[1].split() == ["before", "after", "change"]
    assert lines[2].split() == ["old", "data", "nats_per_code", "2.500", "2.250", "-0.250"]
    assert lines[3].split() == ["old", "data", "psnr", "9.000", "19.500", "+10.500"]
    assert len({len(line) for line in lines[1:4]}) == 1 and lines[4] == "  note: something"
