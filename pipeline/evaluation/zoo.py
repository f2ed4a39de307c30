"""`zoo`: several generative models on one data set at equal wall time, judged by the probability of
held-out images. Knows the stages and `evaluate`; trains nothing itself.

A zoo's YAML is an experiment's with three more keys. `variants` maps the name of each model to the
settings in which it differs. `minutes` is the training time of both stages of a model together, and
`tokenizer_fraction` is the part of it that the tokenizer has (0.5). A model without a prior to
train gives all of it to the tokenizer.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from pipeline.config.experiment import Experiment
from pipeline.data.source import more_held_out
from pipeline.evaluation.evaluate import evaluate, held_out_source
from pipeline.evaluation.metrics import stacked
from pipeline.inference.latent_pipeline import LatentPipeline
from pipeline.inference.pipeline import TextToImagePipeline
from pipeline.runtime.atomic_io import atomic_write, atomic_write_png, atomic_write_text
from pipeline.runtime.devices import should_compile
from pipeline.runtime.distributed import make_accelerator
from pipeline.runtime.image_table import image_table
from pipeline.stages.encode import encode_dataset
from pipeline.stages.prior import train_prior
from pipeline.stages.run import assemble_bundle
from pipeline.stages.run_lock import run_lock
from pipeline.stages.time_budget import prior_steps_in_budget, steps_in_budget
from pipeline.stages.tokenizer import train_tokenizer
from pipeline.stages.variants import (
    METRICS,
    checked_minutes,
    is_done,
    load_variants,
    read_plan,
    read_record,
    refuse_changes,
    run_each,
    write_plan,
    write_record,
)
from stage1_tokenizer.likelihoods import build_likelihood

_FIXED = ("seed", "data", "encode", "text", "precision")
"""Settings that all models of a zoo share."""
_TIMES = "times.json"
"""In a model's folder: seconds of its stages. In the zoo's: what differs from time to time, in a
file of its own, so that results.json does not."""
_JUDGED_TIMES = "judged_times.json"
_SAMPLES = "samples.npy"
_IMAGES = 500
"""Held-out images that are evaluated, where `encode.max_val_images` is absent."""
_SHOWN = 8
"""Prompts of the sheet."""
_BATCH = 64
"""Images per call whose time is taken."""
PARTS = {
    "mutual_information": "mutual_information",
    "marginal_kl_fixed_prior": "marginal_kl_fixed_prior",
    "marginal_kl": "marginal_kl",
    "marginal_kl_given_captions": "marginal_kl",
}
"""Parts of the ELBO by `evaluate` -> theirs in a row, in nats per image. Of a prior that sees
captions, the marginal KL is the one given captions."""
COLUMNS = (
    "model",
    "prior sees captions",
    "bits per dimension",
    "distortion",
    "rate",
    "mutual information, nats",
    "marginal KL to the fixed prior, nats",
    "marginal KL to the prior, nats",
    "PSNR, dB",
    "steps",
)
_CAPTION = (
    "Bits per dimension of {images} held-out images, with the 95% interval: the sum of distortion "
    "and rate. Where the posterior is stochastic, it is a bound, the ELBO of one sample. Its parts "
    "are in nats per image. Mutual information, which is at most log {images} = {most:.1f}, and "
    "the marginal KL to the prior sum to the rate, up to other samples. If a prior sees captions, "
    "that KL is less what captions tell. A rate of 1 bit per dimension is {nats:,.0f} nats per "
    "image. Steps are those of the tokenizer and of the prior."
)
_TIMES_CAPTION = (
    "Samples per second are those of a call with {batch} prompts. Minutes are those of the "
    "tokenizer and of the prior; codes are encoded in between."
)


@dataclass(frozen=True)
class Zoo:
    """What is trained and compared: one experiment per model, in order."""

    folder: Path
    models: dict[str, Experiment]
    minutes: float
    """Training time of both stages of a model."""
    tokenizer_fraction: float
    """The tokenizer's part of it."""

    @property
    def options(self) -> dict[str, object]:
        """What a model's metrics depend on beside its experiment."""
        return {"minutes": self.minutes, "tokenizer_fraction": self.tokenizer_fraction}


