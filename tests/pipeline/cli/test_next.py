"""What a command says to run next works as it is printed."""

from __future__ import annotations

import re
import shlex

import pytest

from pipeline.cli.main import main
from tests.helpers.data import encoded

pytestmark = pytest.mark.slow


def next_command(text: str) -> list[str]:
    (line,) = re.findall(r"(?m)^next: minidalle (.*)$", text)
    return shlex.split(line)


def test_each_hint_of_a_run_works_as_printed(finished_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["train-tokenizer", "--config", str(finished_run[0])]
    names = []
    while command[0] != "generate":
        names.append(command[0])
        capsys.readouterr()
        assert main(command) == 0
        command = next_command(capsys.readouterr().out)
    assert names == ["train-tokenizer", "encode", "train-prior"]
    assert main(command) == 0
    assert len(list((tmp_path / "images").glob("0*.png"))) == 4


def test_codes_without_captions_hint_at_no_prior(tiny_yaml, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for i in range(24):
        (tmp_path / "images" / f"{i:02}.png").write_bytes(encoded((9 * i, 0, 0), size=(32, 32)))
    data = ["--data.source", str(tmp_path / "images"), "--data.val_fraction", "0.3"]
    command = ["train-tokenizer", "--config", str(tiny_yaml), *data]
    assert main(command) == 0, capsys.readouterr().err
    assert main(next_command(capsys.readouterr().out)) == 0
    printed = capsys.readouterr().out
    assert "the images have no captions, which a prior needs" in printed
    assert "next: " not in printed


def test_an_unconditional_prior_hints_at_an_empty_prompt(tiny_yaml, tmp_path, monkeypatch, capsys):
    """And the folder of its run has a space in its name."""
    monkeypatch.chdir(tmp_path)
    options = ["--tokenizer.model.quantizer=gaussian", "--output_dir", str(tmp_path / "my runs")]
    assert main(["run", "--config", str(tiny_yaml), *options]) == 0, capsys.readouterr().err
    command = next_command(capsys.readouterr().out)
    assert "" in command
    assert main(command) == 0
    assert len(list((tmp_path / "images").glob("0*.png"))) == 4
