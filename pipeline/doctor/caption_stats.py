"""The captions of images that training would use: repeated ones, their lengths in characters and
tokens, the vocabulary they use.

Knows texts and the text tokenizer; knows no images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.doctor.inspect_source import Part, binned, spread
from pipeline.doctor.report import Bin, CaptionReport, Finding, findings_that_apply
from stage2_prior.text import CAPTIONS_TO_LEARN, LengthReport, TextConfig, TextTokenizer

_BATCH = 10_000
_REPEATED = 50
_BINS = 12


@dataclass
class TokenCounts:
    """How captions fit a text tokenizer.

    Attributes:
        lengths: slots that each caption needs (N).
        check: of their lengths against the configured one.
        vocabulary, used: entries of the tokenizer, and those that occur.
    """

    lengths: np.ndarray
    check: LengthReport
    vocabulary: int
    used: int


def count_tokens(
    parts: Sequence[Part],
    masks: Sequence[np.ndarray],
    train: Sequence[np.ndarray],
    config: TextConfig,
) -> TokenCounts:
    """Makes the tokenizer that training would make, and measures captions with it.

    Args:
        masks: rows of each part whose captions are measured.
        train: rows of each part that the tokenizer is trained on.

    Raises:
        ValueError: `text.pretrained` cannot be loaded.
    """
    all_texts = list(_captions(parts, train))
    count = min(len(all_texts), CAPTIONS_TO_LEARN)
    spread_out = [all_texts[i * len(all_texts) // count] for i in range(count)]
    text = TextTokenizer.from_config(config, spread_out)
    check = LengthReport(config.max_length)
    used = np.zeros(text.vocab_size, bool)
    lengths: list[int] = []
    captions = _captions(parts, masks)
    while batch := list(islice(captions, _BATCH)):
        ids = text.token_ids(batch)
        needed = [len(one) + 2 for one in ids]  # with start and end
        check.add(batch, needed)
        lengths += needed
        used[list(set(chain.from_iterable(ids)))] = True
    return TokenCounts(np.array(lengths, np.int64), check, text.vocab_size, int(used.sum()))


def captions_report(
    parts: Sequence[Part], config: TextConfig
) -> tuple[CaptionReport | None, list[Finding]]:
    """What the captions are, and what would stop a training; None where there are none."""
    masks = [part.fit for part in parts]
    texts = pa.array(_captions(parts, masks), pa.large_string())
    characters = spread(pc.utf8_length(texts).to_numpy())
    if characters is None:
        return None, []
    counts = pc.value_counts(texts)
    numbers = counts.field("counts").to_numpy()
    most_frequent = np.argsort(-numbers, kind="stable")[:_REPEATED]
    common = set(counts.field("values").filter(pa.array(numbers > 1)).to_pylist())
    words = Counter(word for caption in _captions(parts, masks) for word in caption.lower().split())
    report = CaptionReport(
        captions=len(texts),
        distinct=len(counts),
        shared=sum(not common.isdisjoint(some) for some in _by_image(parts, masks)),
        repeated=[
            Bin(counts.field("values")[int(i)].as_py(), int(numbers[i]))
            for i in most_frequent
            if numbers[i] > 1
        ],
        characters=characters,
        damaged=sum("\ufffd" in caption for caption in _captions(parts, masks)),
        words=len(words),
        words_once=sum(count == 1 for count in words.values()),
        length=config.max_length,
    )
    findings: list[Finding] = []
    try:
        counted = count_tokens(parts, masks, [part.fit & ~part.held_out for part in parts], config)
        report = replace(
            report,
            tokens=spread(counted.lengths),
            token_bins=_bins(counted.lengths),
            too_long=counted.check.too_long,
            longest=counted.check.worst,
            vocabulary=counted.vocabulary,
            vocabulary_used=counted.used,
        )
        counted.check.check(truncate=config.truncate)
    except ValueError as error:
        findings.append(Finding("fails", str(error)))
    return report, findings + _doubts(report, sum(int(mask.sum()) for mask in masks), config)


def _doubts(report: CaptionReport, images: int, config: TextConfig) -> list[Finding]:
    longest = report.tokens.largest if report.tokens else 0
    return findings_that_apply(
        (
            report.damaged,
            "warns",
            f"{report.damaged:,} captions hold characters that are not UTF-8; save them in that "
            "encoding",
        ),
        (
            report.shared > 0.5 * images,
            "warns",
            f"{report.shared:,} of {images:,} images share their caption with another one "
            f"({report.distinct:,} are distinct), so a prompt says little of an image; write "
            "captions that differ",
        ),
        (
            0 < report.shared <= 0.5 * images,
            "notes",
            f"{report.shared:,} images share their caption with another one",
        ),
        (
            report.too_long and config.truncate,
            "warns",
            f"{report.too_long:,} of {report.captions:,} captions are truncated to "
            f"text.max_length={report.length} slots; raise it to keep their ends",
        ),
        (
            longest and longest + 8 <= report.length,
            "notes",
            f"the longest caption needs {longest:.0f} of text.max_length={report.length} slots; "
            "a lower text.max_length trains and samples faster",
        ),
        (
            not config.pretrained and 0 < report.vocabulary < config.vocab_size,
            "notes",
            f"the captions make {report.vocabulary:,} entries of "
            f"text.vocab_size={config.vocab_size}; no more occur twice",
        ),
    )


def _by_image(parts: Sequence[Part], masks: Sequence[np.ndarray]) -> Iterator[list[str]]:
    for part, mask in zip(parts, masks, strict=True):
        if part.captions is not None:
            for row in np.flatnonzero(mask):
                yield part.captions[int(row)]


def _captions(parts: Sequence[Part], masks: Sequence[np.ndarray]) -> Iterator[str]:
    return chain.from_iterable(_by_image(parts, masks))


def _bins(lengths: np.ndarray) -> list[Bin]:
    """Bins of one width up to the 99th percentile, and one for the rest."""
    first = int(lengths.min())
    last = int(np.percentile(lengths, 99, method="higher"))
    width = -(-(last - first + 1) // _BINS)
    *starts, rest = range(first, last + width + 1, width)
    labels = [str(start) if width == 1 else f"{start} to {start + width - 1}" for start in starts]
    bins = binned(lengths, [*starts[1:], rest], [*labels, f"{rest} or more"])
    return bins if bins[-1].count else bins[:-1]