def load_zoo(arguments: Sequence[str]) -> Zoo:
    """Reads `["--config", FILE, "--minutes", "6", "--tokenizer.train.batch_size", "64", ...]`; what
    is given here holds for every model.

    Raises:
        ValueError: the file has no variants or no minutes, a number is out of range, or a variant
            is no valid experiment; names it.
        FileNotFoundError: there is no such file.
    """
    keys = ("minutes", "tokenizer_fraction")
    variants = load_variants(arguments, keys, "configs/zoo.yaml", _check)
    if variants.options["minutes"] is None:
        raise ValueError(
            "there are no 'minutes', the training time of a model; add minutes: 6 to the file"
        )
    given = variants.options["tokenizer_fraction"]
    try:
        fraction = 0.5 if given is None else float(given)
    except (TypeError, ValueError):
        raise ValueError(f"tokenizer_fraction is {given!r}; it must be a number") from None
    if not 0 < fraction < 1:
        raise ValueError(f"tokenizer_fraction is {fraction}; it must be in (0, 1)")
    minutes = checked_minutes(variants.options["minutes"])
    return Zoo(variants.folder, variants.experiments, minutes, fraction)


def _check(experiment: Experiment, changes: Mapping[str, Any]) -> None:
    """Raises ValueError where a model does not belong into a zoo."""
    refuse_changes(_FIXED, changes, "a zoo compares models on the same images")
    if experiment.tokenizer.frozen:
        raise ValueError(
            "tokenizer.frozen is on, and a zoo trains every tokenizer; set it to false"
        )
    for stage in ("tokenizer", "prior"):
        getattr(experiment, stage).train.resolved_batch(stage)


def trains_prior(experiment: Experiment) -> bool:
    """Whether a model has a prior to train after its tokenizer."""
    if experiment.tokenizer.model.has_codes:
        return True
    prior = experiment.prior
    return not prior.joint and prior.latent.kind not in ("standard", "aggregated")


def train_zoo(zoo: Zoo) -> Path:
    """Trains and judges every model that is not done yet, then writes table.md, results.json and
    samples.png; returns their folder.

    Raises:
        ValueError: a model was made with other settings, its decoder gives images no probability,
            or it cannot be trained; raised before any work where that can be known.
    """
    due = {
        name: experiment
        for name, experiment in zoo.models.items()
        if not is_done(experiment, zoo.options)
    }
    _check_trainable(due)
    with run_lock(zoo.folder, next(iter(zoo.models.values())).process_timeout):
        try:
            run_each(
                due,
                lambda experiment: run_model(experiment, zoo),
                lambda experiment, failed: write_record(experiment, zoo.options, failed),
            )
        finally:
            write_report(zoo)
    return zoo.folder


def _check_trainable(models: Mapping[str, Experiment]) -> None:
    """Raises ValueError where the decoder of a model gives held-out images no probability, or it is
    to be compiled and cannot be."""
    if not models:
        return
    first = next(iter(models.values()))
    held_out = held_out_source(first)
    count = min(len(held_out), _BATCH)
    if count < 2:
        raise ValueError(
            f"{count} images are held out, and an interval needs 2; "
            + more_held_out(first.data.source, first.data.val_fraction)
        )
    images = torch.from_numpy(held_out.images(range(count)))
    for name, experiment in models.items():
        model = experiment.tokenizer.model
        likelihood = build_likelihood(
            model.likelihood, model.likelihood_scale, model.channels, model.likelihood_mixtures
        )
        if not likelihood.covers(images):
            raise ValueError(
                f"variant {name}: tokenizer.model.likelihood is {model.likelihood}, which gives "
                "images of this data no probability; choose discretized_logistic"
            )
        device = make_accelerator(experiment.folder, [], experiment.process_timeout).device
        for train in (experiment.tokenizer.train, experiment.prior.train):
            should_compile(train, device)


