"""Reads an experiment from YAML and dotted overrides, and names every problem at once. Knows
jsonargparse; no stage."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipeline.config.experiment import Experiment, _relations
from pipeline.config.inheritance import inherited_config
from pipeline.config.option_names import spelled
from pipeline.config.train import TrainConfig


def parser() -> Any:
    """The jsonargparse parser of an `Experiment`: `--config FILE` and dotted overrides."""
    from jsonargparse import ActionConfigFile, ArgumentParser

    result = ArgumentParser(
        prog="minidalle",
        exit_on_error=False,
        allow_abbrev=False,
        description="settings of an experiment",
    )
    result.add_argument(
        "--config", action=ActionConfigFile, help="YAML of the experiment, see configs/"
    )
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
    for given, following in pairwise(arguments):
        if given == "--config" and not Path(following).is_file():
            raise FileNotFoundError(
                f"there is no configuration file {following}; the shipped ones are in configs/"
            )
    if "--config" not in arguments and not any(a.startswith("--config=") for a in arguments):
        raise ValueError(
            "no configuration was given; add --config configs/shapes.yaml (or your own copy of it)"
        )
    reader = parser()
    try:
        plain = reader.parse_args(arguments).clone().as_dict()
    except ArgumentError as error:
        raise ValueError("\n".join(_every_problem(arguments) or [_first_line(error)])) from error
    if follow := inherited_config(plain):
        with _as_file(follow) as path:
            try:
                plain = reader.parse_args(["--config", path, *arguments]).clone().as_dict()
            except ArgumentError as error:
                raise ValueError(
                    f"what init_from names was made by another version: {_first_line(error)}"
                ) from error
    plain.pop("config", None)
    if "tokenizer.model.image_size" not in _given_settings(arguments):  # it follows the data's
        plain["tokenizer"]["model"]["image_size"] = plain["data"]["image_size"]
    return from_dict(Experiment, plain)


def load_values(values: dict[str, Any], arguments: Sequence[str]) -> Experiment:
    """As `load_experiment`, of settings that are in no file."""
    with _as_file(values) as path:
        return load_experiment(["--config", path, *arguments])


@contextmanager
def _as_file(values: dict[str, Any]) -> Iterator[str]:
    import yaml

    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(values, file)
        file.flush()
        yield file.name


def from_dict(kind: Any, values: dict[str, Any]) -> Any:
    """Builds nested dataclasses from plain values; ValueError lists the problems of all of them,
    not of the first."""
    problems: list[str] = []
    built = _build(kind, values, "", problems)
    if problems:
        raise ValueError("\n".join(problems))
    return built


def _build(kind: Any, values: dict[str, Any], path: str, problems: list[str]) -> Any:
    hints = typing.get_type_hints(kind)
    unknown = set(values) - set(hints)
    problems += [f"{path}{key} is not a setting" for key in sorted(unknown)]
    arguments = {}
    for name, value in values.items():
        if name in unknown:
            continue
        inner = hints[name]
        if dataclasses.is_dataclass(inner) and isinstance(value, dict):
            arguments[name] = _build(inner, value, f"{path}{name}.", problems)
        elif isinstance(value, list) and any(
            dataclasses.is_dataclass(kind_of) for kind_of in typing.get_args(inner)
        ):
            built = [
                _build(typing.get_args(inner)[0], item, f"{path}{name}.{i}.", problems)
                for i, item in enumerate(value)
            ]
            arguments[name] = [item for item in built if item is not None]
        elif isinstance(value, list) and typing.get_origin(inner) is tuple:
            arguments[name] = tuple(value)
        else:
            arguments[name] = value
    if any(
        value is None and dataclasses.is_dataclass(hints[name]) for name, value in arguments.items()
    ):
        if kind is Experiment:
            with suppress(KeyError):  # values that leave defaults out cannot be compared
                problems += _relations(values)
        return None  # a part is broken and said so already
    try:
        return kind(**arguments)
    except (ValueError, TypeError) as error:
        section = path.rstrip(".").rpartition(".")[0]
        prefix = f"{section}: " if section and issubclass(kind, TrainConfig) else ""
        problems.append(f"{prefix}{error}")
        return None


def _given_settings(arguments: Sequence[str]) -> dict[str, Any]:
    """The settings that the user gave, in files and on the command line, by dotted name; the last
    one of each counts.

    Raises:
        ValueError: a file is no YAML, or holds no settings.
    """
    import yaml

    leaves: dict[str, Any] = {}
    pairs = iter(arguments)
    for argument in pairs:
        key, equals, value = argument.removeprefix("--").partition("=")
        value = value if equals else next(pairs, "")
        if key == "config":
            try:
                loaded = yaml.safe_load(Path(value).read_text())
            except (OSError, yaml.YAMLError) as error:
                raise ValueError(f"{value} is not readable YAML: {_first_line(error)}") from error
            if not isinstance(loaded, dict):
                raise ValueError(f"{value} holds no settings; see configs/shapes.yaml for the form")
            leaves.update(_leaves(loaded))
        else:
            leaves[key] = value
    return leaves


def _every_problem(arguments: Sequence[str]) -> list[str]:
    """Checks each setting alone, since the parser stops at the first that is wrong."""
    from jsonargparse import ArgumentError

    problems = []
    for key, value in _given_settings(arguments).items():
        try:
            # A name makes the rest complete; what is left to complain of is this one setting.
            required = ["--name", "x", "--data.source", "shapes"]
            text = value if isinstance(value, str) else json.dumps(value)
            parser().parse_args([*required, f"--{key}={text}"])
        except ArgumentError as error:
            problems.append(f"{key}: {_first_line(error)}")
    return problems


def _leaves(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= (
            _leaves(value, f"{path}{key}.")
            if isinstance(value, dict) and value
            else {f"{path}{key}": value}
        )
    return flat


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
