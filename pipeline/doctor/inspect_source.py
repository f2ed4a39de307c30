"""One source, looked at: which images training would use, their sizes, what is wrong with the
others, and which are copies.

Knows rows and hashes; knows no tokens and writes nothing. What would stop a training is noted, and
the rest is looked at all the same.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np

from pipeline.config.data import SYNTHETIC_SOURCES, DataConfig
from pipeline.data.readers.base import SkipCounter
from pipeline.data.readers.captions import Captions, captions_of
from pipeline.data.readers.images import EXTENSIONS
from pipeline.data.readers.scan import ScanResult, scan_images, usable
from pipeline.data.source import check_usable
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
)

_T = TypeVar("_T")
_NAMED = 1000
"""Unreadable images that are named."""
_GROUPS, _MEMBERS = 50, 8
"""Groups of copies that are listed, and images that each names."""
_SIDES = (1, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096)
_ASPECTS = (
    (1.05, "square"),
    (1.34, "up to 4:3"),
    (1.51, "up to 3:2"),
    (1.79, "up to 16:9"),
    (2.01, "up to 2:1"),
    (3.01, "up to 3:1"),
)


@dataclass
class Part:
    """A source with what was found out about each of its rows.

    Attributes:
        config: of this source alone.
        opened: its rows; None where it cannot be opened.
        found: sizes and hashes of the rows.
        captions: of each row; None where they cannot be read.
        fit: whether training would use each row (N).
        held_out: whether it is kept from training (N).
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
        assert self.opened is not None and self.found is not None
        if config.source in SYNTHETIC_SOURCES:  # drawn as large as is wanted
            return self.fit
        fit = usable(self.opened.rows, self.found, _tolerant(config), SkipCounter())
        return fit & _captioned(self.captions, len(fit))


def _tolerant(config: DataConfig) -> DataConfig:
    """Settings with which unreadable images stop nothing."""
    return replace(config, filter=replace(config.filter, max_corrupt_fraction=1.0))


def look_at(config: DataConfig, most: int, folder: Path | None) -> Part:
    """Opens a source and every image of it.

    Args:
        most: images to look at of a source that has no end, or that is streamed.
        folder: keeps what was found of each image for a training to come.
    """
    findings: list[Finding] = []
    opened = _tried(lambda: open_source(config, most), findings)
    captions: Captions | None = None
    if opened is None and not config.streaming:
        # What is wrong may be the captions alone.
        opened = _tried(lambda: open_without_captions(config), [])
        tally = SkipCounter()
    elif opened is not None:
        rows, reader, tally = opened.rows, opened.config, SkipCounter()
        captions = _tried(lambda: captions_of(rows, reader, tally), findings)
    if opened is None:
        none = np.zeros(0, bool)
        return Part(config, None, None, None, none, none, SourceReport(config.source), findings)
    rows = opened.rows
    found = scan_images(rows, config.workers, folder)
    fit = _tried(lambda: usable(rows, found, config, tally), findings)
    if fit is None:
        fit = usable(rows, found, _tolerant(config), SkipCounter())
    fit = fit & _captioned(captions, len(fit))
    tallies = (rows.tally, tally)
    if captions is not None and len(findings) == 0:
        lines = [line for one in tallies for line in one.lines()]
        _tried(lambda: check_usable(rows.name, int(fit.sum()), lines), findings)
    held_out = np.array(
        [opened.held_out(row, config.val_fraction) for row in range(len(rows))], bool
    )
    readable = np.array([not problem for problem in found.problem], bool)
    shorter, longer = (
        side(found.width, found.height)[readable] for side in (np.minimum, np.maximum)
    )
    report = SourceReport(
        name=rows.name,
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
        sides=_sides(shorter),
        aspects=_aspects(longer / np.maximum(shorter, 1)),
        modes=ranked(mode for mode in found.mode if mode),
        formats=ranked(
            s
            for row in range(len(rows))
            if (s := PurePosixPath(rows.label(row)).suffix.lower()) in EXTENSIONS
        ),
        duplicates=_duplicates(opened, found, readable, fit, held_out),
    )
    return Part(
        config, opened, found, captions, fit, held_out, report, findings + _doubts(report, config)
    )


def spread(values: np.ndarray) -> Spread | None:
    """None of no numbers."""
    if not len(values):
        return None
    return Spread(
        float(values.min()),
        float(np.median(values)),
        float(np.percentile(values, 99)),
        float(values.max()),
    )


