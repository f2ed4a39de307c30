"""The text tokenizer of a run: trained on its captions, and checked against their lengths. Knows
captions and the run folder; no images."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Protocol

import numpy as np
from accelerate import Accelerator
from torch import Tensor

from pipeline.config.experiment import Experiment
from pipeline.data.source import Source
from pipeline.runtime.atomic_io import atomic_write_dir
from pipeline.runtime.log import on_main_process
from pipeline.stages.finetune import PretrainedPrior
from pipeline.training.checkpoint import newest_checkpoint
from stage2_prior import TextConfig, TextTokenizer
from stage2_prior.text import CAPTIONS_TO_LEARN, LengthReport

_log = logging.getLogger(__name__)
_log.addFilter(on_main_process)

_ROWS_AT_A_TIME = 1000


class Captions(Protocol):
    """Captions of numbered images."""

    captions_in_all: int

    def __len__(self) -> int:
        """Number of images."""
        ...

    def all_captions(self, indices: Sequence[int]) -> list[list[str]]:
        """All captions of each image."""
        ...


class SourceCaptions:
    """Captions of up to `limit` images of a source that is read in any order, evenly spread."""

    def __init__(self, source: Source, limit: int) -> None:
        count = min(len(source), limit)
        self._captions = source.all_captions([i * len(source) // count for i in range(count)])
        self.captions_in_all = max(sum(map(len, self._captions)), 1)

    def __len__(self) -> int:
        return len(self._captions)

    def all_captions(self, indices: Sequence[int]) -> list[list[str]]:
        """All captions of each image."""
        return [self._captions[i] for i in indices]


def text_tokenizer(
    experiment: Experiment,
    captions: Mapping[str, Captions],
    accelerator: Accelerator,
    origin: PretrainedPrior | None = None,
) -> TextTokenizer:
    """The text tokenizer of the run, saved once every caption fits.

    It is trained on the captions, or is that of the prior to start from, or that of the checkpoint
    from which the prior resumes. A damaged one is trained on the same captions again.

    Args:
        captions: those of `train`, from which it learns, and of other splits.

    Raises:
        ValueError: captions do not fit their slots and are not to be truncated.
    """
    folder = experiment.folder / "text_tokenizer"
    resumes = newest_checkpoint(experiment.folder / "prior" / "checkpoints") is not None
    kept = saved_text_tokenizer(experiment) if resumes else None
    # Every process trains it: that is quick and deterministic, and all see the same error if there
    # is one.
    if kept is not None and origin is None:
        text = kept
        check_lengths(text, captions, truncate=experiment.text.truncate)
    else:  # with an origin also on resume: new entries and their spelling follow from captions
        text = learned_tokenizer(experiment.text, captions, origin)
    if accelerator.is_main_process and kept is None:
        atomic_write_dir(folder, text.save)
    accelerator.wait_for_everyone()
    return TextTokenizer.load(folder)


def learned_tokenizer(
    config: TextConfig, captions: Mapping[str, Captions], origin: PretrainedPrior | None = None
) -> TextTokenizer:
    """The text tokenizer that learns from the captions of `train`, or that `origin` or the
    configuration names; every caption fits it. Writes nothing.

    Raises:
        ValueError: as `text_tokenizer`; or BPE dropout needs another kind of tokenizer.
    """
    learned = chain.from_iterable(caption_batches(captions["train"], CAPTIONS_TO_LEARN))
    if origin is not None:
        text = origin.extend_vocab(learned, config)
        _log.info(origin.pieces(text, next(caption_batches(captions["train"], _ROWS_AT_A_TIME))))
    else:
        text = TextTokenizer.from_config(config, learned)
    check_lengths(text, captions, truncate=config.truncate)
    if config.bpe_dropout:
        random = np.random.default_rng(0)
        text.encode_with_dropout(["a caption"], config.bpe_dropout, random, truncate=True)
    return text


def check_lengths(text: TextTokenizer, captions: Mapping[str, Captions], *, truncate: bool) -> None:
    """Counts the captions that do not fit their slots: logs how many are truncated.

    Raises:
        ValueError: captions do not fit and are not to be truncated.
    """
    lengths = LengthReport(text.length)
    for batch in chain.from_iterable(caption_batches(dataset) for dataset in captions.values()):
        lengths.add(batch, text.lengths(batch))
    lengths.check(truncate=truncate)
    if lengths.too_long:
        _log.info(
            f"{lengths.too_long} of {lengths.count} captions are truncated to "
            f"text.max_length={text.length} slots (text.truncate)"
        )


def saved_text_tokenizer(experiment: Experiment) -> TextTokenizer | None:
    """The text tokenizer of the run; None where it is missing or damaged, which is logged."""
    try:
        return TextTokenizer.load(experiment.folder / "text_tokenizer")
    except ValueError as error:
        _log.warning(f"{error}, or have it learned from the same captions, as now")
        return None


def caption_batches(dataset: Captions, captions: int | None = None) -> Iterator[list[str]]:
    """All captions, in batches of a thousand rows; or about `captions` of them, from evenly spread
    rows."""
    rows = (
        len(dataset)
        if captions is None
        else min(len(dataset), max(len(dataset) * captions // dataset.captions_in_all, 1))
    )
    for first in range(0, rows, _ROWS_AT_A_TIME):
        spread = [
            row * len(dataset) // rows for row in range(first, min(first + _ROWS_AT_A_TIME, rows))
        ]
        yield list(chain.from_iterable(dataset.all_captions(spread)))


def training_ids(
    text: TextTokenizer,
    captions: Sequence[str],
    config: TextConfig,
    random: np.random.Generator,
    *,
    truncate: bool,
) -> Tensor:
    """Captions of a training batch -> text ids (B,T), with BPE dropout where the configuration asks
    for it."""
    if config.bpe_dropout:
        return text.encode_with_dropout(captions, config.bpe_dropout, random, truncate=truncate)
    return text.encode(captions, truncate=truncate)
