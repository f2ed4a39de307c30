"""Each remedy that an error names cures: a finished run is damaged, the command says what to do,
and then works."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from pipeline.cli.main import main
from pipeline.stages.manifest import read_settings

pytestmark = pytest.mark.slow

FILES = (
    "tokenizer/config.json",
    "tokenizer/model.safetensors",
    "tokenizer/settings.json",
    "prior/config.json",
    "prior/model.safetensors",
    "prior/settings.json",
    "text_tokenizer/text.json",
    "text_tokenizer/tokenizer.json",
    "text_tokenizer/tokenizer_config.json",
    "codes/codes.json",
    "bundle/pipeline.json",
    "bundle/prior/config.json",
    "bundle/text_tokenizer/text.json",
)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 128
    path.write_bytes(bytes(content))


def replace(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = (Path.unlink, truncate, empty, flip, replace)


def cure(error: str, folder: Path, original: Path, config: str) -> None:
    """Does what an error says first."""
    if command := re.search(r"`minidalle ([a-z-]+)`", error):
        main([command[1], "--config", config, "--output-dir", str(folder.parent)])
    elif "copy the bundle again" in error:
        shutil.rmtree(folder / "bundle")
        shutil.copytree(original / "bundle", folder / "bundle")
    elif way := re.search(r"cannot write (\S+) .*remove what is in the way", error):
        shutil.rmtree(way[1])
    else:
        pytest.fail(f"no remedy is known: {error}")


@pytest.mark.parametrize(("number", "file"), list(enumerate(FILES)))
def test_the_named_remedy_cures(finished_run, tmp_path, capsys, number, file):
    """Each file is damaged in one of the ways, and each way comes several times."""
    config, original = finished_run
    folder = tmp_path / original.name
    shutil.copytree(original, folder)
    DAMAGES[number % len(DAMAGES)](folder / file)
    if file.startswith("bundle/"):
        command = ["generate", "--bundle", str(folder / "bundle"), "a", "--num-images", "1"]
        command += ["--out", str(tmp_path / "images")]
    else:
        command = ["run", "--config", str(config), "--output-dir", str(tmp_path)]
    capsys.readouterr()
    for _ in range(3):
        if main(command) == 0:
            break
        error = capsys.readouterr().err.strip().splitlines()[-1]
        cure(error, folder, original, str(config))
    else:
        pytest.fail(error)
    weights = "tokenizer/model.safetensors", "prior/model.safetensors"
    for name in weights:
        assert (folder / name).read_bytes() == (original / name).read_bytes()


@pytest.mark.parametrize("damage", [Path.unlink, truncate, empty, flip])
def test_settings_are_restored_from_their_backup(finished_run, tmp_path, caplog, damage):
    _, original = finished_run
    stage = tmp_path / "prior"
    stage.mkdir()
    for name in ("settings.json", "settings.backup.json"):
        shutil.copy(original / "prior" / name, stage)
    damage(stage / "settings.json")
    assert read_settings(stage) == read_settings(original / "prior")
    assert "it is restored from settings.backup.json" in caplog.text
    assert (stage / "settings.json").read_bytes() == (
        original / "prior" / "settings.json"
    ).read_bytes()