def ranked(values: Iterable[str]) -> list[Bin]:
    """How often each occurs, the most frequent first."""
    return [
        Bin(value, count)
        for value, count in sorted(Counter(values).items(), key=lambda item: (-item[1], item[0]))
    ]


def _tried(work: Callable[[], _T], findings: list[Finding]) -> _T | None:
    """What `work` gives; where it raises what would stop a training, None, and the finding says the
    same words."""
    try:
        return work()
    except (ValueError, OSError) as error:
        findings.append(Finding("fails", str(error)))
        return None


def _captioned(captions: Captions | None, count: int) -> np.ndarray:
    """Whether each row has a caption; all of them where none can be read, so that images can be
    judged on their own."""
    if captions is None:
        return np.ones(count, bool)
    return np.array([bool(captions[row]) for row in range(count)], bool)


def _sides(shorter: np.ndarray) -> list[Bin]:
    counts = np.bincount(np.searchsorted(_SIDES, shorter, side="right") - 1, minlength=len(_SIDES))
    labels = [f"{first} to {after - 1}" for first, after in itertools.pairwise(_SIDES)] + [
        f"{_SIDES[-1]} or more"
    ]
    return [Bin(label, int(count)) for label, count in zip(labels, counts, strict=True) if count]


def _aspects(ratios: np.ndarray) -> list[Bin]:
    counts = np.bincount(
        np.searchsorted([edge for edge, _ in _ASPECTS], ratios), minlength=len(_ASPECTS) + 1
    )
    labels = [label for _, label in _ASPECTS] + ["longer"]
    return [Bin(label, int(count)) for label, count in zip(labels, counts, strict=True) if count]


def _duplicates(
    opened: Opened, found: ScanResult, readable: np.ndarray, fit: np.ndarray, held_out: np.ndarray
) -> Duplicates:
    rows = np.flatnonzero(readable)
    copies = groups_of(found.digest[rows])
    # One of each file: copies are counted, and need not be found to look alike.
    _, firsts = np.unique(found.digest[rows], return_index=True)
    seen = rows[np.sort(firsts)]
    seen = seen[found.look[seen] != 0]
    groups = groups_of(alike(found.look[seen]))

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

    of_files, of_looks = [rows[group] for group in copies], [seen[group] for group in groups]
    return Duplicates(
        copies=sum(len(group) - 1 for group in of_files),
        alike=sum(len(group) - 1 for group in of_looks),
        held_out_copies=across(of_files),
        held_out_alike=across(of_looks),
        plain=int((found.look[rows] == 0).sum()),
        groups=[listed(group) for group in of_files[:_GROUPS]],
        alike_groups=[listed(group) for group in of_looks[:_GROUPS]],
    )


def _doubts(report: SourceReport, config: DataConfig) -> list[Finding]:
    """What would not stop a training, and harm it or surprise its user."""
    name, found = report.name, report.duplicates
    doubts = []

    def say(level: str, condition: object, text: str) -> None:
        if condition:
            doubts.append(Finding("warns" if level == "warns" else "notes", f"{name}: {text}"))

    for left in report.left_out:
        say(
            "warns" if left.count > 0.1 * report.rows else "notes",
            True,
            f"{left.count:,} {left.reason}: {left.names}",
        )
    drawn = config.source in SYNTHETIC_SOURCES
    say(
        "notes" if drawn else "warns",
        found.held_out_copies + found.held_out_alike,
        f"{found.held_out_copies:,} held-out images are copies of training images and "
        f"{found.held_out_alike:,} look like one "
        f"(at most {NEAR} of 64 bits apart), so held-out figures flatter"
        + ("" if drawn else "; remove all but one of each"),
    )
    say(
        "warns",
        found.copies > 0.05 * report.rows,
        f"{found.copies:,} images are copies of others; remove them",
    )
    say(
        "notes",
        found.copies and found.copies <= 0.05 * report.rows,
        f"{found.copies:,} images are copies of others",
    )
    say(
        "notes", found.alike, f"{found.alike:,} images look like others without being the same file"
    )
    say("notes", found.plain, f"{found.plain:,} images are one plain surface")
    several = sum(mode.count for mode in report.modes if "animated" in mode.label)
    say("notes", several, f"of {several:,} images with several frames the first is used")
    say(
        "notes",
        0 < report.usable < 1000,
        f"{report.usable:,} usable images are few: a prior remembers rather than learns",
    )
    say(
        "notes",
        report.first_only,
        f"the first {report.rows:,} images were looked at, of a source that goes on (--max-images)",
    )
    return doubts
