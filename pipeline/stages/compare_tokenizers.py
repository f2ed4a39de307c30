"""`compare-tokenizers`: several tokenizers on one data set at equal steps or equal wall time, each
judged by its images and by a prior.

Knows the stages and their metrics. A comparison's YAML is an experiment's with two more keys:
`variants` maps the name of each tokenizer to the settings in which it differs. `minutes`, if given,
is the training time of a tokenizer, in place of its steps.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.config.data import data_settings
from pipeline.config.experiment import Experiment, to_dict, with_section_defaults
from pipeline.config.json_file import read_json
from pipeline.config.load import load_values
from pipeline.runtime.atomic_io import atomic_write_text
from pipeline.runtime.devices import should_compile, uses_bf16
from pipeline.runtime.distributed import make_accelerator
from pipeline.runtime.image_grid import grid_image, make_grid
from pipeline.runtime.log import on_main_process
from pipeline.stages.encode import encode_dataset, sources_of
from pipeline.stages.manifest import encode_settings, read_settings
from pipeline.stages.prior import train_prior
from pipeline.stages.run_lock import run_lock
from pipeline.stages.tokenizer import TokenizerTraining, train_tokenizer
from pipeline.training.checkpoint import newest_checkpoint
from pipeline.training.trainer import fit
from stage1_tokenizer import ImageTokenizer, to_model_range, to_uint8
from stage1_tokenizer.metrics import ssim

_log = logging.getLogger(__name__)
_log.addFilter(on_main_process)

_METRICS = "metrics.json"
_PLAN = "plan.json"
_TIME = "training.json"
_read = partial(read_json, remedy="remove it, and it is made again")
SHARED_SETTINGS = ("seed", "data", "encode", "text", "sequence", "prior", "precision")
"""Settings that must be the same for rows of one table."""
_TRIAL_STEPS = 60
"""Trial steps, to find how many fit into the minutes."""
_ENCODED = 64
"""Images per batch when the encoding rate is measured."""
_SHOWN = 12
"""Validation images whose reconstructions are shown."""
COLUMNS = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "usage": "codebook used",
    "perplexity": "perplexity",
    "distinct_codes": "distinct codes",
    "reencode_agreement": "codes unchanged by re-encoding",
    "bits_per_image": "bits per image",
    "nats_per_image": "nats per image by the prior",
    "minutes": "minutes",
    "steps": "steps",
    "training_rate": "images/s in training",
    "encoding_rate": "images/s encoding",
}
_FORMATS = {"usage": ".1%", "ssim": ".3f", "psnr": ".1f", "minutes": ".1f"}
_FORMATS["reencode_agreement"] = ".1%"


@dataclass(frozen=True)
class Comparison:
    """What is compared: one experiment per row, in order."""

    folder: Path
    variants: dict[str, Experiment]
    minutes: float | None


def load_comparison(arguments: Sequence[str]) -> Comparison:
    """Reads `["--config", FILE, "--minutes", "8", "--tokenizer.train.steps", "500", ...]`; what is
    given here holds for every row.

    Raises:
        ValueError: the file has no variants, or one is no valid experiment; names it.
        FileNotFoundError: there is no such file.
    """
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    reader.add_argument("--config")
    reader.add_argument("--minutes")
    options, settings = reader.parse_known_args(arguments)
    if options.config is None:
        raise ValueError(
            "no configuration was given; add --config configs/bakeoff-emoji.yaml (or your own copy "
            "of it)"
        )
    shared = _read_yaml(Path(options.config))
    changes = shared.pop("variants")
    in_file = shared.pop("minutes", None)
    minutes = _checked_minutes(in_file if options.minutes is None else options.minutes)
    variants = {}
    problems = []
    for name, changed in changes.items():
        try:
            variants[str(name)] = _variant(str(name), shared, changed or {}, settings)
        except ValueError as error:
            problems.append(f"variant {name}: {error}")
    if problems:
        raise ValueError("\n".join(problems))
    return Comparison(Path(next(iter(variants.values())).output_dir), variants, minutes)


def _read_yaml(file: Path) -> dict[str, Any]:
    """A comparison's file, with a mapping of `variants` in it."""
    import yaml

    if not file.is_file():
        raise FileNotFoundError(
            f"there is no configuration file {file}; the shipped ones are in configs/"
        )
    try:
        values = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ValueError(
            f"{file} is not readable YAML: {' '.join(str(error).split())[:300]}"
        ) from error
    variants = values.get("variants") if isinstance(values, dict) else None
    if (
        not isinstance(variants, dict)
        or not variants
        or not all(isinstance(row, dict | None) for row in variants.values())
    ):
        raise ValueError(
            f"{file} has no 'variants' to compare; it needs a mapping of names to settings, see "
            "configs/bakeoff-emoji.yaml"
        )
    return values


