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

from pipeline.config.data import as_setting, data_settings
from pipeline.config.experiment import Experiment, to_dict
from pipeline.data.builtin.icons import IconSource
from pipeline.data.load import load_source
from pipeline.data.source import Source, more_held_out
from pipeline.evaluation.accuracy import ENOUGH, Accuracy
from pipeline.evaluation.elbo_surgery import is_stochastic, surgery_metrics
from pipeline.evaluation.emoji import check_split, emoji_metrics
from pipeline.evaluation.forgetting import Forgetting, forgetting
from pipeline.evaluation.icons import icon_metrics
from pipeline.evaluation.latents import latent_metrics
from pipeline.evaluation.likelihood import likelihood_metrics
from pipeline.evaluation.mean import Mean
from pipeline.evaluation.metrics import autocast, check_channels, prior_metrics, tokenizer_metrics
from pipeline.evaluation.shapes import shapes_metrics
from pipeline.inference.bundle import add_metrics
from pipeline.inference.latent_pipeline import LatentPipeline
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
    estimates: dict[str, Accuracy | Mean] = field(default_factory=dict)
    """Those of the metrics that have an interval, with their counts."""
    seconds: float = 0.0
    """What the evaluation took."""

    def add(self, metrics: Mapping[str, float | Accuracy | Mean]) -> None:
        """Adds metrics, some of which have an interval."""
        for name, value in metrics.items():
            if isinstance(value, (Accuracy, Mean)):
                self.estimates[name] = value
                self.metrics[name] = value.value
            else:
                self.metrics[name] = value

    def table(self) -> str:
        """The metrics, one per line, with their intervals; then the settings of sampling."""
        width = max(map(len, self.metrics), default=0)
        lines = []
        for name, value in self.metrics.items():
            line = f"  {name:<{width}}  {_readable(name, value)}"
            if name in self.estimates:
                line = f"{line}  {self.estimates[name].text()}"
            lines.append(line)
        if self.settings:
            lines.append(f"  measured with {_settings_line(self.settings)}")
        return "\n".join([*lines, self.forgetting.table()] if self.forgetting else lines)

    def save(self, path: Path) -> None:
        """Writes JSON, to a temporary file that is then renamed: the metrics by name, `settings`,
        and under `intervals` the bounds and the count of each that has an interval. `seconds` is in
        a file of its own next to it, NAME.times.json: the metrics of the same bundle are the same
        file."""
        content: dict[str, object] = {**self.metrics, "settings": self.settings}
        if self.estimates:
            content["intervals"] = {
                name: [*estimate.interval, estimate.count]
                for name, estimate in self.estimates.items()
            }
        if self.forgetting:
            content["forgetting"] = asdict(self.forgetting)
        atomic_write_text(path, json.dumps(content, indent=2) + "\n")
        times = json.dumps({"seconds": round(self.seconds, 1)}) + "\n"
        atomic_write_text(path.with_name(f"{path.stem}.times.json"), times)


def evaluate(
    bundle: str | Path,
    experiment: Experiment,
    out: Path | None = None,
    *,
    images: int = 500,
    before: str | Path | None = None,
) -> Report:
    """Evaluates a bundle on up to `images` held-out images and prompts of an experiment's source.

    Sampling uses the bundle's own defaults and seed 0. One process computes everything. Where the
    experiment starts from a bundle (`init_from`), or one is given as `before`, forgetting is
    measured too. The metrics of the experiment's own bundle, if written to `out`, are added to its
    model card.

    Raises:
        ValueError: `images` is below 1, the bundle's images are of another size than the
            experiment's, its emoji were split in another way, or nothing is held out. Or bundles
            are compared, and one has no codes.
    """
    if images < 1:
        raise ValueError(f"images is {images}; it must be at least 1")
    start = time.perf_counter()
    pipe = TextToImagePipeline.from_pretrained(bundle)
    if pipe.tokenizer.size != experiment.data.size:
        raise ValueError(
            f"the bundle {bundle} makes images of {as_setting(pipe.tokenizer.size)} pixels and "
            f"data.image_size is {as_setting(experiment.data.size)}; evaluate with the "
            "configuration it was trained with"
        )
    check_channels(f"the bundle {bundle}", pipe.tokenizer, experiment.data.channels)
    # What would be found out after the whole evaluation.
    if out is not None and out.is_dir():
        raise ValueError(f"{out} is a folder; give a file for the metrics, such as {out}/out.json")
    if before:
        pipe.tokenizer.require_codes("comparing with an earlier bundle")
        TextToImagePipeline.from_pretrained(before)
    if experiment.data.source == "emoji":
        check_split(pipe, experiment.data)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    held_out = held_out_source(experiment)
    count = min(images, len(held_out))
    if not count:
        raise ValueError(
            "no image is held out, so there is nothing to judge on; "
            + more_held_out(experiment.data.source, experiment.data.val_fraction)
        )
    report = Report()
    if isinstance(pipe, LatentPipeline):
        with autocast(pipe, experiment.precision):
            report.add(latent_metrics(pipe, held_out, count))
    else:
        report.add(_codes_metrics(pipe, experiment, held_out, count, images))
        before = before or parent_bundle(experiment)
    report.add(likelihood_metrics(pipe, held_out, count))
    # In fp32, as the bits per dimension, of which these are the parts.
    report.add(_parts_of_elbo(pipe, held_out, count))
    _warn_of_few(report.estimates)
    if before:
        report.forgetting = forgetting(before, bundle, experiment, images=images)
    report.settings = {
        "bundle": str(bundle),
        "fingerprints": {"tokenizer": pipe.tokenizer.fingerprint, "prior": pipe.prior.fingerprint},
        "images": count,
        "seed": 0,  # the default of the pipeline, which every image of an evaluation has
        "sampling": to_dict(pipe.defaults),
        "data": data_settings(to_dict(experiment.data)),
        "trained_on": pipe.trained_on,
    }
    report.seconds = time.perf_counter() - start
    if out is not None:
        report.save(out)
        if is_own(experiment, bundle):
            add_metrics(experiment.folder / "bundle", out)
    return report


