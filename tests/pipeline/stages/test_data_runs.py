"""Whole runs on data of other layouts: a stream, a mixture, random crops, several captions."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from pipeline.cli.main import main
from pipeline.data.codes.dataset import CodesDataset
from stage1_tokenizer import TokenizerModule, to_model_range
from tests.helpers.cli import fails
from tests.helpers.data import encoded, photo, write_shards
from tests.helpers.experiments import TINY

pytestmark = pytest.mark.slow


@pytest.fixture
def sources(tmp_path) -> dict[str, str]:
    """12 + 9 + 15 samples in shards, and 20 images of two captions in a folder."""
    write_shards(tmp_path / "shards", [12, 9, 15])
    (tmp_path / "own").mkdir()
    for number in range(300, 320):
        photo(number, (60, 40)).save(tmp_path / "own" / f"{number}.png")
        (tmp_path / "own" / f"{number}.txt").write_text(f"own {number}\nthe other of {number}")
    return {"shards": str(tmp_path / "shards"), "own": str(tmp_path / "own")}


def written(folder: Path, name: str, data: dict[str, object], **encode: object) -> list[str]:
    """Arguments of a tiny run on `data`."""
    values = {
        **TINY,
        "name": name,
        "output_dir": str(folder / "runs"),
        "data": {
            "image_size": 32,
            "val_fraction": 0.25,
            "upscale": True,
            "stream": {"shuffle_buffer": 8},
            **data,
        },
        "encode": {"max_val_images": 20, "batch_size": 4, **encode},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return ["--config", str(folder / f"{name}.yaml")]


def test_whole_run_on_a_stream(sources, tmp_path, capsys):
    """Its codes are those of the same shards read row by row, whatever their order. A second run
    does nothing."""
    run = written(tmp_path, "stream", {"source": sources["shards"], "streaming": True})
    assert main(["run", *run]) == 0
    assert "read as it comes" in capsys.readouterr().out
    folder = tmp_path / "runs" / "stream"
    codes = CodesDataset(folder / "codes", "train")
    mapped = written(tmp_path, "mapped", {"source": sources["shards"]})
    shutil.copytree(folder / "tokenizer", tmp_path / "runs" / "mapped" / "tokenizer")
    assert main(["encode", *mapped]) == 0
    other = CodesDataset(tmp_path / "runs" / "mapped" / "codes", "train")
    rows = range(len(codes))
    assert codes.captions(rows) == other.captions(rows) and np.array_equal(
        codes.codes(rows), other.codes(rows)
    )
    assert len(set(codes.source_rows(rows))) == len(codes) and codes.source_rows([0]) == [0]
    assert list((folder / "data").glob("lengths-*.json"))
    before = {path: path.stat().st_mtime_ns for path in (folder / "codes").iterdir()}
    assert main(["encode", *run]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "codes").iterdir()}
    damaged = folder / "codes" / "train-00001-of-00003.arrow"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-5])
    assert main(["encode", *run]) == 0 and damaged.read_bytes() == content
    few = written(tmp_path, "few", {"source": sources["shards"], "streaming": True}, max_images=7)
    shutil.copytree(folder / "tokenizer", tmp_path / "runs" / "few" / "tokenizer")
    assert main(["encode", *few]) == 0
    # Three of each shard
    assert len(CodesDataset(tmp_path / "runs" / "few" / "codes", "train")) == 9


def test_whole_run_on_a_mixture_of_a_stream_and_a_folder(sources, tmp_path):
    parts = [{"source": sources["shards"], "weight": 1}, {"source": sources["own"], "weight": 3}]
    run = written(
        tmp_path,
        "mix",
        {"mix": parts, "streaming": True, "crop": "random", "crop_scale": 0.9, "flip": True},
        augmentations_per_image=3,
    )
    assert main(["run", *run]) == 0
    folder = tmp_path / "runs" / "mix"
    codes = CodesDataset(folder / "codes", "train")
    assert (
        len(codes.lengths) == 2
        and sum(codes.lengths) == len(codes)
        and codes.weights == [1, 3]
        and codes.views == 3
    )
    first, own = codes.captions([0])[0], codes.all_captions([len(codes) - 1])[0]
    assert (
        first.startswith("number") and own[0].startswith("own") and own[1].startswith("the other")
    )
    views = [codes.codes(range(len(codes)), [view] * len(codes)) for view in range(3)]
    tokenizer = TokenizerModule.from_pretrained(folder / "tokenizer")
    from pipeline.config.load import load_experiment
    from pipeline.data.load import load_source

    source = load_source(load_experiment(run).data, "train").parts[1]
    plain = (
        tokenizer.encode(to_model_range(torch.from_numpy(source.images([0])))).flatten(1).numpy()
    )
    assert np.array_equal(plain[0], views[0][codes.lengths[0]])
    assert not np.array_equal(views[0], views[1]) or not np.array_equal(views[1], views[2])


def test_image_limits_are_split_by_weight(sources, tmp_path):
    parts = [{"source": sources["shards"], "weight": 1}, {"source": sources["own"], "weight": 3}]
    run = written(tmp_path, "some", {"mix": parts}, max_images=8)
    assert main(["train-tokenizer", *run]) == 0 and main(["encode", *run]) == 0
    codes = CodesDataset(tmp_path / "runs" / "some" / "codes", "train")
    assert codes.lengths == [2, 6]


def test_a_source_of_one_image_is_refused_before_anything_is_written(tmp_path, capsys):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.png").write_bytes(encoded(size=(40, 40)))
    (tmp_path / "one" / "a.txt").write_text("alone")
    run = written(tmp_path, "one", {"source": str(tmp_path / "one")})
    fails(
        capsys,
        ["run", *run],
        "images to train on and",
        "held out to judge on, and each needs at least one",
    )
    assert not (tmp_path / "runs").exists()


def test_speed_settings_do_not_change_the_data(sources, tmp_path, capsys):
    run = written(tmp_path, "speed", {"source": sources["own"]})
    assert main(["train-tokenizer", *run]) == 0
    capsys.readouterr()
    assert main(["train-tokenizer", *run, "--data.workers", "1", "--data.cache_gb", "0"]) == 0
    fails(
        capsys, ["train-tokenizer", *run, "--data.flip", "true"], "made with other settings (data"
    )


def test_mixture_with_shapes_gets_the_checks_of_shapes(sources, tmp_path, capsys):
    parts = [{"source": sources["own"]}, {"source": "shapes"}]
    run = written(tmp_path, "mix", {"mix": parts}, augmentations_per_image=2, flip=True)
    assert main(["run", *run]) == 2
    said = capsys.readouterr().err
    assert (
        "encode.max_images is absent; the shapes are unlimited" in said
        and "captions of the shapes say what is left and right" in said
    )


def test_a_shard_without_images_is_exported_too(sources, tmp_path):
    from tests.helpers.data import write_shard

    write_shard(tmp_path / "shards" / "999.tar", [("x", {"png": b"none", "txt": b"x"})])
    run = written(tmp_path, "empty", {"source": sources["shards"], "streaming": True})
    assert main(["train-tokenizer", *run]) == 0
    for form in ("parquet", "webdataset"):
        assert main(["encode", *run, "--out", str(tmp_path / form), "--format", form]) == 0
