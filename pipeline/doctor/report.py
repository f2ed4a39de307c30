"""What the doctor finds, as plain values: `Diagnosis` and its parts. Knows no files and finds
nothing out itself.

Every value can be written as JSON (`dataclasses.asdict`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Level = Literal["fails", "warns", "notes"]


@dataclass(frozen=True)
class Finding:
    """One thing that a user should know.

    Attributes:
        level: `fails`: training would stop with this message; `warns`: it would suffer; `notes`:
            good to know.
        text: what is wrong and what to do.
    """

    level: Level
    text: str


def findings_that_apply(*findings: tuple[object, Level, str]) -> list[Finding]:
    """Findings from rows of (whether it applies, level, text)."""
    return [Finding(level, text) for applies, level, text in findings if applies]


@dataclass(frozen=True)
class LeftOut:
    """Images or captions that training leaves out for one reason.

    Attributes:
        reason: why.
        count: how many.
        names: the first of them.
    """

    reason: str
    count: int
    names: str


@dataclass(frozen=True)
class Unreadable:
    """An image that cannot be read: its name and why."""

    name: str
    problem: str


@dataclass(frozen=True)
class Bin:
    """One bar of a histogram: what it counts, and how many there are."""

    label: str
    count: int


@dataclass(frozen=True)
class Spread:
    """Smallest, median, 99th percentile and largest of many numbers."""

    smallest: float
    median: float
    most: float
    """The 99th percentile."""
    largest: float


@dataclass(frozen=True)
class Group:
    """Images that are the same, or look the same.

    Attributes:
        count: images in the group.
        rows: the first of them, as rows of their source.
        names: of these rows.
        held_out: whether these are held out.
    """

    count: int
    rows: list[int]
    names: list[str]
    held_out: list[bool]


@dataclass(frozen=True)
class Duplicates:
    """Images that occur several times.

    Attributes:
        copies: images whose file is that of an earlier one.
        alike: further images that look like an earlier one without being the same file, after
            scaling or compression.
        held_out_copies, held_out_alike: held-out images with a copy, or a look-alike, in training.
        plain: images that are one plain surface; they all look alike, so no group has them.
        groups: the largest groups of copies.
        alike_groups: the largest groups of images that look alike.
    """

    copies: int = 0
    alike: int = 0
    held_out_copies: int = 0
    held_out_alike: int = 0
    plain: int = 0
    groups: list[Group] = field(default_factory=list)
    alike_groups: list[Group] = field(default_factory=list)


@dataclass(frozen=True)
class SourceReport:
    """One source.

    Attributes:
        name: as given.
        layout: how the source was understood.
        columns: what captions can be made of.
        splits: what the data hold out, or that a hash chooses it.
        rows: images that were read.
        readable: of these, those that can be decoded.
        usable: of these, those that training would use, by size and caption.
        train, held_out: the two splits of the usable ones.
        first_only: whether the source may have more images.
        understood: names and values: which table, columns and caption files.
        left_out: by reason.
        unreadable: images that cannot be read, at most a thousand.
        shorter_side, longer_side: in pixels; None where no image can be read.
        sides: histogram of shorter sides.
        aspects: histogram of the longer over the shorter side.
        modes: Pillow's modes, the most frequent first.
        transparent: images of which some pixel is not opaque.
        values: those of images with more than 8 bits per value, and which are black and white; ''
            where there are no such images.
        formats: by file ending.
        duplicates: copies and images that look alike.
    """

    name: str
    layout: str = ""
    columns: list[str] = field(default_factory=list)
    splits: str = ""
    rows: int = 0
    readable: int = 0
    usable: int = 0
    train: int = 0
    held_out: int = 0
    first_only: bool = False
    understood: list[tuple[str, str]] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    unreadable: list[Unreadable] = field(default_factory=list)
    shorter_side: Spread | None = None
    longer_side: Spread | None = None
    sides: list[Bin] = field(default_factory=list)
    aspects: list[Bin] = field(default_factory=list)
    modes: list[Bin] = field(default_factory=list)
    transparent: int = 0
    values: str = ""
    formats: list[Bin] = field(default_factory=list)
    duplicates: Duplicates = field(default_factory=Duplicates)


@dataclass(frozen=True)
class CaptionReport:
    """The captions of all usable images.

    Attributes:
        captions: their number, over all images.
        distinct: number of different ones.
        shared: images that have a caption in common with another one.
        repeated: the most frequent captions of several images, with their numbers of images.
        characters: length of a caption in characters.
        damaged: captions with characters that could not be read in UTF-8.
        words, words_once: different words, and those that occur once.
        length: text slots of the stream, `text.max_length`.
        tokens: slots that a caption needs, its start and end included; None where there is no
            tokenizer.
        token_bins: histogram of the same.
        too_long: captions that need more.
        longest: the longest caption.
        vocabulary: entries of the tokenizer.
        vocabulary_used: entries that occur in the captions.
    """

    captions: int
    distinct: int
    shared: int
    repeated: list[Bin]
    characters: Spread
    damaged: int
    words: int
    words_once: int
    length: int
    tokens: Spread | None = None
    token_bins: list[Bin] = field(default_factory=list)
    too_long: int = 0
    longest: str = ""
    vocabulary: int = 0
    vocabulary_used: int = 0


@dataclass(frozen=True)
class Suggestion:
    """A configuration that suits the data.

    Attributes:
        values: the settings, as they stand in the YAML.
        reasons: a line per setting.
    """

    values: dict[str, object]
    reasons: list[str]


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was found.

    Attributes:
        sources: a report per source; several of a mixture.
        captions: None where there are none.
        findings: those that would stop a training first.
        suggestion: None where these data cannot train with any configuration.
    """

    sources: list[SourceReport]
    captions: CaptionReport | None
    findings: list[Finding]
    suggestion: Suggestion | None

    @property
    def fails(self) -> bool:
        """Whether training would stop."""
        return any(finding.level == "fails" for finding in self.findings)