def _checked_minutes(given: str | float | None) -> float | None:
    if given is None:
        return None
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
    """The experiment of a row; its run folder is OUTPUT_DIR/COMPARISON/ROW."""
    if fixed := {"name", "output_dir"} & set(changes):
        raise ValueError(
            f"{', '.join(sorted(fixed))} cannot differ between variants; a variant's name is its "
            "own"
        )
    experiment = load_values(_merged(shared, changes), settings)
    if experiment.tokenizer.frozen:
        raise ValueError(
            "tokenizer.frozen is on, and a comparison trains every tokenizer; set it to false"
        )
    experiment.require_codes("compare-tokenizers")
    return replace(experiment, name=name, output_dir=str(experiment.folder))


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


def compare_tokenizers(comparison: Comparison) -> Path:
    """Trains and judges every row that is not done yet, then writes the table and the images;
    returns their folder.

    Raises:
        ValueError: a row was made with other settings, or cannot be trained; raised before any work
            where that can be known.
    """
    due = {
        name: experiment
        for name, experiment in comparison.variants.items()
        if not is_complete(experiment, comparison.minutes)
    }
    for experiment in due.values():
        device = make_accelerator(experiment.folder, [], experiment.process_timeout).device
        for train in (experiment.tokenizer.train, experiment.prior.train):
            should_compile(train, device)
    with run_lock(comparison.folder, next(iter(comparison.variants.values())).process_timeout):
        try:
            for name, experiment in due.items():
                _log.info(f"== {name}")
                # Graphs of other rows count against torch.compile's limit of shapes per network.
                torch.compiler.reset()
                try:
                    run_variant(experiment, comparison.minutes)
                except FloatingPointError as error:
                    write_metrics(experiment, comparison.minutes, {"failed": str(error)})
                    _log.error(f"{name} failed: {error}")
                except ValueError as error:
                    raise ValueError(f"variant {name}: {error}") from error
        finally:
            write_report(comparison)
    return comparison.folder


def _made_with(experiment: Experiment, minutes: float | None) -> dict[str, Any]:
    settings = {
        **to_dict(experiment),
        "data": data_settings(to_dict(experiment.data)),
        "encode": encode_settings(experiment),
    }
    return {**{key: settings[key] for key in (*SHARED_SETTINGS, "tokenizer")}, "minutes": minutes}


def is_complete(experiment: Experiment, minutes: float | None) -> bool:
    """Whether a row has its metrics.

    Raises:
        ValueError: the row was made with other settings.
    """
    path = experiment.folder / _METRICS
    now = _made_with(experiment, minutes)
    written = _read(path) if path.is_file() else _plan(experiment.folder)
    made = with_section_defaults(written["made_with"]) if written else now
    if differing := sorted(key for key in now if made.get(key) != now[key]):
        raise ValueError(
            f"{experiment.folder} was made with other settings ({', '.join(differing)}); choose "
            "another name for this comparison, or remove that folder"
        )
    return path.is_file()


def _plan(folder: Path) -> dict[str, Any] | None:
    """What an earlier attempt chose for a row."""
    return _read(folder / _PLAN) if (folder / _PLAN).is_file() else None


def write_metrics(
    experiment: Experiment, minutes: float | None, metrics: Mapping[str, Any]
) -> None:
    """Writes a row's metrics and settings into its folder."""
    experiment.folder.mkdir(parents=True, exist_ok=True)
    content = {"metrics": metrics, "made_with": _made_with(experiment, minutes)}
    atomic_write_text(experiment.folder / _METRICS, json.dumps(content, indent=2) + "\n")


def run_variant(experiment: Experiment, minutes: float | None) -> dict[str, float]:
    """Trains one tokenizer and a prior on its codes; the metrics, which are also written to the
    row's folder."""
    planned = experiment if minutes is None else _for_minutes(experiment, minutes)
    row = experiment.folder
    resumed = newest_checkpoint(row / "tokenizer" / "checkpoints") is not None
    start = time.perf_counter()
    train_tokenizer(planned)
    if not resumed:  # a training in two parts has no time of its own
        seconds = time.perf_counter() - start
        atomic_write_text(row / _TIME, json.dumps({"seconds": seconds}) + "\n")
    encode_dataset(planned)
    train_prior(planned)
    metrics = _judge(planned)
    write_metrics(experiment, minutes, metrics)
    return metrics


