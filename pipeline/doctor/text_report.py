"""A diagnosis as lines of text for the terminal. Knows words and columns; finds nothing out."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.doctor.report import Bin, CaptionReport, Diagnosis, SourceReport, Spread

_BAR = 40
_SHOWN = 10
_LABEL = 22


def as_table(diagnosis: Diagnosis) -> str:
    """Everything but names and images, which are on the page."""
    lines: list[str] = []
    for source in diagnosis.sources:
        lines += [*source_lines(source), ""]
    if diagnosis.captions is not None:
        lines += [*caption_lines(diagnosis.captions), ""]
    lines.append("findings" if diagnosis.findings else "findings: none")
    lines += [f"  {finding.level:<6}{finding.text}" for finding in diagnosis.findings]
    return "\n".join(lines)


def source_lines(source: SourceReport) -> list[str]:
    """One source, a fact a line."""
    several = source.duplicates
    counts = (
        f"{source.rows:,}{' looked at' if source.first_only else ''}, {source.readable:,} "
        f"readable, {source.usable:,} usable"
    )
    facts = [
        ("pictures", f"{counts} ({source.train:,} to train on, {source.held_out:,} held out)"),
        ("shorter side", pixels(source.shorter_side)),
        ("longer side", pixels(source.longer_side)),
        ("modes", ranking(source.modes)),
        ("formats", ranking(source.formats)),
        (
            "copies",
            f"{several.copies:,}; of held-out images, {several.held_out_copies:,} have one in "
            "training",
        ),
        (
            "alike",
            f"{several.alike:,}; of held-out images, {several.held_out_alike:,} look like one in "
            "training",
        ),
        ("plain surfaces", f"{several.plain:,}"),
    ]
    lines = [source.name, *aligned([(name, fact) for name, fact in facts if fact])]
    lines += [
        *histogram("shorter sides", source.sides),
        *histogram("longer over shorter", source.aspects),
    ]
    lines += [f"  unreadable: {one.name} ({one.problem})" for one in source.unreadable[:_SHOWN]]
    if len(source.unreadable) > _SHOWN:
        lines.append(f"  unreadable: {source.rows - source.readable - _SHOWN:,} more")
    return lines


def caption_lines(captions: CaptionReport) -> list[str]:
    """All captions, a fact a line."""
    facts = [
        (
            "captions",
            f"{captions.captions:,}, {captions.distinct:,} distinct; {captions.shared:,} images "
            "share theirs with another",
        ),
        ("characters", numbers(captions.characters)),
        ("words", f"{captions.words:,} different, {captions.words_once:,} of them once"),
    ]
    if captions.tokens is not None:
        facts += [
            (
                "tokens",
                f"{numbers(captions.tokens)}; {captions.too_long:,} captions need more than "
                f"text.max_length={captions.length}",
            ),
            (
                "vocabulary",
                f"{captions.vocabulary_used:,} of {captions.vocabulary:,} entries used "
                f"({vocabulary_share(captions):.1%})",
            ),
        ]
    return ["captions", *aligned(facts), *histogram("tokens", captions.token_bins)]


def vocabulary_share(captions: CaptionReport) -> float:
    return captions.vocabulary_used / max(captions.vocabulary, 1)


def aligned(facts: Sequence[tuple[str, str]]) -> list[str]:
    return [f"  {name:<{_LABEL}}{fact}" for name, fact in facts]


def histogram(title: str, bins: Sequence[Bin]) -> list[str]:
    """A bar a line; nothing where there is no choice."""
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


def numbers(spread: Spread) -> str:
    return (
        f"{spread.smallest:,.0f} to {spread.largest:,.0f}, median {spread.median:,.0f}, "
        f"99% at most {spread.most:,.0f}"
    )


def pixels(spread: Spread | None) -> str:
    return f"{numbers(spread)} pixels" if spread else ""


def ranking(bins: Sequence[Bin]) -> str:
    return ", ".join(f"{one.label} {one.count:,}" for one in bins[:_SHOWN]) + (
        ", ..." if len(bins) > _SHOWN else ""
    )
