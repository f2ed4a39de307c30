"""`compare-tokenizers`: several tokenizers on one data set at equal steps or equal wall time, each
judged by its images and by a prior.

Knows the stages and their figures. A comparison's YAML is an experiment's with two keys more:
`variants`, a name and the settings that differ from the rest for each tokenizer, and optionally
`minutes` of training a tokenizer, in place of its steps.
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
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.config.data import data_settings
from pipeline.config.experiment import Experiment, to_dict
from pipeline.config.load import load_values
from pipeline.runtime.atomic_io import atomic_write_text
from pipeline.runtime.devices import should_compile, uses_bf16
from pipeline.runtime.distributed import make_accelerator
from pipeline.runtime.image_grid import grid_image, picture_grid
from pipeline.runtime.log import on_main_process
from pipeline.stages.encode import encode_dataset, sources_of
from pipeline.stages.manifest import encode_settings, read_settings
from pipeline.stages.prior import train_prior
from pipeline.stages.run_lock import run_lock
from pipeline.stages.tokenizer import tokenizer_task, train_tokenizer
from pipeline.training.checkpoint import newest_checkpoint
from pipeline.training.trainer import fit
from stage1_tokenizer import ImageTokenizer, to_model_range, to_pictures
from stage1_tokenizer.metrics import ssim

_log = logging.getLogger(__name__)
_log.addFilter(on_main_process)

_FIGURES, _PLAN, _TIME = "figures.json", "plan.json", "training.json"
SHARED_SETTINGS = ("seed", "data", "encode", "text", "sequence", "prior", "precision")
"""Settings that must be the same for figures to stand in one table."""
_PROBE_STEPS = 60
"""Steps run and thrown away to find how many fit into the minutes."""
_ENCODED = 64
"""Images encoded at a time when the rate is taken."""
_SHOWN = 12
"""Held-out images whose reconstructions are shown."""
COLUMNS = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "usage": "codebook used",
    "perplexity": "perplexity",
    "bits_per_image": "bits per image",
    "nats_per_image": "nats per image by the prior",
    "minutes": "minutes",
    "steps": "steps",
    "training_rate": "pictures/s in training",
    "encoding_rate": "pictures/s encoding",
}


@dataclass(frozen=True)
class Comparison:
    """What is compared: an experiment a row, in order."""

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
    import yaml

    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    reader.add_argument("--config")
    reader.add_argument("--minutes")
    options, arguments = reader.parse_known_args(arguments)
    if options.config is None:
        raise ValueError(
            "no configuration was given; add --config configs/bakeoff-emoji.yaml (or your own copy "
            "of it)"
        )
    file = Path(options.config)
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
    given = values.pop("variants", None) if isinstance(values, dict) else None
    if (
        not isinstance(given, dict)
        or not given
        or not all(isinstance(row, dict | None) for row in given.values())
    ):
        raise ValueError(
            f"{file} has no 'variants' to compare; it needs a mapping of names to settings, see "
            "configs/bakeoff-emoji.yaml"
        )
    minutes = options.minutes if options.minutes is not None else values.get("minutes")
    values.pop("minutes", None)
    try:
        minutes = None if minutes is None else float(minutes)
    except (TypeError, ValueError):
        raise ValueError(f"minutes is {minutes!r}; it must be a number") from None
    if minutes is not None and not (minutes > 0 and math.isfinite(minutes)):
        raise ValueError(f"minutes is {minutes}; it must be above 0 and finite")
    rows, problems, folder = {}, [], Path()
    for name, row in given.items():
        if moved := {"name", "output_dir"} & set(row or {}):
            problems.append(
                f"variant {name}: {', '.join(sorted(moved))} cannot differ between variants; a "
                "variant's name is its own"
            )
            continue
        try:
            experiment = load_values(_merged(values, row or {}), arguments)
            folder = experiment.folder
            if experiment.tokenizer.frozen:
                raise ValueError(
                    "tokenizer.frozen is on, and a comparison trains every tokenizer; set it to "
                    "false"
                )
            rows[str(name)] = replace(experiment, name=str(name), output_dir=str(folder))
        except ValueError as error:
            problems.append(f"variant {name}: {error}")
    if problems:
        raise ValueError("\n".join(problems))
    return Comparison(folder, rows, minutes)


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
        ValueError: a row was made with other settings before, or cannot be trained; named before
            any work where it can be known then.
    """
    due = {
        name: experiment
        for name, experiment in comparison.variants.items()
        if not is_complete(experiment, comparison.minutes)
    }
    for experiment in due.values():
        device = make_accelerator(experiment, trackers=False).device
        for train in (experiment.tokenizer.train, experiment.prior.train):
            should_compile(train, device)
    with run_lock(comparison.folder, next(iter(comparison.variants.values())).process_timeout):
        try:
            for name, experiment in due.items():
                _log.info(f"== {name}")
                # What was compiled for other rows counts against how many shapes a network may be
                # compiled for.
                torch.compiler.reset()
                try:
                    run_variant(experiment, comparison.minutes)
                except FloatingPointError as error:
                    write_figures(experiment, comparison.minutes, {"failed": str(error)})
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
    """Whether a row has its figures; refuses those that were made with other settings."""
    path, now = experiment.folder / _FIGURES, _made_with(experiment, minutes)
    plan = _plan(experiment.folder)
    made = _read(path)["made_with"] if path.is_file() else plan["made_with"] if plan else now
    if differ := sorted(key for key in now if made.get(key) != now[key]):
        raise ValueError(
            f"{experiment.folder} was made with other settings ({', '.join(differ)}); choose "
            "another name for this comparison, or remove "
            "that folder"
        )
    return path.is_file()


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is truncated or corrupted ({error}); remove it, and what it says is found out "
            "anew"
        ) from error