def _for_minutes(experiment: Experiment, minutes: float) -> Experiment:
    """The experiment with as many steps as fit into the minutes, which its plan records.

    It is evaluated only at the end: what evaluations cost differs between tokenizers. It is
    compiled if it was when the pace was measured.
    """
    plan = _plan(experiment.folder)
    steps = plan["steps"] if plan else steps_in_budget(experiment, 60 * minutes)
    experiment.folder.mkdir(parents=True, exist_ok=True)
    written = {"steps": steps, "made_with": _made_with(experiment, minutes)}
    atomic_write_text(experiment.folder / _PLAN, json.dumps(written))
    accelerator = make_accelerator(experiment.folder, [], experiment.process_timeout)
    train = experiment.tokenizer.train
    compiles = should_compile(train, accelerator.device)
    train = replace(train, steps=steps, eval_every=steps, compile="on" if compiles else "off")
    return replace(experiment, tokenizer=replace(experiment.tokenizer, train=train))


def _judge(experiment: Experiment) -> dict[str, float]:
    """Metrics of a row whose stages are done; its first reconstructions are saved."""
    row = experiment.folder
    tokenizer = ImageTokenizer.from_pretrained(row / "tokenizer")
    held_out = (read_settings(row / "tokenizer") or {})["held_out"]
    prior = (read_settings(row / "prior") or {})["held_out"]
    steps = experiment.tokenizer.train.steps
    true, drawn, rate = _reconstructed(experiment, tokenizer)
    np.save(row / "reconstructions.npy", drawn[:_SHOWN], allow_pickle=False)
    layout = tokenizer.layout
    metrics = {
        "psnr": held_out["psnr"],
        "ssim": ssim(true, drawn),
        "usage": held_out["codebook_usage"],
        "perplexity": held_out["codebook_perplexity"],
        "distinct_codes": held_out["distinct_codes"],
        "reencode_agreement": held_out["reencode_agreement"],
        "bits_per_image": sum(level.length * math.log2(level.num_codes) for level in layout),
        "nats_per_image": prior["nats_per_code"] * sum(level.length for level in layout),
        "steps": steps,
        "encoding_rate": rate,
    }
    if (row / _TIME).is_file():
        seconds = _read(row / _TIME)["seconds"]
        metrics |= {
            "minutes": seconds / 60,
            "training_rate": steps
            * experiment.tokenizer.train.resolved_batch("tokenizer")[0]
            / seconds,
        }
    return metrics


def steps_in_budget(experiment: Experiment, seconds: float) -> int:
    """How many steps fit into this time, with start and compilation, by the pace of a few trial
    steps (and of a few with the discriminator, where one joins later)."""
    discriminator = experiment.tokenizer.objective.discriminator
    joins = discriminator.start if discriminator.weight else 0
    before, pace = _seconds_per_step(experiment, discriminator=not joins)
    if joins and before + joins * pace < seconds:
        before, slower = _seconds_per_step(experiment, discriminator=True)
        steps = joins + max(int((seconds - before - joins * pace) / slower), 0)
        return max(steps, 1)
    return max(int((seconds - before) / pace), 1)