def run_model(experiment: Experiment, zoo: Zoo) -> dict[str, Any]:
    """Trains both stages of a model and evaluates them; the metrics, which are also written to the
    model's folder."""
    seconds = 60 * zoo.minutes
    budget = zoo.tokenizer_fraction * seconds if trains_prior(experiment) else seconds
    planned = _with_steps(experiment, zoo, "tokenizer", budget)
    _timed(planned, "tokenizer", train_tokenizer)
    if planned.tokenizer.model.has_codes:
        _timed(planned, "codes", encode_dataset)
    if trains_prior(experiment):
        spent = _times(planned)
        left = seconds - spent.get("tokenizer", budget) - spent.get("codes", 0.0)
        planned = _with_steps(planned, zoo, "prior", left)
    _timed(planned, "prior", train_prior)
    metrics = _judge(planned)
    write_record(experiment, zoo.options, metrics)
    return metrics


def _with_steps(
    experiment: Experiment, zoo: Zoo, stage: Literal["tokenizer", "prior"], seconds: float
) -> Experiment:
    """The experiment with as many steps of a stage as fit into the seconds, which its plan records.

    The stage is evaluated only at the end: what evaluations cost differs between models. It is
    compiled if it was when the pace was measured.
    """
    settings = zoo.models[experiment.name]
    plan = read_plan(experiment.folder) or {}
    if stage not in plan:
        count = steps_in_budget if stage == "tokenizer" else prior_steps_in_budget
        plan[stage] = count(experiment, seconds)
        write_plan(settings, zoo.options, plan)
    device = make_accelerator(experiment.folder, [], experiment.process_timeout).device
    section = getattr(experiment, stage)
    steps = plan[stage]
    compiles = "on" if should_compile(section.train, device) else "off"
    train = replace(section.train, steps=steps, eval_every=steps, compile=compiles)
    return replace(experiment, **{stage: replace(section, train=train)})


def _timed(experiment: Experiment, stage: str, work: Callable[[Experiment], object]) -> None:
    """Does the work of a stage and records its seconds. A stage that is resumed has no time of its
    own."""
    is_new = not (experiment.folder / stage).exists()
    start = time.perf_counter()
    work(experiment)
    if is_new:
        times = _times(experiment) | {stage: time.perf_counter() - start}
        atomic_write_text(experiment.folder / _TIMES, json.dumps(times) + "\n")


def _times(experiment: Experiment) -> dict[str, float]:
    """Seconds of the stages of a model, as far as they are known."""
    path = experiment.folder / _TIMES
    return read_record(path) if path.is_file() else {}


def _judge(experiment: Experiment) -> dict[str, Any]:
    """The row of a model whose stages are done; its samples are saved."""
    bundle = assemble_bundle(experiment)
    count = experiment.encode.max_val_images or _IMAGES
    report = evaluate(bundle, experiment, experiment.folder / "evaluation.json", images=count)
    pipe = TextToImagePipeline.from_pretrained(bundle)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    held_out = held_out_source(experiment)
    shown = held_out.captions(range(min(_SHOWN, len(held_out))))
    with atomic_write(experiment.folder / _SAMPLES) as beside, beside.open("wb") as file:
        np.save(file, _sampled(pipe, shown), allow_pickle=False)
    times = _times(experiment)
    has_codes = experiment.tokenizer.model.has_codes
    stages = ("tokenizer", "codes", "prior") if has_codes else ("tokenizer", "prior")
    judged = {
        "samples_per_second": _samples_per_second(pipe, shown),
        "minutes": {name: times[name] / 60 if name in times else None for name in stages},
    }
    atomic_write_text(experiment.folder / _JUDGED_TIMES, json.dumps(judged) + "\n")
    trained = ("tokenizer", "prior") if trains_prior(experiment) else ("tokenizer",)
    return {
        "sees_captions": experiment.sees_captions,
        "images": report.settings["images"],
        "bits_per_dimension": report.metrics["bits_per_dimension"],
        "interval": list(report.estimates["bits_per_dimension"].interval),
        "distortion": report.metrics["distortion_bits_per_dimension"],
        "rate": report.metrics["rate_bits_per_dimension"],
        "nats_per_bit_per_dimension": held_out.images([0]).size * math.log(2),
        **{own: report.metrics[name] for name, own in PARTS.items() if name in report.metrics},
        "psnr": report.metrics["psnr"],
        "steps": {name: getattr(experiment, name).train.steps for name in trained},
    }


