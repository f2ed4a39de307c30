"""What would stop a later stage of a run, found before the first step. Knows configurations,
captions and earlier stages; trains nothing."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from pipeline.config.experiment import Experiment
from pipeline.data.codes.dataset import MANIFEST
from pipeline.data.readers.base import NoCaptions
from pipeline.data.source import Source
from pipeline.runtime.distributed import distributed_state
from pipeline.runtime.log import on_main_process
from pipeline.stages.captions import Captions, SourceCaptions, learned_tokenizer
from pipeline.stages.encode import part_plans
from pipeline.stages.finetune import (
    PretrainedPrior,
    check_init_from,
    require_peft,
    tokenizer_identity,
)
from pipeline.stages.latent_prior import CAPTIONS, check_components, latent_sources, refuse_streams
from pipeline.stages.manifest import read_settings, trains_prior, was_begun
from pipeline.stages.prior import check_inference_steps
from pipeline.stages.sources import sources_of
from pipeline.training.auto_batch import has_auto_batch
from stage1_tokenizer import TokenizerModule

_log = logging.getLogger(__name__)
_log.addFilter(on_main_process)

_AT_A_TIME = 1000


def check_run(experiment: Experiment) -> None:
    """Looks at what every stage of a run needs; every process must call.

    Captions are checked until they are encoded: from then on, the prior's training checks them at
    its start.

    Raises:
        NoCaptions: the prior is trained on captions, and there are none.
        ValueError: what a later stage would raise of the configuration or the captions: captions
            that do not fit their slots, a batch that does not split over the processes, more
            sampling steps than codes, a package that is missing.
    """
    section = experiment.prior
    check_init_from(experiment.tokenizer, section, experiment.text.max_length)
    require_peft(section)
    _check_batches(experiment)
    _check_longer_tokenizer(experiment)
    if experiment.tokenizer.model.has_codes:
        check_inference_steps(experiment, TokenizerModule(experiment.tokenizer.model))
        if not (experiment.folder / "codes" / MANIFEST).is_file():
            _check_captions(experiment)
        return
    refuse_streams(experiment)
    sources = latent_sources(experiment)
    check_components(section.latent, len(sources["train"]))
    if section.latent.context_features:
        captions = {split: SourceCaptions(own, CAPTIONS) for split, own in sources.items()}
        learned_tokenizer(experiment.text, captions)


def _check_batches(experiment: Experiment) -> None:
    processes = distributed_state(experiment.process_timeout).num_processes
    trained = {
        "tokenizer": (experiment.tokenizer.train, not experiment.tokenizer.frozen),
        "prior": (experiment.prior.train, trains_prior(experiment)),
    }
    for label, (train, is_trained) in trained.items():
        if not is_trained:
            continue
        if not has_auto_batch(train):
            train.check_processes(label, processes)
        elif train.batch_size != "auto":  # the micro-batches alone are to be found
            replace(train, gradient_accumulation_steps=1).check_processes(label, processes)


def _check_longer_tokenizer(experiment: Experiment) -> None:
    """Raises ValueError where the tokenizer would be trained further and the codes, or the prior of
    its latents, which are those of the tokenizer as it is, would be refused afterwards."""
    folder = experiment.folder
    written = read_settings(folder / "tokenizer")
    if written is None or "held_out" not in written or experiment.tokenizer.frozen:
        return
    before = written["settings"]["train"]["steps"]
    steps = experiment.tokenizer.train.steps
    if steps <= before:
        return
    if (folder / "codes" / MANIFEST).is_file():
        raise ValueError(
            f"tokenizer.train.steps is {steps}, and {folder / 'codes'} holds the codes of the "
            f"tokenizer after {before} steps; choose another name for this run, or move "
            f"{folder / 'codes'} and {folder / 'prior'} away"
        )
    if not experiment.tokenizer.model.has_codes and was_begun(folder / "prior"):
        raise ValueError(
            f"tokenizer.train.steps is {steps}, and {folder / 'prior'} is of the latents of the "
            f"tokenizer after {before} steps; choose another name for this run, or move "
            f"{folder / 'prior'} away"
        )


def _check_captions(experiment: Experiment) -> None:
    """Learns the text tokenizer of the captions that will be encoded, and counts those that do not
    fit it. Of a stream, the first held-out captions are known."""
    try:
        loaded = sources_of(experiment.data, experiment.folder, experiment.process_timeout)
    except NoCaptions as error:
        raise NoCaptions(
            f"{error}\na prior is trained on captions; `minidalle train-tokenizer` and `minidalle "
            "encode` work without them"
        ) from error
    limits = (experiment.encode.max_images, experiment.encode.max_val_images)
    origin = None
    if experiment.prior.init_from:
        fingerprint = tokenizer_identity(experiment.tokenizer)
        assert fingerprint is not None, "the configuration takes both or neither"
        origin = PretrainedPrior(experiment.prior.init_from, fingerprint)
    if all(part.num_images is not None for part in loaded[0].parts):
        splits = zip(("train", "held_out"), loaded, limits, strict=True)
        captions: dict[str, Captions] = {
            split: _PlannedCaptions(source, list(loaded[0].weights), limit)
            for split, source, limit in splits
        }
        learned_tokenizer(experiment.text, captions, origin)
        return
    try:
        learned_tokenizer(experiment.text, {"train": SourceCaptions(loaded[1], CAPTIONS)}, origin)
    except ValueError as error:
        if experiment.text.pretrained or origin:
            raise
        # One that learns from more captions may need fewer slots.
        _log.warning("of the first %d held-out images of the stream: %s", len(loaded[1]), error)


class _PlannedCaptions:
    """The captions of the images that will be encoded, in the order in which they will lie there:
    a text tokenizer learns the same from them."""

    def __init__(self, source: Source, weights: Sequence[float], limit: int | None) -> None:
        self._source = source
        self._rows: list[range] = []
        for part in part_plans(source, weights, limit):
            first = part["first"]
            count = part["rows"]
            assert first is not None and count is not None
            self._rows.append(range(first, first + count))
        every = range(len(self))
        self.captions_in_all = sum(
            len(own)
            for start in every[::_AT_A_TIME]
            for own in self.all_captions(every[start : start + _AT_A_TIME])
        )

    def __len__(self) -> int:
        return sum(map(len, self._rows))

    def all_captions(self, indices: Sequence[int]) -> list[list[str]]:
        """All captions of each image."""
        return self._source.all_captions([self._number(index) for index in indices])

    def _number(self, index: int) -> int:
        for rows in self._rows:
            if index < len(rows):
                return rows[index]
            index -= len(rows)
        raise IndexError(f"there are {len(self)} images")
