"""YAML of settings is text, numbers, lists and sections, of a bounded size with all aliases."""

from __future__ import annotations

import os

import pytest
import yaml

from pipeline.config.load import load_experiment
from pipeline.config.yaml_file import MAX_BYTES, parse_yaml, read_yaml


def bomb(first: str, entry: str) -> str:
    """Each line doubles the one before."""
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{n}: &a{n} {entry.format(f'*a{n - 1}')}" for n in range(1, 40)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(bomb("[x]", "[{0}, {0}]"), "more than 100,000 values", id="lists"),
        pytest.param(bomb("{x: 1}", "{{x: {0}, y: {0}}}"), "more than 100,000 values", id="maps"),
        pytest.param("data: &d {source: *d}", "more than 50 deep", id="itself"),
        pytest.param("a: &a [*a]", "more than 50 deep", id="list in itself"),
        pytest.param("{" * 10_000, "more than 50 deep", id="braces"),
        pytest.param("- " * 5_000, "more than 50 deep", id="lists of one"),
        ("name: 2001-01-01", r"name is a date \(2001-01-01\); put it in quotes"),
        ("name: 2001-99-99", "month must be in 1..12"),
        ("name: !!binary AAAA", "name is a bytes"),
        ("data: !!set {source}", "data is a set"),
        ("? [a, b]\n: 1", "unhashable key|has the name"),
        ("null: 1", "the file has the name None"),
        (
            'data: {"a\\nb is fine": 1}',
            r"data has the name 'a\\nb is fine'; name settings by words",
        ),
        ("data: {image_size: " + "9" * 5000 + "}", "digits"),
        ("data: !!python/object/apply:os.system [x]", "could not determine a constructor"),
    ],
)
def test_what_is_no_settings_is_refused_in_one_line(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_yaml(text)
    assert "\n" not in str(caught.value)


def test_a_value_makes_no_line_of_its_own_in_a_message(tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text('prior: {train: {steps: "a\\nall is well"}}')
    with pytest.raises(ValueError, match=r'steps is "a\\nall is well"; it must be int') as caught:
        load_experiment(["--config", str(config)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["1.5", "[]", "[{steps: 7}]", "a"])
def test_a_section_is_a_section(tmp_path, value):
    config = tmp_path / "a.yaml"
    config.write_text(f"tokenizer: {value}")
    with pytest.raises(ValueError, match=r"tokenizer is .*; it must be a section of settings"):
        load_experiment(["--config", str(config)])


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo.yaml")
    for path in (tmp_path / "fifo.yaml", tmp_path):
        with pytest.raises(ValueError, match="is no regular file; give a file of settings"):
            read_yaml(path)
    long = tmp_path / "long.yaml"
    long.write_text("#" * (MAX_BYTES + 1))
    with pytest.raises(ValueError, match=r"has 1,048,577 bytes.* at most 1,048,576"):
        read_yaml(long)
    long.write_bytes(b"name: \xff")
    with pytest.raises(ValueError, match=r"long.yaml is not readable YAML: .*utf-8"):
        read_yaml(long)


@pytest.mark.parametrize(
    ("text", "content"), [("data: {}", "source: shapes"), ("prior: {{train: {}}}", "steps: 7")]
)
def test_a_section_is_read_from_no_other_file(tmp_path, text, content):
    """The parser of settings takes a path for a file of the section's settings."""
    (tmp_path / "secret.yaml").write_text(content)
    config = tmp_path / "a.yaml"
    config.write_text(text.format(tmp_path / "secret.yaml"))
    with pytest.raises(ValueError, match=r"secret.yaml; it must be a section of settings"):
        load_experiment(["--config", str(config)])


@pytest.mark.parametrize(
    "entry", ["attacker.Part", "{class_path: attacker.Part}", "{class_path: attacker.Part, a: 1}"]
)
def test_settings_import_no_code(tmp_path, monkeypatch, entry):
    """The parser of settings imports the classes that a list of sections names."""
    (tmp_path / "attacker.py").write_text("raise SystemExit('code ran')")
    monkeypatch.syspath_prepend(tmp_path)
    config = tmp_path / "a.yaml"
    config.write_text(f"data: {{mix: [{entry}]}}")
    shipped = ["--config", "configs/shapes.yaml"]
    for arguments in (
        ["--config", str(config)],
        [*shipped, "--data.mix", f"[{entry}]"],
        [*shipped, f"--data.mix=[{entry}]"],
    ):
        with pytest.raises(ValueError, match=r"data.mix is .*; it must be a list of sections"):
            load_experiment(arguments)
    with pytest.raises(ValueError, match=r"data.mix\+\S* is not a setting"):
        load_experiment([*shipped, "--data.mix+", entry])


@pytest.mark.parametrize("section", ["prior.train", "data", "tokenizer.model.vq"])
def test_no_section_names_code(tmp_path, section, monkeypatch):
    """A module that is named is not imported."""
    (tmp_path / "imported_by_settings.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    inner: object = {"class_path": "imported_by_settings.Name"}
    for name in reversed(section.split(".")):
        inner = {name: inner}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(inner))
    with pytest.raises(ValueError, match=rf"{section}.class_path is not a setting"):
        load_experiment(["--config", str(tmp_path / "x.yaml")])


def test_many_unknown_names_are_counted(tmp_path):
    (tmp_path / "x.yaml").write_text("".join(f"k{i}: {i}\n" for i in range(2000)))
    with pytest.raises(ValueError, match=r"k9 is not a setting.*\n1990 more names are no settings"):
        load_experiment(["--config", str(tmp_path / "x.yaml")])


def test_a_value_of_many_brackets_is_refused(tmp_path):
    (tmp_path / "x.yaml").write_text("data: {source: shapes}\n")
    with pytest.raises(ValueError, match=r"prior\.train\.steps is"):
        load_experiment(["--config", str(tmp_path / "x.yaml"), "--prior.train.steps", "[" * 9000])
