"""`compare-tokenizers`: several tokenizers on one data set at equal steps or equal wall time, each
judged by its images and by a prior.

Knows the stages and their metrics. A comparison's YAML is an experiment's with two more keys:
`variants` maps the name of each tokenizer to the settings in which it differs. `minutes`, if given,
is the training time of a tokenizer, in place of its steps.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.config.experiment import Experiment, with_section_defaults
from pipeline.runtime.atomic_io import atomic_write, atomic_write_png, atomic_write_text
from pipeline.runtime.devices import should_compile, uses_bf16
from pipeline.runtime.distributed import make_accelerator
from pipeline.runtime.image_grid import grid_image, make_grid
from pipeline.runtime.log import on_main_process
from pipeline.stages.encode import encode_dataset
from pipeline.stages.manifest import read_settings
from pipeline.stages.prior import train_prior
from pipeline.stages.run_lock import run_lock
from pipeline.stages.sources import sources_of
from pipeline.stages.time_budget import steps_in_budget
from pipeline.stages.tokenizer import train_tokenizer
from pipeline.stages.variants import (
    METRICS,
    SHARED_SETTINGS,
    checked_minutes,
    differing_settings,
    is_done,
    load_variants,
    made_with,
    read_plan,
    read_record,
    run_each,
    write_plan,
    write_record,
)
from pipeline.training.checkpoint import newest_checkpoint
from stage1_tokenizer import TokenizerModule, to_model_range, to_uint8
from stage1_tokenizer.metrics import ssim

_log = logging.getLogger(__name__)
_log.addFilter(on_main_process)

_TIME = "training.json"
_TIMES = "times.json"
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
    "steps": "steps",
}
"""Results, which are the same whenever the same tokenizers are judged."""
TIME_COLUMNS = {
    "minutes": "minutes",
    "training_rate": "images/s in training",
    "encoding_rate": "images/s encoding",
}
"""What differs from time to time, in a file of its own."""
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
    variants = load_variants(arguments, ("minutes",), "configs/bakeoff-emoji.yaml", _check)
    minutes = variants.options["minutes"]
    if minutes is not None:
        minutes = checked_minutes(minutes)
    return Comparison(variants.folder, variants.experiments, minutes)


def _check(experiment: Experiment, changes: Mapping[str, Any]) -> None:
    """Raises ValueError where a tokenizer cannot be compared."""
    if experiment.tokenizer.frozen:
        raise ValueError(
            "tokenizer.frozen is on, and a comparison trains every tokenizer; set it to false"
        )
    experiment.require_codes("compare-tokenizers")


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
            run_each(
                due,
                lambda experiment: run_variant(experiment, comparison.minutes),
                lambda experiment, failed: write_metrics(experiment, comparison.minutes, failed),
            )
        finally:
            write_report(comparison)
    return comparison.folder


def is_complete(experiment: Experiment, minutes: float | None) -> bool:
    """Whether a row has its metrics.

    Raises:
        ValueError: the row was made with other settings.
    """
    return is_done(experiment, {"minutes": minutes})


def write_metrics(
    experiment: Experiment, minutes: float | None, metrics: Mapping[str, Any]
) -> None:
    """Writes a row's metrics and settings into its folder."""
    write_record(experiment, {"minutes": minutes}, metrics)


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
    plan = read_plan(experiment.folder)
    steps = plan["steps"] if plan else steps_in_budget(experiment, 60 * minutes)
    write_plan(experiment, {"minutes": minutes}, {"steps": steps})
    accelerator = make_accelerator(experiment.folder, [], experiment.process_timeout)
    train = experiment.tokenizer.train
    compiles = should_compile(train, accelerator.device)
    train = replace(train, steps=steps, eval_every=steps, compile="on" if compiles else "off")
    return replace(experiment, tokenizer=replace(experiment.tokenizer, train=train))


