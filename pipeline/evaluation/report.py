"""`evaluate`: every figure of a bundle on held-out pictures, as JSON and a table. Knows the metrics, not how they are computed."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pipeline.checkpoints import write_file
from pipeline.config import Experiment, to_dict
from pipeline.data.sources import Source, load_source
from pipeline.evaluation.pictures import psnr, ssim
from pipeline.origins import bundle_of
from pipeline.runtime import uses_bf16
from pipeline.text_to_image import TextToImagePipeline
from stage1_tokenizer import codebook_statistics, count_codes, counts_by_level, to_model_range
from stage2_prior import OrderSchedule, PriorObjective, PriorObjectiveConfig

if TYPE_CHECKING:
    from pipeline.evaluation.forgetting import Forgetting

BATCH = 64


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
        lines = [f"  {name:<{width}}  {_readable(name, value)}" for name, value in self.figures.items()]
        return "\n".join([*lines, self.forgetting.table()] if self.forgetting else lines)

    def save(self, path: Path) -> None:
        """Writes JSON beside and renames it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content: dict[str, Any] = {**self.figures, "settings": self.settings}
        if self.forgetting:
            content["forgetting"] = asdict(self.forgetting)
        write_file(path, json.dumps(content, indent=2) + "\n")


def evaluate(bundle: Path, experiment: Experiment, out: Path | None = None, *, pictures: int = 500, before: Path | None = None) -> Report:
    """Judges a bundle on up to `pictures` held-out pictures and prompts of the experiment's source.

    Sampling uses the bundle's own defaults and seed 0. On several processes only the first one works. Where the experiment starts from
    a bundle (`init_from`), or one is given as `before`, what was forgotten since is reported too.

    Raises:
        ValueError: the bundle's pictures are of another size than the experiment's, or nothing is held out.
    """
    start = time.perf_counter()
    pipe = TextToImagePipeline.from_pretrained(bundle)
    if pipe.tokenizer.image_size != experiment.data.image_size:
        raise ValueError(
            f"the bundle {bundle} makes pictures of {pipe.tokenizer.image_size} pixels and data.image_size is "
            f"{experiment.data.image_size}; evaluate with the configuration it was trained with"
        )
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    held_out = load_source(experiment.data, "held_out", experiment.folder / "data")
    count = min(pictures, len(held_out))
    if not count:
        raise ValueError("no picture is held out, so there is nothing to judge on; raise data.held_out")
    bf16 = uses_bf16(experiment.precision, pipe.tokenizer.device)
    report = Report()
    with torch.no_grad(), torch.autocast(pipe.tokenizer.device.type, torch.bfloat16, enabled=bf16):
        true, drawn = tokenizer_figures(report, pipe, held_out, count)
        prior_figures(report, pipe, held_out, count)
    if experiment.data.source == "shapes":
        from pipeline.evaluation.shapes import shapes_figures

        shapes_figures(report.figures, pipe, experiment, true, drawn, count)
    if experiment.data.source == "emoji":
        from pipeline.evaluation.emoji import emoji_figures

        emoji_figures(report.figures, pipe, experiment)
    if before := before or bundle_of(experiment):
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


def tokenizer_figures(report: Report, pipe: TextToImagePipeline, source: Source, count: int) -> tuple[np.ndarray, np.ndarray]:
    """PSNR (mean over pictures), SSIM, codebook usage and perplexity; returns true and reconstructed pictures."""
    tokenizer = pipe.tokenizer
    layout = tokenizer.layout
    histogram = torch.zeros(sum(level.num_codes for level in layout), dtype=torch.long)
    true, drawn = [], []
    for first in range(0, count, BATCH):
        images = source.images(range(first, min(first + BATCH, count)))
        codes = tokenizer.encode(to_model_range(torch.from_numpy(images)).to(tokenizer.device))
        histogram += count_codes(codes.cpu(), layout)
        true.append(images)
        drawn.append(np.stack([np.asarray(image) for image in tokenizer.to_images(codes)]))
    truth, reconstruction = np.concatenate(true), np.concatenate(drawn)
    report.figures["psnr"] = float(np.mean([min(psnr(a, b), 99.0) for a, b in zip(truth, reconstruction, strict=True)]))
    report.figures["ssim"] = ssim(truth, reconstruction)
    for name, counts in counts_by_level(histogram, layout).items():
        statistics = codebook_statistics(counts)
        report.figures[f"codebook_usage{name}"] = float(statistics.usage)
        report.figures[f"codebook_perplexity{name}"] = float(statistics.perplexity)
    return truth, reconstruction


def prior_figures(report: Report, pipe: TextToImagePipeline, source: Source, count: int) -> None:
    """Held-out nats per code and per text token."""
    tokenizer, device = pipe.tokenizer, pipe.prior.device

    def batches():
        for first in range(0, count, BATCH):
            rows = range(first, min(first + BATCH, count))
            codes = tokenizer.encode(to_model_range(torch.from_numpy(source.images(rows))).to(device)).flatten(1)
            yield {"text_ids": pipe.text.encode(source.captions(rows), truncate=True).to(device), "codes": codes}

    # As it was trained: the objective writes into the prior what may be asked of it.
    config = PriorObjectiveConfig(caption_dropout=0.1 if _guided(pipe) else 0.0)
    trained = pipe.prior.config
    objective = PriorObjective(pipe.prior, config, OrderSchedule(order=trained.trained_order), 0.5 if trained.trained_image_first else 0.0)
    figures = objective.evaluate(batches())
    pipe.prior.eval()
    report.figures |= {
        name: figures[name] for name in ("nats_per_code", "nats_per_text_token", "nats_per_caption_token") if name in figures
    }


def _guided(pipe: TextToImagePipeline) -> bool:
    return bool(pipe.prior.config.trained_with_caption_dropout)


def _readable(name: str, value: float) -> str:
    """Shares as percent; nats, decibels and perplexities as they are."""
    plain = name.startswith(("nats", "psnr", "ssim", "codebook_perplexity"))
    return f"{value:.3f}" if plain else f"{value:.1%}"