def _plan(folder: Path) -> dict[str, Any] | None:
    """What an earlier try of a row settled on."""
    return _read(folder / _PLAN) if (folder / _PLAN).is_file() else None


def write_figures(
    experiment: Experiment, minutes: float | None, figures: Mapping[str, Any]
) -> None:
    """Writes a row's figures, with what they were made with, into its folder."""
    experiment.folder.mkdir(parents=True, exist_ok=True)
    content = {"figures": figures, "made_with": _made_with(experiment, minutes)}
    atomic_write_text(experiment.folder / _FIGURES, json.dumps(content, indent=2) + "\n")


def run_variant(experiment: Experiment, minutes: float | None) -> dict[str, float]:
    """Trains one tokenizer and a prior on its codes; the figures, which are also written to the
    row's folder."""
    given, folder = experiment, experiment.folder / "tokenizer"
    if minutes is not None:
        plan = _plan(experiment.folder)
        steps = plan["steps"] if plan else steps_in_budget(experiment, 60 * minutes)
        experiment.folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(
            experiment.folder / _PLAN,
            json.dumps({"steps": steps, "made_with": _made_with(given, minutes)}),
        )
        # Judged at the end alone: what evaluations cost differs between tokenizers. Compiled if it
        # was when the pace was taken.
        train = experiment.tokenizer.train
        compiled = should_compile(train, make_accelerator(experiment, trackers=False).device)
        train = replace(train, steps=steps, eval_every=steps, compile="on" if compiled else "off")
        experiment = replace(experiment, tokenizer=replace(experiment.tokenizer, train=train))
    steps = experiment.tokenizer.train.steps
    resumed, start = newest_checkpoint(folder / "checkpoints") is not None, time.perf_counter()
    train_tokenizer(experiment)
    if not resumed:  # of a training in two parts neither time is that of the whole
        atomic_write_text(
            experiment.folder / _TIME, json.dumps({"seconds": time.perf_counter() - start}) + "\n"
        )
    encode_dataset(experiment)
    train_prior(experiment)
    tokenizer = ImageTokenizer.from_pretrained(folder)
    held_out = (read_settings(folder) or {})["held_out"]
    prior = (read_settings(experiment.folder / "prior") or {})["held_out"]
    layout = tokenizer.layout
    true, drawn, rate = _reconstructed(experiment, tokenizer)
    figures = {
        "psnr": held_out["psnr"],
        "ssim": ssim(true, drawn),
        "usage": held_out["codebook_usage"],
        "perplexity": held_out["codebook_perplexity"],
        "bits_per_image": sum(level.length * math.log2(level.num_codes) for level in layout),
        "nats_per_image": prior["nats_per_code"] * sum(level.length for level in layout),
        "steps": steps,
        "encoding_rate": rate,
    }
    if (experiment.folder / _TIME).is_file():
        seconds = _read(experiment.folder / _TIME)["seconds"]
        figures |= {
            "minutes": seconds / 60,
            "training_rate": steps * experiment.tokenizer.train.resolved_batch()[0] / seconds,
        }
    np.save(experiment.folder / "reconstructions.npy", drawn[:_SHOWN], allow_pickle=False)
    write_figures(given, minutes, figures)
    return figures


