"""The captions of images that training would use: repeated ones, their lengths in characters and
tokens, the vocabulary they use.

Knows texts and the text tokenizer; knows no images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.doctor.inspect_source import Part, spread
from pipeline.doctor.report import Bin, CaptionReport, Finding
from stage2_prior.text import CAPTIONS_TO_LEARN, LengthReport, TextConfig, TextTokenizer

_TOGETHER = 10_000
_REPEATED = 50
_BINS = 12


@dataclass
class Fitted:
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


def fitted(
    parts: Sequence[Part],
    masks: Sequence[np.ndarray],
    train: Sequence[np.ndarray],
    config: TextConfig,
) -> Fitted:
    """Makes the tokenizer that training would make of the captions of some rows, and measures those
    of more.

    Args:
        masks: rows of each part whose captions are measured.
        train: rows of each part that the tokenizer is trained on.

    Raises:
        ValueError: `text.pretrained` cannot be loaded.
    """
    text = TextTokenizer.from_config(config, _spread_out(list(_captions(parts, train))))
    check, lengths, used = LengthReport(config.max_length), [], np.zeros(text.vocab_size, bool)
    for some in _in_batches(_captions(parts, masks)):
        ids = text.token_ids(some)
        needed = [len(one) + 2 for one in ids]
        check.add(some, needed)
        lengths += needed
        used[list(set(chain.from_iterable(ids)))] = True
    return Fitted(np.array(lengths, np.int64), check, text.vocab_size, int(used.sum()))


def captions_report(
    parts: Sequence[Part], config: TextConfig
) -> tuple[CaptionReport | None, list[Finding]]:
    """What the captions are, and what would stop a training; None where there are none."""
    masks = [part.fit for part in parts]
    texts = pa.array(_captions(parts, masks), pa.large_string())
    if not len(texts):
        return None, []
    counts = pc.value_counts(texts)
    numbers = counts.field("counts").to_numpy()
    often = np.argsort(-numbers, kind="stable")[:_REPEATED]
    repeated = [
        Bin(counts.field("values")[int(i)].as_py(), int(numbers[i]))
        for i in often
        if numbers[i] > 1
    ]
    common = set(counts.field("values").filter(pa.array(numbers > 1)).to_pylist())
    shared = sum(any(caption in common for caption in some) for some in _by_picture(parts, masks))
    words = Counter(word for caption in _captions(parts, masks) for word in caption.lower().split())
    damaged = sum("�" in caption for caption in _captions(parts, masks))
    characters = spread(pc.utf8_length(texts).to_numpy())
    assert characters is not None
    findings: list[Finding] = []
    measured: Fitted | None = None
    try:
        measured = fitted(parts, masks, [part.fit & ~part.held_out for part in parts], config)
        measured.check.check(truncate=config.truncate)
    except ValueError as error:
        findings.append(Finding("fails", str(error)))
    report = CaptionReport(
        captions=len(texts),
        distinct=len(counts),
        shared=shared,
        repeated=repeated,
        characters=characters,
        damaged=damaged,
        words=len(words),
        words_once=sum(count == 1 for count in words.values()),
        length=config.max_length,
        tokens=spread(measured.lengths) if measured else None,
        token_bins=_bins(measured.lengths) if measured else [],
        too_long=measured.check.too_long if measured else 0,
        longest=measured.check.worst if measured else "",
        vocabulary=measured.vocabulary if measured else 0,
        vocabulary_used=measured.used if measured else 0,
    )
    return report, findings + _doubts(report, sum(int(mask.sum()) for mask in masks), config)


def _doubts(report: CaptionReport, pictures: int, config: TextConfig) -> list[Finding]:
    found = []
    if report.damaged:
        found.append(
            Finding(
                "warns",
                f"{report.damaged:,} captions hold characters that are not UTF-8; save them in "
                "that encoding",
            )
        )
    if report.shared > 0.5 * pictures:
        found.append(
            Finding(
                "warns",
                f"{report.shared:,} of {pictures:,} images share their caption with another one "
                f"({report.distinct:,} are distinct), "
                "so a prompt says little of an image",
            )
        )
    elif report.shared:
        found.append(
            Finding("notes", f"{report.shared:,} images share their caption with another one")
        )
    if report.too_long and config.truncate:
        found.append(
            Finding(
                "warns",
                f"{report.too_long:,} of {report.captions:,} captions are cut to "
                f"text.max_length={report.length} slots",
            )
        )
    longest = report.tokens.largest if report.tokens else 0
    if longest and longest + 8 <= report.length:
        found.append(
            Finding(
                "notes",
                f"the longest caption needs {longest:.0f} of text.max_length={report.length} "
                "slots; fewer train and draw faster",
            )
        )
    if not config.pretrained and 0 < report.vocabulary < config.vocab_size:
        found.append(
            Finding(
                "notes",
                f"the captions make {report.vocabulary:,} entries of "
                f"text.vocab_size={config.vocab_size}; no more occur twice",
            )
        )
    return found


def _by_picture(parts: Sequence[Part], masks: Sequence[np.ndarray]) -> Iterator[list[str]]:
    for part, mask in zip(parts, masks, strict=True):
        if part.captions is not None:
            for row in np.flatnonzero(mask):
                yield part.captions[int(row)]


def _captions(parts: Sequence[Part], masks: Sequence[np.ndarray]) -> Iterator[str]:
    return chain.from_iterable(_by_picture(parts, masks))


def _in_batches(captions: Iterator[str]) -> Iterator[list[str]]:
    held: list[str] = []
    for caption in captions:
        held.append(caption)
        if len(held) == _TOGETHER:
            yield held
            held = []
    if held:
        yield held


def _spread_out(captions: list[str]) -> list[str]:
    count = min(len(captions), CAPTIONS_TO_LEARN)
    return [captions[i * len(captions) // count] for i in range(count)]


def _bins(lengths: np.ndarray) -> list[Bin]:
    """Bins of one width up to the 99th percentile, and one for the rest."""
    first, last = int(lengths.min()), int(np.percentile(lengths, 99, method="higher"))
    width = -(-(last - first + 1) // _BINS)
    bins = [first + i * width for i in range(-(-(last - first + 1) // width) + 1)]
    counts = np.bincount(np.searchsorted(bins, lengths, side="right") - 1, minlength=len(bins))
    labels = [
        str(start) if width == 1 else f"{start} to {start + width - 1}" for start in bins[:-1]
    ] + [f"{bins[-1]} or more"]
    return [
        Bin(label, int(count))
        for label, count in zip(labels, counts, strict=True)
        if count or label != labels[-1]
    ]
