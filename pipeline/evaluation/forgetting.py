"""What fine-tuning cost and gained: figures of the old data and the new, before and after. Knows
bundles, not how they were made."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from pipeline.config.data import DataConfig
from pipeline.config.experiment import Experiment
from pipeline.config.load import from_dict
from pipeline.data.load import load_source
from pipeline.data.source import Source
from pipeline.evaluation.metrics import prior_metrics, tokenizer_metrics
from pipeline.inference.pipeline import TextToImagePipeline
from pipeline.runtime.devices import uses_bf16

OLD, NEW = "old data", "new data"


@dataclass
class Forgetting:
    """Figures by data (`old data`, `new data`), then by name, then `before` and `after`."""

    figures: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What is missing, and what may not be compared."""

    def table(self) -> str:
        """A line for each data and figure: before, after, and the difference."""
        rows = [("", "", "before", "after", "change")]
        for data, figures in self.figures.items():
            for name, value in figures.items():
                before, after = value["before"], value["after"]
                rows.append((data, name, f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}"))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        aligned = [
            [
                cell.ljust(w) if i < 2 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ]
            for row in rows
        ]
        lines = [
            "what fine-tuning changed:",
            *map("  ".join, aligned),
            *(f"note: {note}" for note in self.notes),
        ]
        return "\n".join(f"  {line}".rstrip() for line in lines)


def forgetting(
    before: Path, after: Path, experiment: Experiment, *, pictures: int = 500
) -> Forgetting:
    """Compares a bundle with the one that it was started from, on up to `pictures` held-out
    images of each one's data. PSNR only where the tokenizers differ. Where the old data are not
    there any more, a note says so in place of their figures.

    Args:
        before: the bundle started from; it says what the old data are.
        after: the fine-tuned one.
        experiment: says what the new data are.

    Raises:
        FileNotFoundError: one of the folders is no bundle.
        ValueError: the bundles' images are of unlike size, or nothing is held out.
    """
    pipes = {
        "before": TextToImagePipeline.from_pretrained(before),
        "after": TextToImagePipeline.from_pretrained(after),
    }
    old, new = pipes["before"], pipes["after"]
    if old.tokenizer.image_size != new.tokenizer.image_size:
        raise ValueError(
            f"{before} makes images of {old.tokenizer.image_size} pixels and {after} of "
            f"{new.tokenizer.image_size}; a bundle is "
            "compared with the one that it was started from"
        )
    result = Forgetting()
    sources: dict[str, Source] = {}
    try:
        config = from_dict(DataConfig, old.trained_on["data"])
        sources[OLD] = load_source(config, "held_out", experiment.folder / "data-before")
        if sources[OLD].fingerprint != old.trained_on["sources"]["held_out"]:
            result.notes.append("the old data have changed since the bundle was trained on them")
    except (KeyError, TypeError, ValueError, OSError) as error:
        why = (
            f"the bundle does not say what they are ({error!r})"
            if isinstance(error, KeyError | TypeError)
            else str(error)
        )
        result.notes.append(
            "the old data cannot be read, so what was forgotten is not known: "
            f"{' '.join(why.split())}"
        )
    sources[NEW] = load_source(experiment.data, "held_out", experiment.folder / "data")
    other_codes = old.tokenizer.fingerprint != new.tokenizer.fingerprint
    if other_codes:
        result.notes.append(
            "the tokenizers differ: nats per code are of other codes before and after"
        )
    if old.text.fast.get_vocab() != new.text.fast.get_vocab():
        result.notes.append(
            "the vocabularies differ: a text token is another piece of a caption before and after"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for data, source in sources.items():
        count = min(pictures, len(source))
        if not count:
            raise ValueError(
                f"no image of the {data} is held out, so there is nothing to judge on; raise "
                "data.val_fraction"
            )
        for when, pipe in pipes.items():
            metrics: dict[str, float] = {}
            pipe.to(device)
            bf16 = uses_bf16(experiment.precision, pipe.tokenizer.device)
            with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=bf16):
                if other_codes:
                    metrics |= tokenizer_metrics(pipe, source, count).metrics
                metrics |= prior_metrics(pipe, source, count)
            for name in ("nats_per_code", "nats_per_text_token", "psnr"):
                if name in metrics:
                    result.figures.setdefault(data, {}).setdefault(name, {})[when] = metrics[name]
    return result