def steps_in_budget(experiment: Experiment, seconds: float) -> int:
    """How many steps fit into this time, starting and compiling included: by the pace of a few that
    are run and thrown away, and of a few with the adversary where one joins later."""
    discriminator = experiment.tokenizer.objective.discriminator
    joins = discriminator.start if discriminator.weight else 0
    before, pace = _seconds_per_step(experiment, discriminator=not joins)
    if joins and before + joins * pace < seconds:
        before, slower = _seconds_per_step(experiment, discriminator=True)
        steps = joins + max(int((seconds - before - joins * pace) / slower), 0)
        return max(steps, 1)
    return max(int((seconds - before) / pace), 1)


def _seconds_per_step(experiment: Experiment, *, discriminator: bool) -> tuple[float, float]:
    """Seconds before the first step and seconds per step, with the adversary from the start or
    without one."""
    objective = experiment.tokenizer.objective
    changed = (
        replace(objective.discriminator, start=0)
        if discriminator
        else replace(objective.discriminator, weight=0.0)
    )
    objective = replace(objective, discriminator=changed)
    experiment = replace(experiment, tokenizer=replace(experiment.tokenizer, objective=objective))
    train = experiment.tokenizer.train
    accelerator = make_accelerator(experiment, trackers=False)
    task, _ = tokenizer_task(experiment, accelerator, *sources_of(experiment))
    times: list[float] = []

    def timed(step: int) -> Any:
        times.append(time.perf_counter())
        return task.batch(step)

    with tempfile.TemporaryDirectory() as scratch:
        probe = replace(
            train,
            steps=_PROBE_STEPS,
            eval_every=_PROBE_STEPS,
            save_every=_PROBE_STEPS,
            save_best=False,
        )
        start = time.perf_counter()
        fit(
            replace(task, batch=timed, sample_images=dict),
            probe,
            accelerator,
            Path(scratch),
            seed=experiment.seed,
            bf16=uses_bf16(experiment.precision, accelerator.device),
            compile_networks=should_compile(train, accelerator.device),
            label="pace",
            progress=False,
        )
    pace = float(np.median(np.diff(times)[_PROBE_STEPS // 2 :]))
    return times[_PROBE_STEPS // 2] - start - pace * _PROBE_STEPS / 2, pace


@torch.no_grad()
def _reconstructed(
    experiment: Experiment, tokenizer: ImageTokenizer
) -> tuple[np.ndarray, np.ndarray, float]:
    """Held-out images, what the tokenizer makes of them, and pictures/s of encoding (by the
    quickest of some batches)."""
    accelerator = make_accelerator(experiment, trackers=False)
    _, held_out = sources_of(experiment)
    true = held_out.images(range(len(held_out))[: experiment.encode.max_val_images])
    tokenizer.to(accelerator.device)
    drawn, seconds = [], []
    bf16 = uses_bf16(experiment.precision, accelerator.device)
    for first in range(0, len(true), _ENCODED):
        pixels = to_model_range(torch.from_numpy(true[first : first + _ENCODED])).to(
            accelerator.device
        )
        drawn.append(to_pictures(tokenizer.decode(tokenizer.encode(pixels))).cpu().numpy())
        for _ in range(5 if len(pixels) == _ENCODED or len(true) < _ENCODED else 0):
            start = time.perf_counter()
            with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=bf16):
                tokenizer.encode(pixels).cpu()
            seconds.append((time.perf_counter() - start) / len(pixels))
    return true, np.concatenate(drawn), 1 / min(seconds)


def write_report(comparison: Comparison) -> None:
    """`comparison.md` and `comparison.json`, the rows in their order and then others that lie in
    the folder; and two images. Others that were judged on other data or by another prior are
    named below the table, not in it."""
    found = {p.parent.name: _read(p) for p in sorted(comparison.folder.glob(f"*/{_FIGURES}"))}
    if not found:
        return
    base = _made_with(next(iter(comparison.variants.values())), comparison.minutes)
    every, notes = {}, ""
    for name in [
        *comparison.variants,
        *(name for name in found if name not in comparison.variants),
    ]:
        if name not in found:
            continue
        made = found[name].get("made_with", {})
        if name not in comparison.variants and (
            differ := [key for key in SHARED_SETTINGS if made.get(key) != base[key]]
        ):
            notes += (
                f"\n{name} is left out: it was made with other settings ({', '.join(differ)})\n"
            )
        else:
            every[name] = found[name]["figures"]
    atomic_write_text(comparison.folder / "comparison.json", json.dumps(every, indent=2) + "\n")
    figures = {name: row for name, row in every.items() if "failed" not in row}
    for name, row in every.items():
        if "failed" in row:
            notes += (
                f"\n{name} failed: {row['failed']} (to try it again, remove "
                f"{comparison.folder / name})\n"
            )
    atomic_write_text(comparison.folder / "comparison.md", table(figures) + notes)
    if not figures:
        return
    shown = [
        np.load(comparison.folder / name / "reconstructions.npy", allow_pickle=False)
        for name in figures
    ]
    true = sources_of(next(iter(comparison.variants.values())))[1].images(range(len(shown[0])))
    alike = [row for row in shown if row.shape == true.shape]  # others may be of another comparison
    grid = picture_grid([picture for row in [true, *alike] for picture in row], columns=len(true))
    grid_image(grid).save(comparison.folder / "reconstructions.png")
    _plot(figures, comparison.folder / "comparison.png")


def table(figures: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown, a tokenizer a row."""
    lines = [
        "| tokenizer | " + " | ".join(COLUMNS.values()) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for name, row in figures.items():
        lines.append(
            f"| {name} | " + " | ".join(_cell(key, row.get(key)) for key in COLUMNS) + " |"
        )
    return "\n".join(lines) + "\n"


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return ""
    match key:
        case "usage":
            return f"{value:.1%}"
        case "ssim":
            return f"{value:.3f}"
        case "psnr" | "minutes":
            return f"{value:.1f}"
        case _:
            return f"{value:,.0f}"


def _plot(figures: Mapping[str, Mapping[str, float]], path: Path) -> None:
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
    for number, (name, row) in enumerate(figures.items()):
        # Ten colours; marks tell apart what has the same one. Names stand beside: on the points
        # they would cover each other.
        axes.plot(
            row["nats_per_image"],
            row["psnr"],
            "os^Dv"[number // 10 % 5],
            color=f"C{number % 10}",
            label=name,
            markersize=9,
        )
    figure.legend(loc="outside right center", frameon=False)
    axes.set(
        xlabel=COLUMNS["nats_per_image"] + " (held-out)",
        ylabel="PSNR of reconstructions, dB (held-out)",
    )
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
