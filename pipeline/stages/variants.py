"""Several experiments in one YAML, and whether the folder of each is done. Knows settings and
folders; trains nothing.

The YAML is an experiment's with more keys: `variants` maps the name of each experiment to the
settings in which it differs, and a command may have options of its own.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.config.data import data_settings, settings_by_place
from pipeline.config.experiment import Experiment, to_dict, with_section_defaults
from pipeline.config.json_file import read_json
from pipeline.config.load import load_values
from pipeline.config.yaml_file import read_yaml
from pipeline.runtime.atomic_io import atomic_write_text
from pipeline.runtime.log import on_main_process
from pipeline.stages.manifest import encode_settings

_log = logging.getLogger(__name__)
_log.addFilter(on_main_process)

METRICS = "metrics.json"
"""In a variant's folder, once it is done: its metrics, and the settings that it was made with."""
_PLAN = "plan.json"
read_record = partial(read_json, remedy="remove it, and it is made again")
"""Reads one of the JSON files in a variant's folder."""
SHARED_SETTINGS = ("seed", "data", "encode", "text", "sequence", "prior", "precision")
"""Settings that must be the same for rows of one table of tokenizers."""


@dataclass(frozen=True)
class Variants:
    """One experiment per variant, in order. The run folder of each is FOLDER/NAME."""

    experiments: dict[str, Experiment]
    options: dict[str, Any]
    """The command's own keys; None where they are absent."""

    @property
    def folder(self) -> Path:
        return Path(next(iter(self.experiments.values())).output_dir)


def load_variants(
    arguments: Sequence[str],
    options: Sequence[str],
    example: str,
    check: Callable[[Experiment, Mapping[str, Any]], None],
) -> Variants:
    """Reads `["--config", FILE, "--OPTION", "8", "--tokenizer.train.steps", "500", ...]`; what is
    given here holds for every variant.

    Args:
        options: the command's own keys, in the file or among the arguments.
        example: a shipped YAML, for messages.
        check: (variant, settings in which it differs), raises ValueError where the command cannot
            use it.

    Raises:
        ValueError: the file has no variants, or one is no valid experiment; names it.
        FileNotFoundError: there is no such file.
    """
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("config", *options):
        reader.add_argument(f"--{name}", f"--{name.replace('_', '-')}", dest=name)
    given, settings = reader.parse_known_args(arguments)
    if given.config is None:
        raise ValueError(
            f"no configuration was given; add --config {example} (or your own copy of it)"
        )
    shared = _read_yaml(Path(given.config), example)
    changes = shared.pop("variants")
    own = {name: shared.pop(name, None) for name in options}
    own |= {name: value for name in options if (value := getattr(given, name)) is not None}
    experiments = {}
    problems = {}
    for name, changed in changes.items():
        try:
            experiment = _variant(str(name), shared, changed or {}, settings)
            check(experiment, changed or {})
            experiments[str(name)] = experiment
        except ValueError as error:
            problems[name] = str(error)
    if len(problems) == len(changes) > 1 and len(set(problems.values())) == 1:
        raise ValueError(problems.popitem()[1])  # of what all share
    if problems:
        raise ValueError("\n".join(f"variant {name}: {text}" for name, text in problems.items()))
    return Variants(experiments, own)


def _read_yaml(file: Path, example: str) -> dict[str, Any]:
    """A file with a mapping of `variants` in it."""
    values: Any = read_yaml(file)
    variants = values.get("variants") if isinstance(values, dict) else None
    if (
        not isinstance(variants, dict)
        or not variants
        or not all(isinstance(row, dict | None) for row in variants.values())
    ):
        raise ValueError(
            f"{file} has no 'variants' to compare; it needs a mapping of names to settings, see "
            f"{example}"
        )
    return values


def checked_minutes(given: str | float) -> float:
    """Minutes from a file or a command line; raises ValueError where they are none."""
    try:
        minutes = float(given)
    except (TypeError, ValueError):
        raise ValueError(f"minutes is {given!r}; it must be a number") from None
    if not (minutes > 0 and math.isfinite(minutes)):
        raise ValueError(f"minutes is {minutes}; it must be above 0 and finite")
    return minutes


