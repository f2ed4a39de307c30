"""Options of the commands: all of them are described, either spelling is taken, and what is wrong
is one line."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cli.main import COMMANDS, main
from pipeline.cli.options import parse_options
from pipeline.config.describe import all_settings
from pipeline.config.experiment import Experiment
from tests.helpers.cli import fails
from tests.helpers.experiments import settings

ROOT = Path(__file__).parents[3]
EVERY_COMMAND = pytest.mark.parametrize("command", COMMANDS)


def options_in_help(text: str) -> dict[str, str]:
    """Options and what the help says of each."""
    return dict(re.findall(r"(?m)^  (--[\w.-]+)[^\n]*?(?:\n {10,}|  +)(\S.*)$", text))


@EVERY_COMMAND
def test_help_describes_every_option(command, capsys):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    found = options_in_help(text)
    parameters = inspect.signature(COMMANDS[command]).parameters.values()
    names = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "settings"]
    for name in [*names, "log_level", "traceback"]:
        assert found[f"--{name.replace('_', '-')}"]
    assert re.findall(r"--[a-z.-]*_[a-z_.]*", text) == []


def test_help_describes_every_setting(capsys):
    assert main(["run", "--help"]) == 0
    found = options_in_help(capsys.readouterr().out)
    sections = {name.rpartition(".")[0] for name in settings(Experiment)}
    for name in settings(Experiment) - sections:
        assert found[f"--{name.replace('_', '-')}"]


def test_defaults_and_choices_of_settings_are_described():
    found = {setting.name: setting for setting in all_settings()}
    assert found["prior.train.steps"][1:] == ("int", "1000", "Optimizer steps in all.")
    assert found["data.crop"].kind == "'centre' | 'random'"
    assert "'raster'" in found["prior.train.code_order"].kind
    assert found["data.mix"].default == ""


def test_help_of_every_command_imports_nothing_heavy():
    code = (
        "import sys; from pipeline.cli.main import COMMANDS, main\n"
        "assert not any(main([command, '--help']) for command in COMMANDS)\n"
        "assert not {'torch', 'transformers', 'datasets', 'jsonargparse'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)


def test_help_says_nothing_of_the_code(capsys):
    for command in COMMANDS:
        main([command, "--help"])
        assert "parameters as options" not in " ".join(capsys.readouterr().out.split()), command


@pytest.mark.parametrize("given", [["--num_images", "2"], ["--num-images=2"], ["--num_images=2"]])
def test_either_spelling_is_the_same_option(given):
    options = parse_options("generate", COMMANDS["generate"], ["--bundle", "b", "a_b", *given])
    assert (options["num_images"], options["prompt"]) == (2, ("a_b",))


def test_settings_are_all_that_is_no_option():
    given = ["--config", "a.yaml", "--out", "b", "--prior.train.batch_size", "2", "--seed", "-1"]
    options = parse_options("evaluate", COMMANDS["evaluate"], given)
    left = ["--config", "a.yaml", "--prior.train.batch-size", "2", "--seed", "-1"]
    assert options["settings"] == left and options["out"] == Path("b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["edit", "--image", "i"], "the following arguments are required: --bundle; see"),
        (["generate", "--bundle", "b", "--num-images", "few"], "--num-images: invalid int value"),
        (["generate", "--bundle", "b", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["generate", "--bundle", "b", "--compile", "no"], "--compile is 'no'; choose one of:"),
        (["generate", "--bundl", "b", "x"], "arguments: --bundl; see minidalle generate --help"),
        (["edit", "--bundle", "b", "--image", "i"], "give one of --mask, --outpaint-at and --stre"),
        (["reconstruct", "--tokenizer", "t"], "required: files"),
        (["compare-tokenizers", "--minutes", "few"], "--minutes: invalid float value: 'few'"),
    ],
)
def test_wrong_options_are_one_line(arguments, message, capsys):
    fails(capsys, arguments, message, status=2)
    main(arguments)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_traceback_shows_where_an_error_arose(tmp_path, capsys):
    command = ["generate", "--bundle", str(tmp_path / "none"), "x"]
    assert main(command) == 1
    line = capsys.readouterr().err
    assert "Traceback" not in line and len(line.splitlines()) == 1
    assert main([*command, "--traceback"]) == 1
    text = capsys.readouterr().err
    assert text.startswith("Traceback") and "read_bundle" in text and text.endswith(line)


def test_a_bug_shows_its_traceback(monkeypatch):
    def broken(*, settings: list[str]) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setitem(COMMANDS, "encode", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["encode"])
