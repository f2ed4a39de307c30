"""Encoding that is killed, corrupted or given other settings ends with the same files, or names in
one line what changed."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.cli.main import main
from pipeline.data.builtin.shapes_captions import ShapesSource
from pipeline.data.codes.dataset import CodesDataset, read_manifest
from pipeline.stages import captions, encode
from stage1_tokenizer import TokenizerModule
from stage2_prior import TextTokenizer
from tests.helpers.cli import fails
from tests.helpers.launch import launch, torchrun, worker_environment

pytestmark = pytest.mark.slow

OPTIONS = [
    "--encode.images_per_shard",
    "6",
    "--encode.batch_size",
    "4",
    "--encode.augmentations_per_image",
    "2",
    "--encode.shift",
    "1",
]
SHARDS = [
    f"{split}-{k:05d}-of-{count:05d}.arrow"
    for split, count in (("train", 7), ("held_out", 2))
    for k in range(count)
]
"""Of 40 and 10 images."""


def contents(codes: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in codes.iterdir()}


@pytest.fixture(scope="module")
def uninterrupted(finished_run, tmp_path_factory) -> Path:
    """The codes folder of an undisturbed encoding. Tests must not change it."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    shutil.copytree(finished_run[1] / "tokenizer", folder / "tiny" / "tokenizer")
    assert (
        main(["encode", "--config", str(finished_run[0]), "--output_dir", str(folder), *OPTIONS])
        == 0
    )
    return folder / "tiny" / "codes"


@pytest.fixture
def command(finished_run, tmp_path) -> list[str]:
    """The same in a folder of its own, tmp_path/tiny, where only the tokenizer is yet."""
    shutil.copytree(finished_run[1] / "tokenizer", tmp_path / "tiny" / "tokenizer")
    return ["encode", "--config", str(finished_run[0]), "--output_dir", str(tmp_path), *OPTIONS]


@pytest.fixture
def whole(command, uninterrupted, tmp_path) -> Path:
    """A copy of the undisturbed codes, for damage."""
    return Path(shutil.copytree(uninterrupted, tmp_path / "tiny" / "codes"))


@pytest.fixture
def unfinished(command, tmp_path, monkeypatch) -> Path:
    """What there is after a failure in the fourth shard."""
    with monkeypatch.context() as patch:
        patch.setattr(encode, "write_shard", failing_at(SHARDS[3], encode.write_shard))
        assert main(command) == 1
    return tmp_path / "tiny" / "codes"


def failing_at(name: str, write: Callable) -> Callable:
    def fails_there(path, blocks, **options):
        if path.name == name:
            next(blocks)
            raise OSError("the disk is full")
        return write(path, blocks, **options)

    return fails_there


def test_codes_folder_has_the_documented_files(uninterrupted):
    assert sorted(contents(uninterrupted)) == sorted(["codes.json", *SHARDS])
    manifest = read_manifest(uninterrupted)
    assert (
        manifest["rows"] == {"train": 40, "held_out": 10}
        and manifest["images_per_shard"] == 6
        and manifest["format"] == 1
    )
    assert [file["rows"] for file in manifest["files"]["train"]] == [6] * 6 + [4]
    assert "images_per_shard" not in manifest["settings"]["encode"]
    codes = CodesDataset(uninterrupted, "train")
    assert codes.source_rows(range(40)) == list(range(40)) and codes.codes([39], [1]).shape == (
        1,
        16,
    )


def test_failed_encoding_resumes(unfinished, uninterrupted, command, capsys):
    assert (
        not (unfinished / "codes.json").exists()
        and sorted(p.name for p in unfinished.glob("*.arrow")) == SHARDS[:3]
    )
    before = {name: (unfinished / name).stat().st_mtime_ns for name in SHARDS[:3]}
    capsys.readouterr()
    assert main(command) == 0
    assert "resuming, 3 of 9 shards are there" in capsys.readouterr().out
    assert contents(unfinished) == contents(uninterrupted)
    assert before == {name: (unfinished / name).stat().st_mtime_ns for name in before}


DIES = """
import os, signal, sys
from pipeline import cli
from stage1_tokenizer import TokenizerModule
encode, calls = TokenizerModule.encode, []
def dies(self, pixels):
    calls.append(1)
    if len(calls) == 5 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(self, pixels)
TokenizerModule.encode = dies
sys.exit(cli.main(sys.argv[1:]))
"""


