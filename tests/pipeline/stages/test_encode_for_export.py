"""`minidalle encode` for other programs: any source, any tokenizer; each format is read back by
its own library."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipeline.cli.main import main
from pipeline.data.codes.dataset import CodesDataset
from stage1_tokenizer import TokenizerModule
from tests.helpers.cli import fails
from tests.helpers.data import encoded as small_image
from tests.helpers.data import write_shard

pytestmark = pytest.mark.slow


@pytest.fixture
def encoded(finished_run, tmp_path):
    """Runs the command on the finished run; returns the folder."""

    def run(form: str, *more: str) -> Path:
        out = tmp_path / form
        command = [
            "encode",
            "--config",
            str(finished_run[0]),
            "--out",
            str(out),
            "--format",
            form,
            *more,
        ]
        assert main(command) == 0
        return out

    return run


def expected(finished_run) -> tuple[np.ndarray, list[str]]:
    codes = CodesDataset(finished_run[1] / "codes", "train")
    return codes.codes(range(len(codes))), codes.captions(range(len(codes)))


def test_parquet_export_has_codes_and_captions(finished_run, encoded):
    folder = encoded("parquet")
    table = pq.read_table(folder / "train-00000-of-00001.parquet").to_pydict()
    codes, captions = expected(finished_run)
    assert (
        np.array_equal(np.array(table["codes"]), codes)
        and table["text"] == captions
        and table["name"] == CodesDataset(finished_run[1] / "codes", "train").names(range(40))
    )
    manifest = json.loads((folder / "codes.json").read_text())
    assert manifest["form"] == "parquet" and manifest["levels"] == [
        {"grid": [4, 4], "num_codes": 16}
    ]
    assert (
        manifest["tokenizer"]
        == TokenizerModule.from_pretrained(finished_run[1] / "tokenizer").fingerprint
    )
    named = [file["name"] for files in manifest["files"].values() for file in files]
    assert sorted(p.name for p in folder.iterdir()) == sorted(["codes.json", *named])


def test_webdataset_export_has_several_shards(finished_run, encoded):
    folder = encoded("webdataset", "--encode.images_per_shard", "15")
    names = [
        file["name"] for file in json.loads((folder / "codes.json").read_text())["files"]["train"]
    ]
    assert len(names) == 3
    rows: dict[str, dict[str, bytes]] = {}
    for name in names:
        with tarfile.open(folder / name) as tar:
            for member in tar:  # keys are names: "scene 7"
                key, _, suffix = member.name.partition(".")
                rows.setdefault(key, {})[suffix] = tar.extractfile(member).read()  # type: ignore[union-attr]
    codes, captions = expected(finished_run)
    names = CodesDataset(finished_run[1] / "codes", "train").names(range(40))
    assert [json.loads(row["json"])["name"] for row in rows.values()] == names
    assert all(
        np.array_equal(np.load(io.BytesIO(row["codes.npy"]), allow_pickle=False), c)
        for row, c in zip(rows.values(), codes, strict=True)
    )
    assert [row["txt"].decode() for row in rows.values()] == captions


def test_arrow_export_is_a_codes_dataset(finished_run, encoded):
    folder = encoded("arrow")
    codes = CodesDataset(folder, "train")
    assert np.array_equal(codes.codes(range(40)), expected(finished_run)[0])
    assert not list(folder.parent.glob(".*"))


def test_any_tokenizer_encodes_any_source(finished_run, tmp_path):
    """A copied tokenizer, its run's settings, and images of another folder at another size."""
    run = Path(shutil.copytree(finished_run[1], tmp_path / "run"))
    (tmp_path / "own").mkdir()
    for i in range(12):
        Image.effect_noise((64, 64), 20 + i).convert("RGB").save(tmp_path / "own" / f"{i}.png")
        (tmp_path / "own" / f"{i}.txt").write_text(f"noise {i}")
    arguments = [
        "--data.source",
        str(tmp_path / "own"),
        "--data.image_size",
        "64",
        "--tokenizer.model.image_size",
        "64",
        "--data.val_fraction",
        "0.3",
    ]
    out = tmp_path / "codes"
    assert (
        main(
            [
                "encode",
                "--tokenizer",
                str(run / "tokenizer"),
                "--out",
                str(out),
                "--format",
                "parquet",
                *arguments,
            ]
        )
        == 0
    )
    manifest = json.loads((out / "codes.json").read_text())
    assert (
        manifest["levels"] == [{"grid": [8, 8], "num_codes": 16}]
        and sum(manifest["rows"].values()) == 12
    )
    table = pq.read_table(out / manifest["files"]["train"][0]["name"]).to_pydict()
    tokenizer = TokenizerModule.from_pretrained(run / "tokenizer")
    images = [Image.open(tmp_path / "own" / f"{text.split()[1]}.png") for text in table["text"]]
    same = (tokenizer.to_codes(images).flatten(1) == torch.tensor(table["codes"])).float().mean()
    assert same > 0.8  # bf16 may turn a near tie


