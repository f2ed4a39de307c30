"""`evaluate`: every metric of a bundle on validation images, as JSON and a table. Knows the
metrics, not how they are computed."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pipeline.config.data import data_settings
from pipeline.config.experiment import Experiment, to_dict
from pipeline.data.load import load_source
from pipeline.data.source import Source
from pipeline.evaluation.accuracy import ENOUGH, Accuracy
from pipeline.evaluation.elbo_surgery import surgery_metrics
from pipeline.evaluation.emoji import check_split, emoji_metrics
from pipeline.evaluation.forgetting import Forgetting, forgetting
from pipeline.evaluation.metrics import autocast, prior_metrics, tokenizer_metrics
from pipeline.evaluation.shapes import shapes_metrics
from pipeline.inference.pipeline import TextToImagePipeline
from pipeline.runtime.atomic_io import atomic_write_text
from pipeline.runtime.log import on_main_process
from pipeline.stages.finetune import parent_bundle

_log = logging.getLogger(__name__)
_log.addFilter(on_main_process)


@dataclass
class Report:
    """Metrics by name, and the settings they were measured under."""

    metrics: dict[str, float] = field(default_factory=dict)
    settings: dict[str, object] = field(default_factory=dict)
    forgetting: Forgetting | None = None
    """What a fine-tuned bundle lost on the data of its parent, where it has one."""
    accuracies: dict[str, Accuracy] = field(default_factory=dict)
    """Those of the metrics that are accuracies, with their counts and intervals."""

    def add(self, metrics: Mapping[str, float | Accuracy]) -> None:
        """Adds metrics, some of which are accuracies."""
        for name, value in metrics.items():
            if isinstance(value, Accuracy):
                self.accuracies[name] = value
                self.metrics[name] = value.value
            else:
                self.metrics[name] = value

    def table(self) -> str:
        """The metrics, one per line, with the intervals of accuracies; then the settings of
        sampling."""
        width = max(map(len, self.metrics), default=0)
        lines = []
        for name, value in self.metrics.items():
            line = f"  {name:<{width}}  {_readable(name, value)}"
            if name in self.accuracies:
                line = f"{line}  {self.accuracies[name].text()}"
            lines.append(line)
        if self.settings:
            lines.append(f"  measured with {_settings_line(self.settings)}")
        return "\n".join([*lines, self.forgetting.table()] if self.forgetting else lines)

    def save(self, path: Path) -> None:
        """Writes JSON, to a temporary file that is then renamed: the metrics by name, `settings`,
        and under `intervals` the bounds and the count of each accuracy."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content: dict[str, object] = {**self.metrics, "settings": self.settings}
        if self.accuracies:
            content["intervals"] = {
                name: [*accuracy.interval, accuracy.count]
                for name, accuracy in self.accuracies.items()
            }
        if self.forgetting:
            content["forgetting"] = asdict(self.forgetting)
        atomic_write_text(path, json.dumps(content, indent=2) + "\n")


def evaluate(
    bundle: Path,
    experiment: Experiment,
    out: Path | None = None,
    *,
    images: int = 500,
    before: Path | None = None,
) -> Report:
    """Evaluates a bundle on up to `images` held-out images and prompts of an experiment's source.

    Sampling uses the bundle's own defaults and seed 0. One process computes everything. Where the
    experiment starts from a bundle (`init_from`), or one is given as `before`, forgetting is
    measured too.

    Raises:
        ValueError: `images` is below 1, the bundle's images are of another size than the
            experiment's, its emoji were split in another way, or nothing is held out.
    """
    if images < 1:
        raise ValueError(f"images is {images}; it must be at least 1")
    start = time.perf_counter()
    pipe = TextToImagePipeline.from_pretrained(bundle)
    if pipe.tokenizer.image_size != experiment.data.image_size:
        raise ValueError(
            f"the bundle {bundle} makes images of {pipe.tokenizer.image_size} pixels and "
            f"data.image_size is {experiment.data.image_size}; evaluate with the configuration it "
            "was trained with"
        )
    if experiment.data.source == "emoji":
        check_split(pipe, experiment.data)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    held_out = load_source(experiment.data, "held_out", experiment.folder / "data")
    count = min(images, len(held_out))
    if not count:
        raise ValueError(
            "no image is held out, so there is nothing to judge on; raise data.val_fraction"
        )
    report = Report()
    with autocast(pipe, experiment.precision):
        reconstructions = tokenizer_metrics(pipe, held_out, count)
        report.add(reconstructions.metrics | prior_metrics(pipe, held_out, count))
        report.add(_parts_of_elbo(pipe, held_out, torch.from_numpy(reconstructions.real)))
    if experiment.data.source == "shapes":
        report.add(shapes_metrics(pipe, experiment, reconstructions))
    if experiment.data.source == "emoji":
        report.add(emoji_metrics(pipe, experiment))
    _warn_of_few(report.accuracies)
    if before := before or parent_bundle(experiment):
        report.forgetting = forgetting(before, bundle, experiment, images=images)
    report.settings = {
        "bundle": str(bundle),
        "images": count,
        "seed": 0,  # the default of the pipeline, which every image of an evaluation has
        "sampling": to_dict(pipe.defaults),
        "data": data_settings(to_dict(experiment.data)),
        "trained_on": pipe.trained_on,
        "seconds": round(time.perf_counter() - start, 1),
    }
    if out is not None:
        report.save(out)
    return report


def _parts_of_elbo(pipe: TextToImagePipeline, source: Source, images: Tensor) -> dict[str, float]:
    """`surgery_metrics` of the first images (n,H,W,C) of a source."""
    text_ids = pipe.text.encode(source.captions(range(len(images))), truncate=True)
    no_caption = pipe.text.encode([""])
    return surgery_metrics(pipe.tokenizer, pipe.prior, images, text_ids, no_caption)


def _warn_of_few(accuracies: Mapping[str, Accuracy]) -> None:
    """Warns of an accuracy of fewer images than its interval needs to say something."""
    if not accuracies:
        return
    name, fewest = min(accuracies.items(), key=lambda item: item[1].count)
    if fewest.count < ENOUGH:
        _log.warning(
            "%s is of few images (%s); evaluate more (--max-images), or raise data.val_fraction",
            name,
            fewest.text(),
        )


def _settings_line(settings: Mapping[str, object]) -> str:
    """The seed and the sampling options, without those that are off."""
    sampling = settings.get("sampling")
    shown = {"seed": settings.get("seed")} | (sampling if isinstance(sampling, dict) else {})
    return ", ".join(f"{name} {value}" for name, value in shown.items() if value is not None)


def _readable(name: str, value: float) -> str:
    """Fractions as percent; nats, decibels, perplexities and numbers as they are."""
    if name.startswith("distinct_codes"):
        return f"{value:,.0f}"
    plain = name.startswith(("nats", "psnr", "ssim", "codebook_perplexity", "siblings_per_name"))
    plain |= name.startswith(("elbo", "mutual_information", "marginal_kl"))
    return f"{value:.3f}" if plain else f"{value:.1%}"