def test_kills_and_process_count_do_not_change_the_codes(
    unfinished, uninterrupted, command, tmp_path
):
    """One process did three files; of two that go on, one is killed in its second file, and the
    other does not wait for it; two end it."""
    (tmp_path / "dies.py").write_text(DIES)
    killed = subprocess.run(
        [*torchrun(2), "--", str(tmp_path / "dies.py"), *command],
        env=worker_environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert (
        killed.returncode != 0
        and "Signal 9" in killed.stderr
        and "3 of 9 shards are there" in killed.stdout
    )
    assert not (unfinished / "codes.json").exists()
    assert (unfinished / SHARDS[4]).exists() and list(unfinished.glob(f".{SHARDS[6]}.*.writing"))
    assert " of 9 shards are there" in launch(tmp_path, 2, *command)
    assert contents(unfinished) == contents(uninterrupted)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def changed(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {"is missing": Path.unlink, "is truncated or corrupted": cut, "is corrupted": changed}


@pytest.mark.parametrize("message", DAMAGE)
def test_corrupted_file_of_an_incomplete_folder_is_rebuilt(
    unfinished, uninterrupted, command, capsys, message
):
    DAMAGE[message](unfinished / SHARDS[1])
    assert main(command) == 0
    said = capsys.readouterr().out
    assert (
        f"{unfinished / SHARDS[1]} {message}" in said
        and "resuming, 2 of 9 shards are there" in said
    )
    assert contents(unfinished) == contents(uninterrupted)


@pytest.mark.parametrize("message", DAMAGE)
def test_corrupted_file_of_a_complete_folder_is_named_and_rebuilt(
    whole, uninterrupted, command, capsys, message
):
    DAMAGE[message](whole / SHARDS[4])
    before = {name: (whole / name).stat().st_mtime_ns for name in SHARDS if name != SHARDS[4]}
    fails(
        capsys,
        ["train-prior", *command[1:]],
        f"{whole / SHARDS[4]} {message}",
        "run `minidalle encode` again",
    )
    assert main(command) == 0
    assert f"{whole / SHARDS[4]} {message}" in capsys.readouterr().out
    assert contents(whole) == contents(uninterrupted)
    assert before == {name: (whole / name).stat().st_mtime_ns for name in before}
    assert main(command) == 0 and "rebuilt" not in capsys.readouterr().out


def test_truncated_progress_record_is_ignored(unfinished, uninterrupted, command, capsys):
    (unfinished / SHARDS[0]).with_suffix(".json").write_text('{"name": ')
    assert main(command) == 0
    assert "resuming, 2 of 9 shards are there" in capsys.readouterr().out
    assert contents(unfinished) == contents(uninterrupted)


CHANGES = {
    "encode.augmentations_per_image 2 -> 3": ["--encode.augmentations_per_image", "3"],
    "encode.batch_size 4 -> 5": ["--encode.batch_size", "5"],
    "seed of the views 0 -> 1": ["--seed", "1"],
    "train images or captions of the source": ["--data.shapes.max_objects", "2"],
}


@pytest.mark.parametrize("change", CHANGES)
def test_codes_with_other_settings_are_refused_with_the_difference(
    unfinished, whole_elsewhere, command, capsys, change
):
    before = contents(unfinished)
    fails(
        capsys,
        [*command, *CHANGES[change]],
        f"{unfinished} holds unfinished codes made with something else (",
        change,
        "move that folder away",
    )
    assert contents(unfinished) == before
    fails(
        capsys,
        [*whole_elsewhere, *CHANGES[change]],
        "holds codes made with something else (",
        change,
        "move that folder away",
    )


@pytest.fixture
def whole_elsewhere(command, uninterrupted, tmp_path) -> list[str]:
    """The command on a whole folder."""
    shutil.copytree(tmp_path / "tiny" / "tokenizer", tmp_path / "whole" / "tiny" / "tokenizer")
    shutil.copytree(uninterrupted, tmp_path / "whole" / "tiny" / "codes")
    return [*command, "--output_dir", str(tmp_path / "whole")]


def test_another_tokenizer_is_refused(unfinished, whole_elsewhere, command, tmp_path, capsys):
    made = TokenizerModule.from_pretrained(tmp_path / "tiny" / "tokenizer")
    before = made.fingerprint
    next(made.parameters()).data.add_(1)
    for folder in (tmp_path, tmp_path / "whole"):
        made.save_pretrained(folder / "tiny" / "tokenizer")
    now = TokenizerModule.from_pretrained(tmp_path / "tiny" / "tokenizer").fingerprint
    for again in (command, whole_elsewhere):
        fails(capsys, again, f"made with something else (tokenizer {before} -> {now})")


def test_images_per_shard_of_an_existing_folder_does_not_change(
    unfinished, whole_elsewhere, command, tmp_path, capsys
):
    """A whole one stays as it is and is mended in its own size; an unfinished one is not mixed."""
    other = ["--encode.images_per_shard", "9"]
    fails(capsys, [*command, *other], "holds unfinished codes", "encode.images_per_shard 6 -> 9")
    codes = tmp_path / "whole" / "tiny" / "codes"
    before = contents(codes)
    (codes / SHARDS[2]).unlink()
    assert main([*whole_elsewhere, *other]) == 0 and contents(codes) == before


def test_other_precision_is_refused_for_incomplete_codes(
    unfinished, whole_elsewhere, command, capsys, monkeypatch
):
    bf16 = json.loads((unfinished / "plan.json").read_text())["bf16"]
    monkeypatch.setattr(encode, "uses_bf16", lambda *_: not bf16)
    fails(capsys, command, "computed in bf16 -> fp32" if bf16 else "computed in fp32 -> bf16")
    assert main(whole_elsewhere) == 0


def test_seed_does_not_change_codes_without_augmentation(command, tmp_path):
    once = [*command, "--encode.augmentations_per_image", "1", "--encode.shift", "0"]
    assert main(once) == 0
    before = contents(tmp_path / "tiny" / "codes")
    assert main([*once, "--seed", "1"]) == 0 and contents(tmp_path / "tiny" / "codes") == before


def test_other_formats_and_a_corrupted_plan_are_refused(
    unfinished, whole_elsewhere, command, tmp_path, capsys
):
    plan = json.loads((unfinished / "plan.json").read_text())
    (unfinished / "plan.json").write_text(json.dumps({**plan, "format": 3}))
    fails(capsys, command, f"the codes in {unfinished} were written by a later version (format 3")
    (unfinished / "plan.json").write_text("{")
    fails(
        capsys,
        command,
        f"{unfinished / 'plan.json'} is truncated or corrupted",
        f"move {unfinished} away and run",
    )
    codes = tmp_path / "whole" / "tiny" / "codes"
    (codes / "codes.json").write_text(
        json.dumps({"format": 0, "files": {"train": ["train-00000-of-00001.arrow"]}})
    )
    for stage in ("encode", "train-prior"):
        fails(
            capsys,
            [stage, *whole_elsewhere[1:]],
            "written by an earlier version (format 0; this one reads 1); move that folder away and "
            "run",
        )


def several(source, part: list[int]) -> list[list[str]]:
    """Two captions for every second image."""
    return [
        [text, f"again\n{text}"][: 1 + row % 2]
        for row, text in zip(part, source.captions(part), strict=True)
    ]


def test_several_captions_per_image_are_kept(command, tmp_path, monkeypatch, capsys):
    """All are encoded, learned from, counted, trained on, and exported."""
    monkeypatch.setattr(ShapesSource, "all_captions", several)
    assert main(command) == 0
    codes = CodesDataset(tmp_path / "tiny" / "codes", "train")
    assert codes.captions_in_all == 60
    asked: list[list[str]] = []
    encode = TextTokenizer.encode
    monkeypatch.setattr(
        TextTokenizer,
        "encode",
        lambda self, texts, **how: asked.append(list(texts)) or encode(self, texts, **how),
    )
    too_short = ["train-prior", *command[1:], "--text.max_length", "5"]
    fails(
        capsys,
        too_short,
        "74 of 75 captions need more than text.max_length=5 slots (the longest",
        "'again\\n",
    )
    assert main(["train-prior", *command[1:], "--text.max_length", "64"]) == 0
    drawn = [text for batch in asked for text in batch]
    assert any(text.startswith("again") for text in drawn) and not all(
        text.startswith("again") for text in drawn
    )
    for form in ("parquet", "webdataset"):
        assert main([*command, "--format", form, "--out", str(tmp_path / form)]) == 0
    table = pq.read_table(tmp_path / "parquet" / SHARDS[0].replace("arrow", "parquet")).to_pydict()
    assert table["text"][1] == codes.captions([1])[0] and table["more_texts"][:2] == [
        [],
        [f"again\n{table['text'][1]}"],
    ]
    with tarfile.open(tmp_path / "webdataset" / SHARDS[0].replace("arrow", "tar")) as tar:
        lines = tar.extractfile("scene 1.txt").read().decode().split("\n")  # type: ignore[union-attr]
    assert lines == [table["text"][1], f"again {table['text'][1]}"]


def test_text_tokenizer_learns_from_evenly_spread_captions(uninterrupted, monkeypatch):
    codes = CodesDataset(uninterrupted, "train")
    monkeypatch.setattr(captions, "_ROWS_AT_A_TIME", 3)
    batches = list(captions.caption_batches(codes))
    assert max(map(len, batches)) == 3 and [
        text for batch in batches for text in batch
    ] == codes.captions(range(40))
    spread = [text for batch in captions.caption_batches(codes, 10) for text in batch]
    assert spread == codes.captions(range(0, 40, 4))
    assert np.array_equal(
        [len(b) for b in captions.caption_batches(codes, 99)], [len(b) for b in batches]
    )


def test_a_kill_after_the_manifest_leaves_nothing_behind(finished_run, tmp_path):
    """Its command runs again, and removes what only unfinished codes need."""
    config, original = finished_run
    folder = tmp_path / original.name
    for part in ("tokenizer", "codes"):
        shutil.copytree(original / part, folder / part)
    before = sorted(path.name for path in (folder / "codes").iterdir())
    shard = next((folder / "codes").glob("*.arrow"))
    for name in ("plan.json", f"{shard.stem}.json", f".{shard.name}.writing"):
        (folder / "codes" / name).write_text("{}")
    assert main(["encode", "--config", str(config), "--output-dir", str(tmp_path)]) == 0
    assert sorted(path.name for path in (folder / "codes").iterdir()) == before