def test_invalid_export_requests_are_named(finished_run, tmp_path, capsys):
    config = ["--config", finished_run[0]]
    fails(capsys, ["encode", *config, "--format", "parquet"], "add --out DIR", status=2)
    fails(
        capsys,
        ["encode", "--tokenizer", tmp_path / "none", "--out", tmp_path / "c"],
        "there is no tokenizer in",
    )
    shutil.copytree(finished_run[1] / "tokenizer", tmp_path / "tokenizer")
    fails(
        capsys,
        ["encode", "--tokenizer", tmp_path / "tokenizer", "--out", tmp_path / "c"],
        "which images to encode; add --config FILE",
    )
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    fails(
        capsys,
        ["encode", *config, "--out", tmp_path / "taken"],
        "is there already and holds no codes; choose another folder",
    )
    assert (tmp_path / "taken" / "thesis.txt").read_text() == "mine"
    size = [
        "--data.image_size",
        "44",
        "--tokenizer.model.downsample_factor",
        "4",
        "--tokenizer.model.image_size",
        "44",
    ]
    fails(
        capsys,
        [
            "encode",
            *config,
            *size,
            "--out",
            tmp_path / "c",
            "--tokenizer",
            finished_run[1] / "tokenizer",
        ],
        "data.image_size is 44 and the tokenizer's code grid needs a multiple of 8; set "
        "data.image_size=32",
    )
    assert main(["encode", "--help"]) == 0 and "--format" in capsys.readouterr().out