def _variant(
    name: str, shared: Mapping[str, Any], changes: Mapping[str, Any], settings: Sequence[str]
) -> Experiment:
    """The experiment of a variant; its run folder is OUTPUT_DIR/SHARED_NAME/NAME."""
    refuse_changes(("name", "output_dir"), changes, "a variant's name is its own")
    experiment = load_values(_merged(shared, changes), settings)
    return replace(experiment, name=name, output_dir=str(experiment.folder))


def refuse_changes(fixed: Sequence[str], changes: Mapping[str, Any], reason: str) -> None:
    """Raises ValueError where a variant changes one of the `fixed` settings."""
    if changed := set(fixed) & set(changes):
        raise ValueError(
            f"{', '.join(sorted(changed))} cannot differ between variants; {reason}, so set it "
            "for all"
        )


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, section by section."""
    merged = dict(base)
    for key, value in changes.items():
        inner = merged.get(key)
        merged[key] = (
            _merged(inner, value)
            if isinstance(inner, Mapping) and isinstance(value, Mapping)
            else value
        )
    return merged


def made_with(experiment: Experiment, options: Mapping[str, object]) -> dict[str, Any]:
    """All that the metrics of a variant depend on; `options` are the command's own."""
    settings = {
        **to_dict(experiment),
        "data": data_settings(to_dict(experiment.data)),
        "encode": encode_settings(experiment),
    }
    return {**{key: settings[key] for key in (*SHARED_SETTINGS, "tokenizer")}, **options}


def differing_settings(
    made: Mapping[str, Any], now: Mapping[str, Any], keys: Sequence[str]
) -> list[str]:
    """The settings that differ; two spellings of one path do not."""

    def same(key: str) -> bool:
        both = [made.get(key), now.get(key)]
        if key == "data" and None not in both:
            both = [settings_by_place(one) for one in both if one is not None]
        return both[0] == both[1]

    return [key for key in keys if not same(key)]


def is_done(experiment: Experiment, options: Mapping[str, object]) -> bool:
    """Whether a variant has its metrics.

    Raises:
        ValueError: its folder was made with other settings.
    """
    path = experiment.folder / METRICS
    now = made_with(experiment, options)
    written = read_record(path) if path.is_file() else read_plan(experiment.folder)
    made = with_section_defaults(written["made_with"]) if written else now
    if differing := differing_settings(made, now, sorted(now)):
        raise ValueError(
            f"{experiment.folder} was made with other settings ({', '.join(differing)}); choose "
            "another name for this comparison, or move that folder away"
        )
    return path.is_file()


def read_plan(folder: Path) -> dict[str, Any] | None:
    """What an earlier attempt chose for a variant."""
    return read_record(folder / _PLAN) if (folder / _PLAN).is_file() else None


def write_plan(
    experiment: Experiment, options: Mapping[str, object], plan: Mapping[str, Any]
) -> None:
    """Writes what was chosen for a variant, and its settings, into its folder."""
    written = {**plan, "made_with": made_with(experiment, options)}
    atomic_write_text(experiment.folder / _PLAN, json.dumps(written))


def write_record(
    experiment: Experiment, options: Mapping[str, object], metrics: Mapping[str, Any]
) -> None:
    """Writes a variant's metrics and settings into its folder, which marks it as done."""
    content = {"metrics": metrics, "made_with": made_with(experiment, options)}
    atomic_write_text(experiment.folder / METRICS, json.dumps(content, indent=2) + "\n")


def run_each(
    experiments: Mapping[str, Experiment],
    run: Callable[[Experiment], object],
    record_failure: Callable[[Experiment, dict[str, Any]], None],
) -> None:
    """Runs one variant after another. One whose loss is not finite is recorded as failed, and the
    others go on.

    Raises:
        ValueError: a variant cannot be run; names it.
    """
    for name, experiment in experiments.items():
        _log.info(f"== {name}")
        # Graphs of other variants count against torch.compile's limit of shapes per network.
        torch.compiler.reset()
        try:
            run(experiment)
        except FloatingPointError as error:
            record_failure(experiment, {"failed": str(error)})
            _log.error(f"{name} failed: {error}")
        except ValueError as error:
            raise ValueError(f"variant {name}: {error}") from error
