"""Terminal output goes through loggers, so that it can be silenced. Library modules print
nothing."""

from __future__ import annotations

import ast
import logging
import sys
import warnings
from pathlib import Path
from typing import get_args

import pytest
from tqdm import tqdm

from pipeline.cli.log import PACKAGES, logging_to_terminal
from pipeline.cli.main import COMMANDS, main
from pipeline.cli.options import LogLevel, parse_options
from pipeline.data.readers import scan
from pipeline.training import trainer
from tests.helpers.cli import fails

ROOT = Path(__file__).parents[3]
LIBRARY = [
    path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
    if not path.is_relative_to(ROOT / "pipeline" / "cli")
]
LEVELS = get_args(LogLevel)
OURS = logging.getLogger("pipeline.of.this.test")
LOGGERS = [logging.getLogger(name) for name in PACKAGES]
PROGRESS = "images to train on"


@pytest.fixture
def encode_command(monkeypatch):
    """`minidalle encode` does what it is given here."""

    def does(work):
        monkeypatch.setitem(COMMANDS, "encode", lambda: work() or 0)
        return lambda *options: main(["encode", *options])

    return does


def given_settings(*, settings: list[str]) -> None:
    """A command that takes settings."""


def printing(tree: ast.AST) -> list[int]:
    """Lines that print, by themselves or by accelerate or tqdm."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and (
            ast.unparse(node.func) in ("print", "print_rank0")
            or (
                isinstance(node.func, ast.Attribute)
                and (
                    node.func.attr == "print"
                    or ast.unparse(node.func).endswith(("tqdm.write", "bar.write", "stdout.write"))
                )
            )
        )
    ]


def test_print_call_detector_finds_calls():
    code = "print(1)\naccelerator.print(1)\ntqdm.write('')\nself.bar.write('')\nfile.write('')\n"
    assert printing(ast.parse(code)) == [1, 2, 3, 4]


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_library_modules_do_not_print(path):
    assert printing(ast.parse(path.read_text())) == []


@pytest.mark.slow
def test_log_level_silences_training(tiny_yaml, capsys):
    command = ["train-tokenizer", "--config", str(tiny_yaml)]
    assert main([*command, "--name", "loud"]) == 0
    said = capsys.readouterr()
    assert PROGRESS in said.out and "tokenizer: 100%" in said.err
    assert main([*command, "--log-level", "warning", "--name", "quiet"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("wrote ") and PROGRESS not in said.err
    assert "tokenizer:" not in said.err


@pytest.mark.slow
def test_the_level_silences_progress_bars(finished_run, tmp_path, capsys, monkeypatch):
    """Those of encoding and of reading images, too."""
    monkeypatch.setattr(scan, "_SLOW", 3)
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(b"x")
    config = ["--config", str(finished_run[0])]
    encode = ["encode", *config, "--tokenizer", str(finished_run[1] / "tokenizer")]
    read = ["doctor", str(folder), "--output_dir", str(tmp_path / "runs")]
    for command in (encode, read):
        for level, shown in (("info", True), ("warning", False)):
            main([*command, "--out", str(tmp_path / command[0] / level), "--log-level", level])
            assert ("%|" in capsys.readouterr().err) is shown, (command, level)


@pytest.mark.slow
def test_library_is_silent_without_logging_setup(tiny_yaml, capsys, caplog):
    from pipeline.config.load import load_experiment
    from pipeline.stages.tokenizer import train_tokenizer

    trained = lambda name: train_tokenizer(  # noqa: E731
        load_experiment(["--config", str(tiny_yaml), "--name", name])
    )
    with caplog.at_level(logging.INFO):
        trained("loud")
        assert PROGRESS in caplog.text
        caplog.clear()
        caplog.set_level(logging.WARNING, "pipeline")
        trained("quiet")
        assert caplog.text == ""
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("level", LEVELS)
def test_each_log_level_shows_itself_and_higher_levels(encode_command, capsys, level):
    def work():
        for name in LEVELS:
            OURS.log(getattr(logging, name.upper()), f"100% of {name}")

    assert encode_command(work)("--log_level", level) == 0
    said, shown = capsys.readouterr(), LEVELS[LEVELS.index(level) :]
    assert said.out.splitlines() == [f"100% of {n}" for n in LEVELS[:2] if n in shown]
    assert said.err.splitlines() == [f"{n}: 100% of {n}" for n in LEVELS[2:] if n in shown]


def test_own_warnings_are_one_line_and_others_unchanged(encode_command, capsys):
    def work():
        warnings.warn_explicit("too few", UserWarning, trainer.__file__, 92)
        warnings.warn_explicit("too old", UserWarning, "elsewhere.py", 7)

    shown = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, category, filename, line, *_: sys.stderr.write(
            f"{filename}:{line}: {category.__name__}: {message}\n"
        )
        assert encode_command(work)() == 0
        err = capsys.readouterr().err
        assert err == "warning: too few\nelsewhere.py:7: UserWarning: too old\n"
        assert encode_command(work)("--log-level=error") == 0
        assert capsys.readouterr().err == "elsewhere.py:7: UserWarning: too old\n"
        work()
        assert f"{trainer.__file__}:92: UserWarning: too few" in capsys.readouterr().err
    assert warnings.showwarning is shown


@pytest.mark.slow
def test_first_batch_warning_is_one_line(tiny_yaml, capsys):
    options = ["--tokenizer.model.num_codes", "512", "--tokenizer.train.steps", "1"]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main(["train-tokenizer", "--config", str(tiny_yaml), *options]) == 0
    err = capsys.readouterr().err
    assert "warning: codes start as copies: the first batch has" in err
    assert "UserWarning" not in err and ".py" not in err


@pytest.mark.parametrize("given", [["--log-level", "loud"], ["--log-level=loud"]])
def test_an_unknown_level_is_one_error_that_names_the_four(capsys, given):
    message = "--log-level is 'loud'; choose one of: debug, info, warning, error\n"
    fails(capsys, ["estimate", "--config", "no.yaml", *given], message, status=2)
    message = "--log-level is ''; choose one of: debug, info, warning, error\n"
    fails(capsys, ["estimate", "--log-level", ""], message, status=2)
    fails(capsys, ["estimate", "--log_level"], "--log-level: expected one argument", status=2)


def test_log_level_is_accepted_anywhere_before_double_hyphen():
    level = lambda *given: parse_options("encode", given_settings, given)["log_level"]  # noqa: E731
    assert level("--a", "b", "--log-level", "debug", "--c", "d") == "debug"
    assert level("--log_level=error", "--x_y", "1") == "error"
    assert level("--", "--log-level", "x") == "info"
    assert level("--log-level", "debug", "--log-level", "error") == "error"


def test_help_names_the_option(capsys):
    assert main(["--help"]) == 0 and "--log-level" in capsys.readouterr().out


def test_lines_are_logged_once_and_logging_is_restored(encode_command, capsys):
    state = lambda: [(one.handlers, one.level, one.propagate) for one in LOGGERS]  # noqa: E731
    before = state()

    def again():
        OURS.info("inside")
        with logging_to_terminal("info"):
            OURS.info("deep inside")

    runs = encode_command(again)
    for _ in range(2):
        assert runs() == 0
        assert capsys.readouterr().out == "inside\ndeep inside\n"
    assert state() == before
    OURS.info("outside")
    assert capsys.readouterr().out == ""


def test_only_the_first_process_logs(encode_command, capsys, monkeypatch, caplog):
    def work():
        trainer._log.info("going on")
        trainer._log.warning("a jump")
        trainer._log.error("broken")

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("pipeline.runtime.distributed.destroy_process_group", lambda: None)
    assert encode_command(work)() == 0
    assert capsys.readouterr() == ("", "error: broken\n")
    caplog.set_level(logging.INFO, "pipeline")
    work()
    assert caplog.messages == ["broken"]


def test_log_line_is_above_the_progress_bar(encode_command, capsys):
    def work():
        with tqdm(total=2, desc="steps", file=sys.stderr, ncols=40) as bar:
            OURS.warning("a jump")
            bar.update(2)

    assert encode_command(work)() == 0
    assert "warning: a jump" in capsys.readouterr().err.replace("\r", "\n").splitlines()