def _sampled(pipe: TextToImagePipeline | LatentPipeline, prompts: Sequence[str]) -> np.ndarray:
    """One image per prompt, seed 0: uint8 (prompts,H,W,3). An unconditional prior gives as many
    images of no prompt."""
    if isinstance(pipe, LatentPipeline) and not pipe.prior.context_features:
        output = pipe([""], num_images_per_prompt=len(prompts), batch_size=_BATCH)
    else:
        output = pipe(prompts, batch_size=_BATCH, truncate=True)
    return stacked(output.images)


def _samples_per_second(
    pipe: TextToImagePipeline | LatentPipeline, prompts: Sequence[str]
) -> float:
    """Images per second of a call with 64 prompts, the fastest of three after a first one."""
    many = [prompts[i % len(prompts)] for i in range(_BATCH)]
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        _sampled(pipe, many)
        seconds.append(time.perf_counter() - start)
    return _BATCH / min(seconds[1:])


def write_report(zoo: Zoo) -> None:
    """Writes table.md, results.json, times.md, times.json and samples.png of the models that are
    done, in the order of the YAML. Models that failed are named below the table."""
    rows = {
        name: read_record(experiment.folder / METRICS)["metrics"]
        for name, experiment in zoo.models.items()
        if (experiment.folder / METRICS).is_file()
    }
    if not rows:
        return
    times = {}
    for name in rows:
        path = zoo.models[name].folder / _JUDGED_TIMES
        times[name] = read_record(path) if path.is_file() else {}  # a model that failed has none
    atomic_write_text(zoo.folder / "results.json", json.dumps(rows, indent=2) + "\n")
    atomic_write_text(zoo.folder / _TIMES, json.dumps(times, indent=2) + "\n")
    done = {name: row for name, row in rows.items() if "failed" not in row}
    failed = "".join(
        f"\n{name} failed: {row['failed']} (to try it again, move {zoo.folder / name} away)\n"
        for name, row in rows.items()
        if "failed" in row
    )
    atomic_write_text(zoo.folder / "table.md", table(done) + failed)
    atomic_write_text(zoo.folder / "times.md", times_table({name: times[name] for name in done}))
    if done:
        _draw_samples(zoo, list(done))


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown, one model per row, and a line that says what the columns are."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for name, row in rows.items():
        low, high = row["interval"]
        cells = [
            name,
            "yes" if row["sees_captions"] else "no",
            f"{row['bits_per_dimension']:.3f} ({low:.3f} to {high:.3f})",
            *(f"{row[key]:.3f}" for key in ("distortion", "rate")),
            *(f"{row[key]:.1f}" if key in row else "" for key in dict.fromkeys(PARTS.values())),
            f"{row['psnr']:.1f}",
            " + ".join(f"{steps:,}" for steps in row["steps"].values()),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if rows:
        first = next(iter(rows.values()))
        images = first["images"]
        nats = first["nats_per_bit_per_dimension"]
        text = _CAPTION.format(images=images, most=math.log(images), nats=nats)
        lines += ["", text]
    return "\n".join(lines) + "\n"


def times_table(times: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown, one model per row: how fast it samples, and how long its stages were trained."""
    lines = ["| model | samples per second | minutes |", "|---|---|---|"]
    for name, row in times.items():
        stages = row.get("minutes", {}).values()
        minutes = " + ".join("?" if m is None else f"{m:.1f}" for m in stages)
        lines.append(f"| {name} | {row.get('samples_per_second', math.nan):,.0f} | {minutes} |")
    return "\n".join([*lines, "", _TIMES_CAPTION.format(batch=_BATCH)]) + "\n"


def _draw_samples(zoo: Zoo, names: Sequence[str]) -> None:
    """A row per model and a column per prompt, below the held-out images with these captions."""
    first = zoo.models[names[0]]
    held_out = held_out_source(first)
    shown = range(min(_SHOWN, len(held_out)))
    rows = {"held-out image": held_out.images(shown)}
    for name in names:
        experiment = zoo.models[name]
        label = name if experiment.sees_captions else f"{name} (without captions)"
        rows[label] = np.load(experiment.folder / _SAMPLES, allow_pickle=False)
    atomic_write_png(zoo.folder / "samples.png", image_table(rows, held_out.captions(shown)))