def _seconds_per_step(experiment: Experiment, *, discriminator: bool) -> tuple[float, float]:
    """Seconds before the first step and seconds per step, with the discriminator from the start
    or without one."""
    objective = experiment.tokenizer.objective
    changed = (
        replace(objective.discriminator, start=0)
        if discriminator
        else replace(objective.discriminator, weight=0.0)
    )
    objective = replace(objective, discriminator=changed)
    experiment = replace(experiment, tokenizer=replace(experiment.tokenizer, objective=objective))
    train = experiment.tokenizer.train
    accelerator = make_accelerator(experiment.folder, [], experiment.process_timeout)
    sources = sources_of(experiment.data, experiment.folder, experiment.process_timeout)
    training = TokenizerTraining(experiment, accelerator, *sources)
    task = training.task(train.resolved_batch("tokenizer")[0])
    times: list[float] = []

    def timed(step: int) -> object:
        times.append(time.perf_counter())
        return task.batch(step)

    steps = _TRIAL_STEPS
    trial = replace(train, steps=steps, eval_every=steps, save_every=steps, save_best=False)
    with tempfile.TemporaryDirectory() as scratch:
        start = time.perf_counter()
        fit(
            replace(task, batch=timed, sample_images=dict),
            trial,
            accelerator,
            Path(scratch),
            seed=experiment.seed,
            bf16=uses_bf16(experiment.precision, accelerator.device),
            compile_networks=should_compile(train, accelerator.device),
            label="tokenizer",
            seconds_after=None,
        )
    pace = float(np.median(np.diff(times)[steps // 2 :]))
    return times[steps // 2] - start - pace * steps / 2, pace


@torch.no_grad()
def _reconstructed(
    experiment: Experiment, tokenizer: ImageTokenizer
) -> tuple[np.ndarray, np.ndarray, float]:
    """Validation images, their reconstructions, and images/s of encoding (by the quickest of some
    batches)."""
    device = make_accelerator(experiment.folder, [], experiment.process_timeout).device
    _, held_out = sources_of(experiment.data, experiment.folder, experiment.process_timeout)
    true = held_out.images(range(len(held_out))[: experiment.encode.max_val_images])
    tokenizer.to(device)
    drawn = []
    seconds = []
    bf16 = uses_bf16(experiment.precision, device)
    for first in range(0, len(true), _ENCODED):
        pixels = to_model_range(torch.from_numpy(true[first : first + _ENCODED])).to(device)
        drawn.append(to_uint8(tokenizer.decode(tokenizer.encode(pixels))).cpu().numpy())
        for _ in range(5 if len(pixels) == _ENCODED or len(true) < _ENCODED else 0):
            start = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                tokenizer.encode(pixels).cpu()
            seconds.append((time.perf_counter() - start) / len(pixels))
    return true, np.concatenate(drawn), 1 / min(seconds)


def write_report(comparison: Comparison) -> None:
    """Writes `comparison.md`, `comparison.json` and two images: the variants in their order, then
    other rows in the folder. Rows that were judged on other data or by another prior, and rows that
    failed, are named below the table."""
    found = {p.parent.name: _read(p) for p in sorted(comparison.folder.glob(f"*/{_METRICS}"))}
    if not found:
        return
    first = next(iter(comparison.variants.values()))
    base = _made_with(first, comparison.minutes)
    every = {}
    notes = ""
    names = dict.fromkeys([*comparison.variants, *found])
    for name in filter(found.__contains__, names):
        made = with_section_defaults(found[name].get("made_with", {}))
        differing = [key for key in SHARED_SETTINGS if made.get(key) != base[key]]
        if differing and name not in comparison.variants:
            notes += (
                f"\n{name} is left out: it was made with other settings ({', '.join(differing)})\n"
            )
        else:
            every[name] = found[name]["metrics"]
            if "failed" in every[name]:
                notes += (
                    f"\n{name} failed: {every[name]['failed']} (to try it again, remove "
                    f"{comparison.folder / name})\n"
                )
    atomic_write_text(comparison.folder / "comparison.json", json.dumps(every, indent=2) + "\n")
    metrics = {name: row for name, row in every.items() if "failed" not in row}
    atomic_write_text(comparison.folder / "comparison.md", table(metrics) + notes)
    if not metrics:
        return
    shown = [
        np.load(comparison.folder / name / "reconstructions.npy", allow_pickle=False)
        for name in metrics
    ]
    _, held_out = sources_of(first.data, first.folder, first.process_timeout)
    true = held_out.images(range(len(shown[0])))
    alike = [row for row in shown if row.shape == true.shape]  # others may be of another comparison
    grid = make_grid([image for row in [true, *alike] for image in row], columns=len(true))
    grid_image(grid).save(comparison.folder / "reconstructions.png")
    _plot(metrics, comparison.folder / "comparison.png")


def table(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown, one tokenizer per row."""
    lines = [
        "| tokenizer | " + " | ".join(COLUMNS.values()) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for name, row in metrics.items():
        lines.append(
            f"| {name} | " + " | ".join(_cell(key, row.get(key)) for key in COLUMNS) + " |"
        )
    return "\n".join(lines) + "\n"


def _cell(key: str, value: float | None) -> str:
    return "" if value is None else format(value, _FORMATS.get(key, ",.0f"))


def _plot(metrics: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """PSNR against what the codes cost a prior: a good tokenizer lies up and to the left."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        _log.warning(
            "comparison.png is not drawn: that needs matplotlib, pip install 'mini-dalle[plots]'"
        )
        return
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for number, (name, row) in enumerate(metrics.items()):
        # There are ten colours: marks distinguish rows of one colour. Names on the points would
        # overlap.
        mark = "os^Dv"[number // 10 % 5] + f"C{number % 10}"
        axes.plot(row["nats_per_image"], row["psnr"], mark, label=name, markersize=9)
    figure.legend(loc="outside right center", frameon=False)
    axes.set(
        xlabel=COLUMNS["nats_per_image"] + " (held-out)",
        ylabel="PSNR of reconstructions, dB (held-out)",
    )
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
