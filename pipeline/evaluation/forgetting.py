"""What fine-tuning cost and gained: metrics on the old data and the new, before and after. Knows
bundles, not how they were made."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from pipeline.config.data import DataConfig, as_setting
from pipeline.config.experiment import Experiment
from pipeline.config.load import from_dict
from pipeline.data.load import load_source
from pipeline.data.source import Source, more_held_out
from pipeline.evaluation.metrics import autocast, prior_metrics, tokenizer_metrics
from pipeline.inference.pipeline import TextToImagePipeline
from pipeline.runtime.network import network_forbidden

OLD = "old data"
NEW = "new data"


@dataclass
class Forgetting:
    """Metrics by data (`old data`, `new data`), then by name, then `before` and `after`."""

    metrics: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What is missing, and what may not be compared."""

    def table(self) -> str:
        """A line per data and metric: before, after, and the difference."""
        width = max((len(name) for one in self.metrics.values() for name in one), default=0)
        lines = ["what fine-tuning changed:"]
        lines.append(f"{'':{len(OLD) + 2 + width}}   before    after   change")
        for data, metrics in self.metrics.items():
            for name, value in metrics.items():
                before, after = value["before"], value["after"]
                numbers = f"{before:7.3f}  {after:7.3f}  {after - before:+7.3f}"
                lines.append(f"{data}  {name:<{width}}  {numbers}")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(f"  {line}" for line in lines)


def forgetting(
    before: str | Path, after: str | Path, experiment: Experiment, *, images: int = 500
) -> Forgetting:
    """Compares a bundle with its parent on up to `images` held-out images of each one's data.

    PSNR is measured only where the tokenizers differ. If the old data are missing, a note replaces
    their metrics.

    Args:
        before: the parent, whose `trained_on` names the old data.
        after: the fine-tuned bundle.
        experiment: names the new data.

    Raises:
        FileNotFoundError: one of the folders is no bundle.
        ValueError: `images` is below 1, a bundle has no codes, the bundles' images differ in size,
            or nothing is held out.
    """
    if images < 1:
        raise ValueError(f"images is {images}; it must be at least 1")
    old = TextToImagePipeline.from_pretrained(before)
    new = TextToImagePipeline.from_pretrained(after)
    for pipe in (old, new):
        pipe.tokenizer.require_codes("comparing with an earlier bundle")
    if old.tokenizer.size != new.tokenizer.size:
        raise ValueError(
            f"{before} makes images of {as_setting(old.tokenizer.size)} pixels and {after} of "
            f"{as_setting(new.tokenizer.size)}; compare it with the bundle that it was started "
            "from"
        )
    result = Forgetting()
    sources: dict[str, Source] = {}
    try:
        sources[OLD] = _old_source(old, experiment)
        if sources[OLD].fingerprint != old.trained_on["sources"]["held_out"]:
            result.notes.append("the old data have changed since the bundle was trained on them")
    except (ValueError, OSError) as error:
        result.notes.append(
            "the old data cannot be read, so forgetting is not measured: "
            + " ".join(str(error).split())
        )
    sources[NEW] = load_source(experiment.data, "held_out", experiment.folder / "data")
    other_codes = old.tokenizer.fingerprint != new.tokenizer.fingerprint
    if other_codes:
        result.notes.append(
            "the tokenizers differ: nats per code are of other codes before and after"
        )
    if old.text.backend.get_vocab() != new.text.backend.get_vocab():
        result.notes.append(
            "the vocabularies differ: a text token is another piece of a caption before and after"
        )
    for data, source in sources.items():
        count = min(images, len(source))
        if not count:
            own = experiment.data if data == NEW else _old_data(old)
            raise ValueError(
                f"no image of the {data} is held out, so there is nothing to judge on; "
                + more_held_out(own.source, own.val_fraction)
            )
        for when, pipe in (("before", old), ("after", new)):
            metrics = _metrics(pipe, source, count, experiment.precision, with_psnr=other_codes)
            for name, value in metrics.items():
                result.metrics.setdefault(data, {}).setdefault(name, {})[when] = value
        # One of the two may model no text.
        found = result.metrics[data]
        result.metrics[data] = {name: found[name] for name in found if len(found[name]) == 2}
    return result


def _old_data(old: TextToImagePipeline) -> DataConfig:
    try:
        return from_dict(DataConfig, old.trained_on["data"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"the bundle does not describe them ({error!r})") from error


def _old_source(old: TextToImagePipeline, experiment: Experiment) -> Source:
    config = _old_data(old)
    with network_forbidden("the bundle"):
        return load_source(config, "held_out", experiment.folder / "data-before")


def _metrics(
    pipe: TextToImagePipeline, source: Source, count: int, precision: str, *, with_psnr: bool
) -> dict[str, float]:
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    with autocast(pipe, precision):
        metrics = prior_metrics(pipe, source, count)
        if with_psnr:
            metrics |= tokenizer_metrics(pipe, source, count).metrics
    names = ("nats_per_code", "nats_per_text_token", "psnr")
    return {name: metrics[name] for name in names if name in metrics}
