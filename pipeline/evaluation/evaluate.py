"""`evaluate`: every metric of a bundle on validation images, as JSON and a table. Knows the
metrics, not how they are computed."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.config.experiment import Experiment, to_dict
from pipeline.data.load import load_source
from pipeline.inference.pipeline import TextToImagePipeline
from pipeline.runtime.atomic_io import atomic_write_text
from pipeline.runtime.devices import uses_bf16
from pipeline.stages.finetune import parent_bundle

if TYPE_CHECKING:
    from pipeline.evaluation.forgetting import Forgetting
from pipeline.evaluation.metrics import prior_metrics, tokenizer_metrics


@dataclass
class Report:
    """Figures by name, and the settings they were taken under."""

    figures: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    forgetting: Forgetting | None = None
    """What was lost on the data that it was fine-tuned from, where it was."""

    def table(self) -> str:
        """The figures, one a line."""
        width = max(map(len, self.figures), default=0)
        lines = [
            f"  {name:<{width}}  {_readable(name, value)}" for name, value in self.figures.items()
        ]
        return "\n".join([*lines, self.forgetting.table()] if self.forgetting else lines)

    def save(self, path: Path) -> None:
        """Writes JSON beside and renames it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content: dict[str, Any] = {**self.figures, "settings": self.settings}
        if self.forgetting:
            content["forgetting"] = asdict(self.forgetting)
        atomic_write_text(path, json.dumps(content, indent=2) + "\n")


def evaluate(
    bundle: Path,
    experiment: Experiment,
    out: Path | None = None,
    *,
    pictures: int = 500,
    before: Path | None = None,
) -> Report:
    """Judges a bundle on up to `pictures` held-out images and prompts of the experiment's source.

    Sampling uses the bundle's own defaults and seed 0. On several processes only the first one
    works. Where the experiment starts from a bundle (`init_from`), or one is given as `before`,
    what was forgotten since is reported too.

    Raises:
        ValueError: the bundle's images are of another size than the experiment's, or nothing is
            held out.
    """
    start = time.perf_counter()
    pipe = TextToImagePipeline.from_pretrained(bundle)
    if pipe.tokenizer.image_size != experiment.data.image_size:
        raise ValueError(
            f"the bundle {bundle} makes images of {pipe.tokenizer.image_size} pixels and "
            "data.image_size is "
            f"{experiment.data.image_size}; evaluate with the configuration it was trained with"
        )
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    held_out = load_source(experiment.data, "held_out", experiment.folder / "data")
    count = min(pictures, len(held_out))
    if not count:
        raise ValueError(
            "no image is held out, so there is nothing to judge on; raise data.val_fraction"
        )
    bf16 = uses_bf16(experiment.precision, pipe.tokenizer.device)
    report = Report()
    with torch.no_grad(), torch.autocast(pipe.tokenizer.device.type, torch.bfloat16, enabled=bf16):
        reconstructions = tokenizer_metrics(pipe, held_out, count)
        report.figures |= reconstructions.metrics | prior_metrics(pipe, held_out, count)
    if experiment.data.source == "shapes":
        from pipeline.evaluation.shapes import shapes_figures

        shapes_figures(
            report.figures, pipe, experiment, reconstructions.real, reconstructions.drawn, count
        )
    if experiment.data.source == "emoji":
        from pipeline.evaluation.emoji import emoji_figures

        emoji_figures(report.figures, pipe, experiment)
    if before := before or parent_bundle(experiment):
        from pipeline.evaluation.forgetting import forgetting

        report.forgetting = forgetting(before, bundle, experiment, pictures=pictures)
    report.settings = {
        "bundle": str(bundle),
        "pictures": count,
        "sampling": to_dict(pipe.defaults),
        "trained_on": pipe.trained_on,
        "seconds": round(time.perf_counter() - start, 1),
    }
    if out is not None:
        report.save(out)
    return report


def _readable(name: str, value: float) -> str:
    """Shares as percent; nats, decibels and perplexities as they are."""
    plain = name.startswith(("nats", "psnr", "ssim", "codebook_perplexity"))
    return f"{value:.3f}" if plain else f"{value:.1%}"