def _judge(experiment: Experiment) -> dict[str, float]:
    """Metrics of a row whose stages are done; its first reconstructions and times are saved."""
    row = experiment.folder
    tokenizer = TokenizerModule.from_pretrained(row / "tokenizer")
    held_out = (read_settings(row / "tokenizer") or {})["held_out"]
    prior = (read_settings(row / "prior") or {})["held_out"]
    steps = experiment.tokenizer.train.steps
    true, drawn, rate = _reconstructed(experiment, tokenizer)
    with atomic_write(row / "reconstructions.npy") as beside, beside.open("wb") as file:
        np.save(file, drawn[:_SHOWN], allow_pickle=False)
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
    }
    times = {"encoding_rate": rate}
    if (row / _TIME).is_file():
        seconds = read_record(row / _TIME)["seconds"]
        batch_size = experiment.tokenizer.train.resolved_batch("tokenizer")[0]
        times |= {"minutes": seconds / 60, "training_rate": steps * batch_size / seconds}
    atomic_write_text(row / _TIMES, json.dumps(times) + "\n")
    return metrics


@torch.no_grad()
def _reconstructed(
    experiment: Experiment, tokenizer: TokenizerModule
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
    """Writes `comparison.md`, `comparison.json`, `times.md`, `times.json` and two images: the
    variants in their order, then other rows in the folder. Rows that were judged on other data or
    by another prior, and rows that failed, are named below the table."""
    found = {p.parent.name: read_record(p) for p in sorted(comparison.folder.glob(f"*/{METRICS}"))}
    if not found:
        return
    first = next(iter(comparison.variants.values()))
    base = made_with(first, {"minutes": comparison.minutes})
    every = {}
    times = {}
    notes = ""
    names = dict.fromkeys([*comparison.variants, *found])
    for name in filter(found.__contains__, names):
        made = with_section_defaults(found[name].get("made_with", {}))
        differing = differing_settings(made, base, SHARED_SETTINGS)
        if differing and name not in comparison.variants:
            notes += (
                f"\n{name} is left out: it was made with other settings ({', '.join(differing)})\n"
            )
        else:
            path = comparison.folder / name / _TIMES
            times[name] = read_record(path) if path.is_file() else {}  # a row that failed has none
            every[name] = found[name]["metrics"]
            if "failed" in every[name]:
                notes += (
                    f"\n{name} failed: {every[name]['failed']} (to try it again, remove "
                    f"{comparison.folder / name})\n"
                )
    atomic_write_text(comparison.folder / "comparison.json", json.dumps(every, indent=2) + "\n")
    judged = {name: row for name, row in every.items() if "failed" not in row}
    atomic_write_text(comparison.folder / "comparison.md", table(judged) + notes)
    atomic_write_text(comparison.folder / _TIMES, json.dumps(times, indent=2) + "\n")
    timed = {name: times[name] for name in judged}
    atomic_write_text(comparison.folder / "times.md", table(timed, TIME_COLUMNS))
    if not judged:
        return
    shown = [
        np.load(comparison.folder / name / "reconstructions.npy", allow_pickle=False)
        for name in judged
    ]
    _, held_out = sources_of(first.data, first.folder, first.process_timeout)
    true = held_out.images(range(len(shown[0])))
    alike = [row for row in shown if row.shape == true.shape]  # others may be of another comparison
    grid = make_grid([image for row in [true, *alike] for image in row], columns=len(true))
    atomic_write_png(comparison.folder / "reconstructions.png", grid_image(grid))
    _plot(judged, comparison.folder / "comparison.png")


def table(metrics: Mapping[str, Mapping[str, float]], columns: Mapping[str, str] = COLUMNS) -> str:
    """Markdown, one tokenizer per row.

    Args:
        columns: title of each column, by the name of what it shows.
    """
    lines = [
        "| tokenizer | " + " | ".join(columns.values()) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, row in metrics.items():
        lines.append(
            f"| {name} | " + " | ".join(_cell(key, row.get(key)) for key in columns) + " |"
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
    with atomic_write(path) as beside:
        figure.savefig(beside, format="png", dpi=120)
