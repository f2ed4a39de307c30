"""A diagnosis as lines of text for the terminal, and its facts in words. Finds nothing out
itself."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.data.readers.base import printable
from pipeline.doctor.report import Bin, CaptionReport, Diagnosis, SourceReport, Spread

_BAR = 40
_SHOWN = 10
_LABEL = 23

Facts = list[tuple[str, str]]
"""Pairs of a name and its value in words."""


def as_table(diagnosis: Diagnosis) -> str:
    """Everything but names and images, which are on the page."""
    lines: list[str] = []
    for source in diagnosis.sources:
        lines += [*_source_lines(source), ""]
    if diagnosis.captions is not None:
        facts = caption_facts(diagnosis.captions)
        lines += ["captions", *_aligned(facts)]
        lines += [*_histogram("tokens", diagnosis.captions.token_bins), ""]
    lines.append("findings" if diagnosis.findings else "findings: none")
    lines += [f"  {finding.level:<6}{finding.text}" for finding in diagnosis.findings]
    return "\n".join(lines)


def source_facts(source: SourceReport) -> Facts:
    """One source in words, for the terminal and for the page."""
    found = source.duplicates
    counts = f"{source.rows:,}{' looked at (of more)' if source.first_only else ''}"
    understood = [
        ("layout", source.layout),
        *source.understood,
        ("columns", ", ".join(map(printable, source.columns))),
        ("splits", source.splits),
    ]
    facts = [
        *((name, fact) for name, fact in understood if fact),
        (
            "images",
            f"{counts}, {source.readable:,} readable, {source.usable:,} usable "
            f"({source.train:,} to train on, {source.held_out:,} held out)",
        ),
    ]
    for name, side in (("shorter", source.shorter_side), ("longer", source.longer_side)):
        if side is not None:
            facts.append((f"{name} side", f"{_numbers(side)} pixels"))
    if source.transparent:
        facts.append(("transparency", f"{source.transparent:,} images"))
    if source.values:
        facts.append(("values", source.values))
    return [
        *facts,
        (
            "copies of other files",
            f"{found.copies:,}; {found.held_out_copies:,} held-out images have one in training",
        ),
        (
            "alike, but no copies",
            f"{found.alike:,}; {found.held_out_alike:,} held-out images look like one in training",
        ),
        ("plain surfaces", f"{found.plain:,}"),
    ]


def caption_facts(captions: CaptionReport) -> Facts:
    """All captions in words, for the terminal and for the page."""
    facts = [
        (
            "captions",
            f"{captions.captions:,}, {captions.distinct:,} distinct; {captions.shared:,} images "
            "share theirs with another",
        ),
        ("characters", _numbers(captions.characters)),
        ("words", f"{captions.words:,} different, {captions.words_once:,} of them once"),
    ]
    if captions.tokens is not None:
        used = captions.vocabulary_used / max(captions.vocabulary, 1)
        facts += [
            (
                "tokens",
                f"{_numbers(captions.tokens)}; {captions.too_long:,} captions need more than "
                f"text.max_length={captions.length}",
            ),
            (
                "vocabulary",
                f"{captions.vocabulary_used:,} of {captions.vocabulary:,} entries used "
                f"({used:.1%})",
            ),
        ]
    return facts


def _source_lines(source: SourceReport) -> list[str]:
    ranked = [("modes", _ranking(source.modes)), ("formats", _ranking(source.formats))]
    facts = source_facts(source) + [(name, labels) for name, labels in ranked if labels]
    lines = [source.name, *_aligned(facts)]
    lines += _histogram("shorter sides", source.sides)
    lines += _histogram("longer over shorter", source.aspects)
    lines += [f"  unreadable: {one.name} ({one.problem})" for one in source.unreadable[:_SHOWN]]
    if len(source.unreadable) > _SHOWN:
        lines.append(f"  unreadable: {source.rows - source.readable - _SHOWN:,} more")
    return lines


def _aligned(facts: Facts) -> list[str]:
    return [f"  {name:<{_LABEL}}{fact}" for name, fact in facts]


def _histogram(title: str, bins: Sequence[Bin]) -> list[str]:
    """A line per bar; none where there are fewer than two bars."""
    if len(bins) < 2:
        return []
    most = max(one.count for one in bins)
    return [
        f"  {title}",
        *(
            f"    {one.label:<{_LABEL - 2}}{one.count:>10,} {'#' * -(-one.count * _BAR // most)}"
            for one in bins
        ),
    ]


def _numbers(spread: Spread) -> str:
    return (
        f"{spread.smallest:,.0f} to {spread.largest:,.0f}, median {spread.median:,.0f}, "
        f"99% at most {spread.most:,.0f}"
    )


def _ranking(bins: Sequence[Bin]) -> str:
    more = ", ..." if len(bins) > _SHOWN else ""
    return ", ".join(f"{one.label} {one.count:,}" for one in bins[:_SHOWN]) + more
