"""`evaluate`: every metric of a bundle on validation images, as JSON and a table. Knows the
metrics, not how they are computed."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from pipeline.config.experiment import Experiment, to_dict
from pipeline.data.load import load_source
from pipeline.evaluation.emoji import emoji_metrics
from pipeline.evaluation.forgetting import Forgetting, forgetting
from pipeline.evaluation.metrics import autocast, prior_metrics, tokenizer_metrics
from pipeline.evaluation.shapes import shapes_metrics
from pipeline.inference.pipeline import TextToImagePipeline
from pipeline.runtime.atomic_io import atomic_write_text
from pipeline.stages.finetune import parent_bundle


@dataclass
class Report:
    """Metrics by name, and the settings they were measured under."""

    metrics: dict[str, float] = field(default_factory=dict)
    settings: dict[str, object] = field(default_factory=dict)
    forgetting: Forgetting | None = None
    """What a fine-tuned bundle lost on the data of its parent, where it has one."""

    def table(self) -> str:
        """The metrics, one per line."""
        width = max(map(len, self.metrics), default=0)
        lines = [
            f"  {name:<{width}}  {_readable(name, value)}" for name, value in self.metrics.items()
        ]
        return "\n".join([*lines, self.forgetting.table()] if self.forgetting else lines)

    def save(self, path: Path) -> None:
        """Writes JSON, to a temporary file that is then renamed."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content: dict[str, object] = {**self.metrics, "settings": self.settings}
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
            experiment's, or nothing is held out.
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
        report.metrics |= reconstructions.metrics | prior_metrics(pipe, held_out, count)
    if experiment.data.source == "shapes":
        report.metrics |= shapes_metrics(pipe, experiment, reconstructions)
    if experiment.data.source == "emoji":
        report.metrics |= emoji_metrics(pipe, experiment)
    if before := before or parent_bundle(experiment):
        report.forgetting = forgetting(before, bundle, experiment, images=images)
    report.settings = {
        "bundle": str(bundle),
        "images": count,
        "sampling": to_dict(pipe.defaults),
        "trained_on": pipe.trained_on,
        "seconds": round(time.perf_counter() - start, 1),
    }
    if out is not None:
        report.save(out)
    return report


def _readable(name: str, value: float) -> str:
    """Fractions as percent; nats, decibels and perplexities as they are; counts as integers."""
    if name.startswith("distinct_codes"):
        return f"{value:,.0f}"
    plain = name.startswith(("nats", "psnr", "ssim", "codebook_perplexity"))
    return f"{value:.3f}" if plain else f"{value:.1%}"