def is_own(experiment: Experiment, bundle: str | Path) -> bool:
    """Whether a bundle is that of the experiment's run."""
    return Path(bundle).expanduser().resolve() == (experiment.folder / "bundle").resolve()


def _codes_metrics(
    pipe: TextToImagePipeline, experiment: Experiment, held_out: Source, count: int, images: int
) -> dict[str, float | Accuracy]:
    """Metrics of a bundle with codes, on `count` held-out images; of icons, samples are of up to
    `images` of each kind of cell."""
    with autocast(pipe, experiment.precision):
        reconstructions = tokenizer_metrics(pipe, held_out, count)
        metrics: dict[str, float | Accuracy] = {
            **reconstructions.metrics,
            **prior_metrics(pipe, held_out, count),
        }
    if experiment.data.source == "shapes":
        metrics |= shapes_metrics(pipe, experiment, reconstructions)
    if experiment.data.source == "emoji":
        metrics |= emoji_metrics(pipe, experiment, images)
    if experiment.data.source == "icons":
        metrics |= icon_metrics(pipe, experiment, images)
    return metrics


def held_out_source(experiment: Experiment) -> Source:
    """Validation images with captions; where no image has one and the prior reads none, all. Of
    icons, the drawings that no setting was chosen by, if there are any."""
    if experiment.data.source == "icons":
        source = IconSource(experiment.data, "reported")
        if len(source):
            return source
    try:
        return load_source(experiment.data, "held_out", experiment.folder / "data")
    except ValueError:
        if experiment.sees_captions:
            raise
        folder = experiment.folder / "data"
        return load_source(experiment.data, "held_out", folder, require_captions=False)


def _parts_of_elbo(
    pipe: TextToImagePipeline | LatentPipeline, source: Source, count: int
) -> dict[str, float]:
    """`surgery_metrics` of the first `count` images of a source."""
    if not is_stochastic(pipe.tokenizer):
        return {}
    images = torch.from_numpy(source.images(range(count)))
    text_ids = pipe.text.encode(source.captions(range(count)), truncate=True)
    return surgery_metrics(pipe.tokenizer, pipe.prior, images, text_ids, pipe.text.encode([""]))


def _warn_of_few(estimates: Mapping[str, Accuracy | Mean]) -> None:
    """Warns of an estimate by fewer images than its interval needs to say something."""
    if not estimates:
        return
    name, fewest = min(estimates.items(), key=lambda item: item[1].count)
    if fewest.count < ENOUGH:
        _log.warning(
            "%s is of few images (%s); evaluate on more images, or hold out more",
            name,
            fewest.text(),
        )


def _settings_line(settings: Mapping[str, object]) -> str:
    """The seed and the sampling options, without those that are off."""
    sampling = settings.get("sampling")
    shown = {"seed": settings.get("seed")} | (sampling if isinstance(sampling, dict) else {})
    return ", ".join(f"{name} {value}" for name, value in shown.items() if value is not None)


def _readable(name: str, value: float) -> str:
    """Fractions as percent; nats, bits, decibels, perplexities and numbers as they are."""
    if name.startswith("distinct_codes"):
        return f"{value:,.0f}"
    plain = name.startswith(("nats", "psnr", "ssim", "codebook_perplexity", "siblings_per_name"))
    plain |= name.startswith(("elbo", "mutual_information", "marginal_kl"))
    plain |= name.endswith("bits_per_dimension")
    return f"{value:.3f}" if plain else f"{value:.1%}"