def test_export_has_every_image_once(finished_run, tmp_path, capsys):
    """Whatever the tokenizer's run encoded for its prior, unless settings are given."""
    import yaml

    run = Path(shutil.copytree(finished_run[1], tmp_path / "run"))
    folder = tmp_path / "own"
    folder.mkdir()
    for i in range(40):
        Image.new("RGB", (32, 32), (i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"shade {i}")
    settings = yaml.safe_load((run / "experiment.yaml").read_text())
    settings["encode"] = {
        "max_images": 5,
        "max_val_images": 2,
        "augmentations_per_image": 3,
        "shift": 1,
        "batch_size": 4,
    }
    (run / "experiment.yaml").write_text(yaml.safe_dump(settings))
    command = [
        "encode",
        "--tokenizer",
        str(run / "tokenizer"),
        "--data.source",
        str(folder),
        "--data.val_fraction",
        "0.3",
    ]
    assert main([*command, "--out", str(tmp_path / "all")]) == 0
    manifest = json.loads((tmp_path / "all" / "codes.json").read_text())
    assert sum(manifest["rows"].values()) == 40 and manifest["augmentations_per_image"] == 1
    assert (
        f"{manifest['rows']['train']:,} train, {manifest['rows']['held_out']:,} held_out images"
        in capsys.readouterr().out
    )
    assert (
        main(
            [
                *command,
                "--out",
                str(tmp_path / "some"),
                "--encode.max_images",
                "7",
                "--encode.batch_size=3",
            ]
        )
        == 0
    )
    some = json.loads((tmp_path / "some" / "codes.json").read_text())
    assert (
        some["rows"] == {"train": 7, "held_out": manifest["rows"]["held_out"]}
        and some["augmentations_per_image"] == 1
    )


def test_export_of_an_unlimited_source_uses_the_runs_limit(finished_run, tmp_path):
    command = [
        "encode",
        "--tokenizer",
        str(finished_run[1] / "tokenizer"),
        "--out",
        str(tmp_path / "codes"),
    ]
    assert main(command) == 0
    rows = json.loads((tmp_path / "codes" / "codes.json").read_text())["rows"]
    assert rows == json.loads((finished_run[1] / "codes" / "codes.json").read_text())["rows"]


def test_exported_codes_are_refused_by_the_prior(finished_run, tmp_path, capsys):
    run = Path(shutil.copytree(finished_run[1], tmp_path / "tiny"))
    command = ["--config", finished_run[0], "--output_dir", tmp_path]
    assert (
        main(["encode", *map(str, command), "--format", "parquet", "--out", str(run / "codes")])
        == 0
    )
    for stage in ("encode", "train-prior"):
        fails(
            capsys,
            [stage, *command],
            "are parquet, for other programs; move that folder away and run `minidalle encode` "
            "again",
        )


@pytest.mark.parametrize("content", ["", "tokenizer: [", "tokenizer: {model: 3}"])
def test_damaged_settings_of_the_tokenizers_run_are_named(finished_run, tmp_path, capsys, content):
    run = Path(shutil.copytree(finished_run[1], tmp_path / "run"))
    (run / "experiment.yaml").write_text(content)
    fails(
        capsys,
        ["encode", "--tokenizer", run / "tokenizer", "--out", tmp_path / "c"],
        "experiment.yaml is truncated or corrupted; add --config FILE",
    )


def test_files_as_arguments_are_encoded_without_a_run(finished_run, tmp_path, capsys):
    """By a tokenizer that was copied alone; with the caption next to an image, if there is one."""
    tokenizer = shutil.copytree(finished_run[1] / "tokenizer", tmp_path / "tokenizer")
    (tmp_path / "own").mkdir()
    files = [tmp_path / "own" / f"{i}.png" for i in range(3)]
    for i, file in enumerate(files):
        Image.effect_noise((40, 36), 20 + 30 * i).convert("RGB").save(file)
    files[0].with_suffix(".txt").write_text("fine noise")
    out = tmp_path / "codes"
    options = ["--tokenizer", tokenizer, "--out", out, "--format", "parquet"]
    given = ["encode", *files[::-1], *options]
    assert main([str(one) for one in given]) == 0, capsys.readouterr().err
    manifest = json.loads((out / "codes.json").read_text())
    table = pq.read_table(out / manifest["files"]["train"][0]["name"]).to_pydict()
    assert table["name"] == [str(file) for file in files[::-1]]
    assert table["text"] == [None, None, "fine noise"]
    assert sorted(one.name for one in tmp_path.iterdir()) == ["codes", "own", "tokenizer"]

    folder = ["encode", tmp_path / "own", *options[:2], "--out", tmp_path / "of_folder"]
    assert main([str(one) for one in folder]) == 0, capsys.readouterr().err
    rows = json.loads((tmp_path / "of_folder" / "codes.json").read_text())["rows"]
    assert rows == {"train": 3, "held_out": 0}

    missing = ["encode", files[0], tmp_path / "none.png", *options[:2], "--out", tmp_path / "c"]
    fails(capsys, missing, "1 of 2 images are no files: ", "none.png")
    fails(capsys, ["encode", files[0], "--out", out], "take --tokenizer DIR", status=2)


def test_encoding_without_captions_does_not_advise_training_a_prior(finished_run, tmp_path, capsys):
    shutil.copytree(finished_run[1] / "tokenizer", tmp_path / "tiny" / "tokenizer")
    (tmp_path / "own").mkdir()
    for i in range(12):
        Image.effect_noise((40, 36), 20 + 9 * i).convert("RGB").save(tmp_path / "own" / f"{i}.png")
    settings = [
        *(
            "--config",
            str(finished_run[0]),
            "--output_dir",
            str(tmp_path),
            "--data.val_fraction=0.3",
        ),
        *("--data.source", str(tmp_path / "own")),
    ]
    assert main(["encode", *settings]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert (
        "the images have no captions, which a prior needs" in said
        and "minidalle train-prior" not in said
    )
    for i in range(12):
        (tmp_path / "own" / f"{i}.txt").write_text(f"noise {i}")
    shutil.rmtree(tmp_path / "tiny" / "codes")
    assert main(["encode", *settings]) == 0, capsys.readouterr().err
    assert "next: minidalle train-prior" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["other columns", "empty cells", "shards", "streamed shards"])
def test_sources_without_captions_are_encoded_whole(finished_run, tmp_path, capsys, layout):
    shutil.copytree(finished_run[1] / "tokenizer", tmp_path / "tiny" / "tokenizer")
    images = {f"{i:02}": small_image((9 * i, 80, 200), (40, 36)) for i in range(12)}
    source = tmp_path / ("0.tar" if "shards" in layout else "t.csv")
    if "shards" in layout:
        write_shard(source, [(name, {"png": content}) for name, content in images.items()])
    else:
        for name, content in images.items():
            (tmp_path / f"{name}.png").write_bytes(content)
        column, cell = ("width", "40") if layout == "other columns" else ("text", "")
        rows = "".join(f"{name}.png,{cell}\n" for name in images)
        source.write_text(f"image,{column}\n{rows}")
    data = ["--data.source", str(source), "--data.val_fraction=0.3"]
    data += ["--data.streaming=true"] if "streamed" in layout else []
    command = ["encode", "--config", str(finished_run[0]), "--output_dir", str(tmp_path), *data]
    assert main(command) == 0, capsys.readouterr().err
    said = capsys.readouterr()
    assert "no prior can be trained on these codes: " in said.out + said.err
    rows = json.loads((tmp_path / "tiny" / "codes" / "codes.json").read_text())["rows"]
    assert rows["train"] + rows["held_out"] == 12 and rows["held_out"]
