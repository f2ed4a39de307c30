"""`diagnose`: everything that can be found out about the data before a training. Knows the order of
the checks; each has its file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.config.data import DataConfig
from pipeline.data.source import check_splits
from pipeline.data.streaming.samples import streams
from pipeline.doctor.caption_stats import captions_report
from pipeline.doctor.inspect_source import Part, inspect_source
from pipeline.doctor.report import Diagnosis, Finding
from pipeline.doctor.suggest_config import LARGEST, suggest
from stage2_prior.text import TextConfig

IMAGES = 10_000
"""Images to read of a source that is unlimited, or that is streamed."""


def diagnose(
    config: DataConfig,
    *,
    text: TextConfig | None = None,
    images: int = IMAGES,
    largest: int = LARGEST,
    folder: Path | None = None,
) -> Diagnosis:
    """Reads the whole source and reports what is in it, what would stop a training on it, and which
    configuration suits it.

    Args:
        config: the data.
        text: how captions become ids; the default where absent.
        images: images to read of a source that is unlimited, or that is streamed.
        largest: largest image size to suggest.
        folder: keeps what was found of each image, for a training to come (RUN/data).

    Raises:
        ValueError, OSError: nothing of the source can be opened; with a mixture, nothing of any
            part.
    """
    return diagnose_parts(config, text=text, images=images, largest=largest, folder=folder)[0]


def diagnose_parts(
    config: DataConfig,
    *,
    text: TextConfig | None = None,
    images: int = IMAGES,
    largest: int = LARGEST,
    folder: Path | None = None,
) -> tuple[Diagnosis, list[Part]]:
    """As `diagnose`, with the parts that it was made from, whose images can be shown."""
    text = text or TextConfig()
    configs = [
        config.of_part(part, streaming=config.streaming and streams(part.source))
        for part in config.mix
    ] or [config]
    parts = [inspect_source(own, images, folder) for own in configs]
    findings = [finding for part in parts for finding in part.findings]
    if all(part.opened is None for part in parts):
        raise ValueError("; ".join(finding.text for finding in findings))
    if not any(finding.level == "fails" for finding in findings):
        findings += _splits(config, parts)
    about, doubts = captions_report(parts, text)
    # What stops a training comes first, whoever found it.
    findings = sorted(
        findings + doubts, key=lambda finding: ("fails", "warns", "notes").index(finding.level)
    )
    try:
        suggestion = suggest(config, text, parts, largest)
    except ValueError:  # text.pretrained cannot be loaded, which is among the findings
        suggestion = None
    return Diagnosis([part.report for part in parts], about, findings, suggestion), parts


def _splits(config: DataConfig, parts: Sequence[Part]) -> list[Finding]:
    held_out = sum(part.report.held_out for part in parts)
    for part in parts:
        seen = None if part.config.streaming else part.report.train
        try:
            check_splits(config, part.report.name, seen, part.report.held_out, held_out)
        except ValueError as error:
            return [Finding("fails", str(error))]
    return []
