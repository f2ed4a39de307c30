"""One source: which images training would use, their sizes, what is wrong with the others, and
which are copies.

Knows rows and hashes; knows no tokens and writes nothing. What would stop a training is noted, and
the rest is inspected all the same.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal, ParamSpec, TypeVar

import numpy as np

from pipeline.config.data import SYNTHETIC_SOURCES, DataConfig
from pipeline.data.readers.base import Rows, SkipCounter, held_out_of
from pipeline.data.readers.captions import LISTS, Captions, captions_of
from pipeline.data.readers.images import EXTENSIONS
from pipeline.data.readers.paths import FOLDED
from pipeline.data.readers.scan import ScanResult, scan_images, usable
from pipeline.data.readers.splits import copies_of_held_out
from pipeline.data.readers.value_range import dark_images, values_report, with_value_range
from pipeline.data.source import check_usable
from pipeline.doctor.caption_layout import caption_layout_findings, understood
from pipeline.doctor.near_duplicates import NEAR, alike, groups_of
from pipeline.doctor.open_source import Opened, open_source, open_without_captions
from pipeline.doctor.report import (
    Bin,
    Duplicates,
    Finding,
    Group,
    LeftOut,
    SourceReport,
    Spread,
    Unreadable,
    findings_that_apply,
)

_P = ParamSpec("_P")
_T = TypeVar("_T")
_NAMED = 1000
"""Unreadable images that are named."""
_KEPT = (FOLDED, LISTS)
"""Reasons for which nothing is left out."""
_GROUPS = 50
"""Groups of copies that are listed."""
_MEMBERS = 8
"""Images that each group names."""
_WITHOUT_CAPTIONS = (
    "images without captions can be used by `minidalle train-tokenizer`, `encode` and `codebook`, "
    "and by priors of Gaussian latents with prior.latent.context_features=0"
)
_SIDES = (1, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096)
_ASPECTS = {
    "square": 1.05,
    "up to 4:3": 1.34,
    "up to 3:2": 1.51,
    "up to 16:9": 1.79,
    "up to 2:1": 2.01,
    "up to 3:1": 3.01,
}
"""The largest ratio of each."""


@dataclass
class Part:
    """A source with what was found out about each of its rows.

    Attributes:
        config: of this source alone.
        opened: its rows; None where it cannot be opened.
        found: sizes and hashes of the rows.
        captions: of each row; None where they cannot be read.
        fit: whether training would use each row (N).
        held_out: whether it is held out (N).
        report: of it, for the user.
        findings: about it.
    """

    config: DataConfig
    opened: Opened | None
    found: ScanResult | None
    captions: Captions | None
    fit: np.ndarray
    held_out: np.ndarray
    report: SourceReport
    findings: list[Finding]

    def fit_for(self, config: DataConfig) -> np.ndarray:
        """Whether training with other settings would use each row (N)."""
        if config.source in SYNTHETIC_SOURCES:  # rendered at any size
            return self.fit
        assert self.opened is not None and self.found is not None
        return _fit(self.opened.rows, self.found, self.captions, _tolerant(config), SkipCounter())


def inspect_source(config: DataConfig, most: int, folder: Path | None) -> Part:
    """Opens a source and every image of it.

    Args:
        most: images to read of a source that is unlimited, or that is streamed.
        folder: keeps what was found of each image for a training to come.
    """
    findings: list[Finding] = []
    tally = SkipCounter()
    captions: Captions | None = None
    opened = _tried(findings, open_source, config, most)
    if opened is not None:
        captions = _tried(findings, captions_of, opened.rows, opened.config, tally)
    else:
        # What is wrong may be the captions alone.
        opened = _tried([], open_without_captions, config, most)
    if opened is None:
        none = np.zeros(0, bool)
        return Part(config, None, None, None, none, none, SourceReport(config.source), findings)
    rows = opened.rows
    found = scan_images(rows, config.workers, folder, max_pixels=config.max_pixels)
    fit = _tried(findings, _fit, rows, found, captions, config, tally)
    if fit is None:
        fit = _fit(rows, found, captions, _tolerant(config), SkipCounter())
    tallies = (rows.tally, tally)
    if captions is not None and not findings:
        problems = [line for one in tallies for line in one.lines()]
        _tried(findings, check_usable, rows.name, int(fit.sum()), problems)
    config = _tried(findings, with_value_range, config, rows, found) or config
    if dark := dark_images(found, rows):
        findings.append(Finding("fails", dark))
    held_out = held_out_of(rows, fit, config.val_fraction)
    report = replace(
        _report(opened, found, fit, held_out, tallies, values_report(config, found)),
        understood=understood(opened, captions),
    )
    if captions is None:
        findings.append(Finding("notes", f"{rows.name}: {_WITHOUT_CAPTIONS}"))
    else:
        findings += caption_layout_findings(opened, captions)
    findings += [Finding("notes", f"{rows.name}: {line}") for line in rows.problems]
    findings += _doubts(report, config)
    return Part(config, opened, found, captions, fit, held_out, report, findings)


def _tried(
    findings: list[Finding], work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs
) -> _T | None:
    """What `work` gives. Where it raises what would stop a training, None, and a finding has the
    same words."""
    try:
        return work(*args, **kwargs)
    except (ValueError, OSError) as error:
        findings.append(Finding("fails", str(error)))
        return None


def _fit(
    rows: Rows, found: ScanResult, captions: Captions | None, config: DataConfig, tally: SkipCounter
) -> np.ndarray:
    """Whether training would use each row (N): see `usable`. Where captions cannot be read, images
    are judged on their own."""
    fit = usable(rows, found, config, tally)
    fit &= ~copies_of_held_out(rows, found.digest, tally)
    if captions is None:
        return fit
    fit &= np.array([bool(captions[row]) for row in range(len(rows))], bool)
    return fit


def _tolerant(config: DataConfig) -> DataConfig:
    """The same, however many images cannot be read."""
    return replace(config, filter=replace(config.filter, max_corrupt_fraction=1.0))


def _report(
    opened: Opened,
    found: ScanResult,
    fit: np.ndarray,
    held_out: np.ndarray,
    tallies: Sequence[SkipCounter],
    values: str,
) -> SourceReport:
    rows = opened.rows
    readable = np.array([not problem for problem in found.problem], bool)
    shorter = np.minimum(found.width, found.height)[readable]
    longer = np.maximum(found.width, found.height)[readable]
    side_labels = [f"{first} to {after - 1}" for first, after in itertools.pairwise(_SIDES)]
    sides = binned(shorter, _SIDES[1:], [*side_labels, f"{_SIDES[-1]} or more"])
    ratios = longer / np.maximum(shorter, 1)
    aspects = binned(ratios, list(_ASPECTS.values()), [*_ASPECTS, "longer"], side="left")
    endings = [PurePosixPath(rows.label(row)).suffix.lower() for row in range(len(rows))]
    return SourceReport(
        name=rows.name,
        layout=rows.layout,
        columns=list(rows.columns),
        splits=_splits(rows, opened.config),
        rows=len(rows),
        readable=int(readable.sum()),
        usable=int(fit.sum()),
        train=int((fit & ~held_out).sum()),
        held_out=int((fit & held_out).sum()),
        first_only=opened.first_only,
        left_out=[
            LeftOut(reason, count, one.first(reason))
            for one in tallies
            for reason, count in one.counts().items()
        ],
        unreadable=[
            Unreadable(rows.label(int(row)), found.problem[row])
            for row in np.flatnonzero(~readable)[:_NAMED]
        ],
        shorter_side=spread(shorter),
        longer_side=spread(longer),
        sides=[one for one in sides if one.count],
        aspects=[one for one in aspects if one.count],
        modes=_ranked(mode for mode in found.mode if mode),
        transparent=int(found.transparent.sum()),
        values=values,
        formats=_ranked(ending for ending in endings if ending in EXTENSIONS),
        duplicates=_duplicates(opened, found, readable, fit, held_out),
    )


def _splits(rows: Rows, config: DataConfig) -> str:
    """What is held out and why, in words."""
    if rows.note or rows.held_out is not None:
        return rows.note.removeprefix("splits ")
    return f"none named; held out are {config.val_fraction:g} of the images by a hash of names"


def spread(values: np.ndarray) -> Spread | None:
    """None of no numbers."""
    if not len(values):
        return None
    percentile = float(np.percentile(values, 99))
    return Spread(float(values.min()), float(np.median(values)), percentile, float(values.max()))


def binned(
    values: np.ndarray,
    edges: Sequence[float],
    labels: Sequence[str],
    side: Literal["left", "right"] = "right",
) -> list[Bin]:
    """How many values lie below the first edge, between each two, and above the last one. A value
    on an edge lies to this side of it."""
    counts = np.bincount(np.searchsorted(edges, values, side=side), minlength=len(labels))
    return [Bin(label, int(count)) for label, count in zip(labels, counts, strict=True)]


def _ranked(values: Iterable[str]) -> list[Bin]:
    """How often each occurs, the most frequent first."""
    ranking = sorted(Counter(values).items(), key=lambda item: (-item[1], item[0]))
    return [Bin(value, count) for value, count in ranking]


def _duplicates(
    opened: Opened, found: ScanResult, readable: np.ndarray, fit: np.ndarray, held_out: np.ndarray
) -> Duplicates:
    rows = np.flatnonzero(readable)
    copies = [rows[group] for group in groups_of(found.digest[rows])]
    # One of each file: copies are counted, and need not be found to look alike.
    _, firsts = np.unique(found.digest[rows], return_index=True)
    seen = rows[np.sort(firsts)]
    seen = seen[found.look[seen] != 0]
    look_alikes = [seen[group] for group in groups_of(alike(found.look[seen]))]

    def listed(members: np.ndarray) -> Group:
        some = [int(row) for row in members[:_MEMBERS]]
        return Group(
            len(members),
            some,
            [opened.rows.label(row) for row in some],
            [bool(held_out[row]) for row in some],
        )

    def across(groups: list[np.ndarray]) -> int:
        """Held-out images with another one of their group in training."""
        used = (group[fit[group]] for group in groups)
        return sum(int(held_out[group].sum()) for group in used if not held_out[group].all())

    return Duplicates(
        copies=sum(len(group) - 1 for group in copies),
        alike=sum(len(group) - 1 for group in look_alikes),
        held_out_copies=across(copies),
        held_out_alike=across(look_alikes),
        plain=int((found.look[rows] == 0).sum()),
        groups=[listed(group) for group in copies[:_GROUPS]],
        alike_groups=[listed(group) for group in look_alikes[:_GROUPS]],
    )


def _doubts(report: SourceReport, config: DataConfig) -> list[Finding]:
    """What would not stop a training, and harm it or surprise its user."""
    found = report.duplicates
    synthetic = config.source in SYNTHETIC_SOURCES
    many_copies = found.copies > 0.05 * report.rows
    animated = sum(mode.count for mode in report.modes if "animated" in mode.label)
    doubts = findings_that_apply(
        *(
            (
                True,
                "warns" if left.count > 0.1 * report.rows and left.reason not in _KEPT else "notes",
                f"{left.count:,} {left.reason}: {left.names}",
            )
            for left in report.left_out
        ),
        (
            found.held_out_copies or found.held_out_alike,
            "notes" if synthetic else "warns",
            f"{found.held_out_copies:,} held-out images are copies of training images and "
            f"{found.held_out_alike:,} look like one (at most {NEAR} of 64 bits apart), so "
            "held-out metrics flatter" + ("" if synthetic else "; keep one of each"),
        ),
        (
            found.copies,
            "warns" if many_copies else "notes",
            f"{found.copies:,} images are copies of others" + ("; keep one of each" * many_copies),
        ),
        (
            found.alike,
            "notes",
            f"{found.alike:,} images look like others without being the same file",
        ),
        (found.plain, "notes", f"{found.plain:,} images are one plain surface"),
        (
            report.transparent and config.alpha != "keep",
            "notes",
            f"{report.transparent:,} images have transparency, which is laid on {config.alpha}; "
            "set data.alpha=keep and tokenizer.model.channels=4 to keep it",
        ),
        (animated, "notes", f"of {animated:,} images with several frames the first is used"),
        (
            0 < report.usable < 1000,
            "notes",
            f"{report.usable:,} usable images are few: a prior remembers rather than learns; add "
            "more",
        ),
        (
            report.first_only,
            "notes",
            f"the first {report.rows:,} images were looked at, of a source that goes on "
            "(max_images)",
        ),
    )
    return [replace(one, text=f"{report.name}: {one.text}") for one in doubts]
