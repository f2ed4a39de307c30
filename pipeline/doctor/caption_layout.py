"""What was understood of a source's layout, and whether its captions look as if it was understood
wrongly: wrapped lines, lists in brackets, tags. Knows rows and texts; no images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from pipeline.config.data import SYNTHETIC_SOURCES
from pipeline.data.readers.base import printable
from pipeline.data.readers.captions import CAPTION_FILES, CaptionReader, Captions
from pipeline.doctor.open_source import Opened
from pipeline.doctor.report import Finding, findings_that_apply

_LOOKED_AT = 10_000
"""Captioned images whose captions are looked at."""
_WIDE = 30
"""Fewest characters of a line that may be wrapped by its width."""
_OPEN = frozenset(
    ("a", "an", "the", "of", "and", "or", "with", "without", "in", "on", "at", "to", "is", "are")
)
"""Words that end no caption."""


def understood(opened: Opened, captions: Captions | None) -> list[tuple[str, str]]:
    """Names and values: which table, which columns, captions per image."""
    facts = list(opened.rows.facts)
    config = opened.config
    if captions is None or config.source in SYNTHETIC_SOURCES:
        return facts
    if not config.streaming and not _from_files(opened):
        reader = CaptionReader(opened.rows.name, opened.rows.columns, config)
        by_template = reader.template is not None
        name = "caption template" if by_template else "caption column"
        facts.append((name, str(reader.template if by_template else reader.columns[0])))
    counts = np.array([len(captions[row]) for row in range(len(captions)) if captions[row]])
    if len(counts):
        varies = counts.min() < counts.max()
        several = f" to {counts.max()}, mean {counts.mean():.1f}" if varies else ""
        facts.append(("captions per image", f"{counts.min()}{several}"))
    return facts


def caption_layout_findings(opened: Opened, captions: Captions) -> list[Finding]:
    """Signs that captions mean something else than what was read."""
    if opened.config.source in SYNTHETIC_SOURCES:
        return []
    rows = range(0, len(captions), max(len(captions) // _LOOKED_AT, 1))
    some = [texts for row in rows if (texts := captions[row])]
    several = [texts for texts in some if len(texts) > 1]
    by_line = opened.config.caption_lines == "each" and _from_files(opened)
    wrapped = wrapped_fraction(several) if by_line else 0.0
    brackets = [texts[0] for texts in some if texts[0][0] in "[{" and texts[0][-1] in "]}"]
    tags = sum(_is_tag_list(texts[0]) for texts in some)
    findings = findings_that_apply(
        (
            wrapped > 0.3,
            "warns",
            f"the captions of {wrapped:.0%} of {len(several):,} images with several lines look "
            "like one caption that is wrapped; set data.caption_lines=joined",
        ),
        (
            len(brackets) > 0.1 * len(some),
            "warns",
            f"{len(brackets):,} of {len(some):,} captions are in brackets, which are read as they "
            f"are ({printable(''.join(brackets[:1]))}); write plain texts",
        ),
        (
            tags > 0.5 * len(some) and not opened.config.tags.vary,
            "notes",
            f"{tags:,} of {len(some):,} captions look like lists of tags; data.tags can shuffle "
            "them or leave some out",
        ),
    )
    return [Finding(one.level, f"{opened.rows.name}: {one.text}") for one in findings]


def wrapped_fraction(several: Sequence[Sequence[str]]) -> float:
    """Fraction of images whose lines look like one text that is wrapped.

    Either a line is grammatically open, or all lines are as wide as their words allow.

    Args:
        several: two or more lines of each image.
    """
    if not several:
        return 0.0
    width = max(len(line) for lines in several for line in lines)
    wrapped = sum(_is_open(lines) or _is_full(lines, width) for lines in several)
    return wrapped / len(several)


def _is_open(lines: Sequence[str]) -> bool:
    """Whether a line goes on in the next one."""
    sentences = lines[0][:1].isupper()
    for line, after in pairwise(lines):
        if line[-1:] in ".!?":
            continue
        last = line.split()[-1].lower()
        if last in _OPEN or line[-1:] in ",-" or (sentences and after[:1].islower()):
            return True
    return False


def _is_full(lines: Sequence[str], width: int) -> bool:
    """Whether the next word would have fitted into no line."""
    return width >= _WIDE and all(
        len(line) + 1 + len(after.split()[0]) > width - 1 for line, after in pairwise(lines)
    )


def _is_tag_list(caption: str) -> bool:
    tags = caption.split(",")
    return len(tags) > 3 and all(len(tag.split()) <= 3 for tag in tags)


def _from_files(opened: Opened) -> bool:
    """Whether captions are lines of text files, and not cells of a column that is named."""
    config = opened.config
    if config.caption_template is not None or config.text_column != "text":
        return False
    return any(name == CAPTION_FILES for name, _ in opened.rows.facts)
