"""Reads an experiment from YAML and dotted overrides, and names every problem at once. Knows
jsonargparse; no stage."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import tempfile
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.config.describe import all_settings
from pipeline.config.experiment import Experiment, flat, relation_problems
from pipeline.config.inheritance import inherited_config
from pipeline.config.option_names import has_config, spelled
from pipeline.config.train import TrainConfig
from pipeline.config.yaml_file import parse_yaml, read_yaml

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

T = TypeVar("T")


def parser() -> ArgumentParser:
    """The jsonargparse parser of an `Experiment`: `--config FILE` and dotted overrides."""
    from jsonargparse import ActionConfigFile, ArgumentParser

    result = ArgumentParser(prog="minidalle", exit_on_error=False, allow_abbrev=False)
    result.add_argument("--config", action=ActionConfigFile)
    result.add_class_arguments(Experiment, nested_key=None)
    return result


def load_experiment(arguments: Sequence[str]) -> Experiment:
    """Reads `["--config", FILE, "--prior.train.steps", "500", ...]`; `--prior.train.batch-size` is
    `--prior.train.batch_size`.

    Raises:
        ValueError: every unknown key, wrong type and broken relation at once.
        FileNotFoundError: there is no such configuration file.
    """
    from jsonargparse import ArgumentError

    arguments = spelled(arguments, "_")
    given = _given_settings(arguments)
    if not has_config(arguments):
        raise ValueError(
            "no configuration was given; add --config configs/shapes.yaml (or your own copy of it)"
        )
    if _is_unsafe(given):
        raise ValueError("\n".join(_every_problem(given)))
    try:
        values = _parsed(arguments)
    except (ArgumentError, RecursionError) as error:
        raise ValueError("\n".join(_every_problem(given) or [_first_line(error)])) from error
    if inherited := inherited_config(values):
        with _as_file(inherited) as path:
            try:
                values = _parsed(["--config", path, *arguments])
            except ArgumentError as error:
                raise ValueError(
                    "the settings of what init_from names do not fit this version "
                    f"({_first_line(error)}); fine-tune with the version that made it, or give "
                    "another init_from"
                ) from error
    if "tokenizer.model.image_size" not in given:  # it follows the data's
        values["tokenizer"]["model"]["image_size"] = values["data"]["image_size"]
    return from_dict(Experiment, values)


def _parsed(arguments: Sequence[str]) -> dict[str, Any]:
    """The experiment as plain values, defaults included."""
    values: dict[str, Any] = parser().parse_args(arguments).clone().as_dict()
    values.pop("config", None)
    return values


def load_values(values: Mapping[str, Any], arguments: Sequence[str]) -> Experiment:
    """As `load_experiment`, of settings that are in no file."""
    with _as_file(values) as path:
        return load_experiment(["--config", path, *arguments])


@contextmanager
def _as_file(values: Mapping[str, Any]) -> Iterator[str]:
    import yaml

    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(dict(values), file)
        file.flush()
        yield file.name


def from_dict(kind: type[T], values: Mapping[str, Any]) -> T:
    """Builds nested dataclasses from plain values; ValueError lists the problems of all of them,
    not of the first."""
    problems: list[str] = []
    built = _build(kind, values, "", problems)
    if problems or built is None:
        raise ValueError("\n".join(problems))
    return built


def _build(kind: type[T], values: Mapping[str, Any], path: str, problems: list[str]) -> T | None:
    """The dataclass; None where it or a part of it is broken, which `problems` tells."""
    hints = typing.get_type_hints(kind)
    problems += _unknown([f"{path}{key}" for key in sorted(set(values) - set(hints))])
    arguments = {
        name: _built_value(hints[name], value, f"{path}{name}.", problems)
        for name, value in values.items()
        if name in hints
    }
    if any(
        value is None and dataclasses.is_dataclass(hints[name]) for name, value in arguments.items()
    ):
        if kind is Experiment:
            with suppress(KeyError):  # values that leave defaults out cannot be compared
                problems += relation_problems(values)
        return None
    try:
        return kind(**arguments)
    except (ValueError, TypeError) as error:
        text = str(error)
        if issubclass(kind, TrainConfig) and path:  # it does not know whose it is
            text = re.sub(r"\btrain\.", path, text)
        problems.append(text)
        return None


def _built_value(hint: Any, value: Any, path: str, problems: list[str]) -> Any:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _build(hint, value, path, problems)
    if not isinstance(value, list):
        return value
    inner = next(iter(typing.get_args(hint)), None)
    if isinstance(inner, type) and dataclasses.is_dataclass(inner):
        built = [_build(inner, one, f"{path}{i}.", problems) for i, one in enumerate(value)]
        return [one for one in built if one is not None]
    return tuple(value) if typing.get_origin(hint) is tuple else value


def _given_settings(arguments: Sequence[str]) -> dict[str, object]:
    """The settings that the user gave, in files and on the command line, by dotted name; the last
    one of each counts.

    Raises:
        ValueError: a file is no YAML, or holds no settings.
        FileNotFoundError: there is no such file.
    """
    leaves: dict[str, object] = {}
    pairs = iter(arguments)
    for argument in pairs:
        key, equals, value = argument.removeprefix("--").partition("=")
        value = value if equals else next(pairs, "")
        if key == "config":
            loaded = read_yaml(Path(value))
            if not isinstance(loaded, dict):
                raise ValueError(f"{value} holds no settings; see configs/shapes.yaml for the form")
            leaves.update(flat(loaded))
        else:
            section = _section(value)
            leaves.update({key: value} if section is None else flat({key: section}))
    return leaves


def _section(text: str) -> dict[str, object] | None:
    """A section of settings that is given as one JSON or YAML mapping; None for other values."""
    try:
        value = parse_yaml(text) if text.lstrip().startswith("{") else None
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _is_unsafe(given: Mapping[str, object]) -> bool:
    """Whether the parser would open a file or import a module that the settings name. It takes a
    text for a file where a section is needed, and imports what a section names as `class_path`, or
    what stands as a text in a list of sections."""
    hints = _hints(Experiment)
    parents = [name.split(".")[:-1] for name in hints]
    sections = {".".join(own[:n]) for own in parents for n in range(1, len(own) + 1)}
    lists = tuple(name for name, hint in hints.items() if _is_list_of_sections(hint))
    return any(
        not {"class_path", "init_args"}.isdisjoint(name.split("."))
        or (name in sections and value != {})
        or (name.startswith(lists) and not (name in lists and _are_sections(value)))
        for name, value in given.items()
    )


def _is_list_of_sections(hint: Any) -> bool:
    return any(dataclasses.is_dataclass(inner) for inner in typing.get_args(hint))


def _are_sections(value: object) -> bool:
    """Whether a value is a list of sections of settings, or one as YAML."""
    try:
        entries = parse_yaml(value) if isinstance(value, str) else value
    except ValueError:
        return False
    return isinstance(entries, list) and all(
        isinstance(entry, dict) and not {"class_path", "init_args"} & set(entry)
        for entry in entries
    )


def _every_problem(given: Mapping[str, object]) -> list[str]:
    """Checks each setting alone, since the parser stops at the first that is wrong."""
    from jsonargparse import ArgumentError, ArgumentParser

    kinds = {setting.name: setting.kind for setting in all_settings()}
    hints = _hints(Experiment)
    problems = []
    unknown = []
    for key, value in given.items():
        # On one line, whatever the value holds.
        text = value if isinstance(value, str) and value.isprintable() else json.dumps(value)
        if key in hints and _is_list_of_sections(hints[key]) and not _are_sections(value):
            problems.append(f"{key} is {text}; it must be a list of sections: [{{source: FOLDER}}]")
        elif key in hints:
            reader = ArgumentParser(exit_on_error=False)
            reader.add_argument("--value", type=hints[key])
            try:
                reader.parse_args([f"--value={text}"])
            except (ArgumentError, RecursionError) as error:
                why = f" ({_first_line(error)})" if isinstance(value, list) else ""
                problems.append(f"{key} is {text[:_LONG]}; it must be {kinds[key]}{why}")
        elif not any(name.startswith(f"{key}.") for name in hints):
            unknown.append(key)
        elif value != {}:
            problems.append(f"{key} is {text}; it must be a section of settings")
    return problems + _unknown(unknown)


_LONG = 200
"""Characters of a value that an error shows."""
_NAMED = 10
"""Unknown names that an error lists."""
_LONGEST = 100
"""Characters of a name by which the nearest setting is looked for."""


def _unknown(names: Sequence[str]) -> list[str]:
    """That there are no such settings, and for the first ones the setting with the nearest name."""
    known = [setting.name for setting in all_settings()] if names else []
    found = []
    for name in names[:_NAMED]:
        near = difflib.get_close_matches(name[:_LONGEST], known, n=1, cutoff=0.7)
        hint = f"did you mean {near[0]}?" if near else "`minidalle run --help` lists all settings"
        found.append(f"{name} is not a setting; {hint}")
    if len(names) > _NAMED:
        more = len(names) - _NAMED
        found.append(f"{more} more names are no settings; `minidalle run --help` lists all")
    return found


def _hints(kind: type, path: str = "") -> dict[str, Any]:
    """The type of each setting, by dotted name."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(kind).items():
        section = dataclasses.is_dataclass(hint)
        found |= _hints(hint, f"{path}{name}.") if section else {f"{path}{name}": hint}
    return found


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
