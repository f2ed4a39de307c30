"""Stage 2: trains a prior on a codes dataset. Knows the run folder; see `training` for the loop."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from pipeline.config.experiment import Experiment, to_dict
from pipeline.data.codes.dataset import CodesDataset, check_tokenizer
from pipeline.data.sampler import BatchSampler
from pipeline.inference.pipeline import TextToImagePipeline
from pipeline.runtime.atomic_io import atomic_write_dir
from pipeline.runtime.devices import should_compile, uses_bf16
from pipeline.runtime.image_grid import picture_grid
from pipeline.runtime.log import on_main_process
from pipeline.stages.finetune import LoRAAdapter, PretrainedPrior, check_init_from
from pipeline.stages.manifest import (
    begin_stage,
    finalize_stage,
    is_complete,
    load_complete,
    with_resolved_batch,
    write_stage_settings,
)
from pipeline.stages.run_lock import with_run_lock
from pipeline.stages.tokenizer import EVALUATION_BATCH, save_sample
from pipeline.training.auto_batch import has_auto_batch, resolve_auto_batch
from pipeline.training.checkpoint import newest_checkpoint
from pipeline.training.task import Task
from pipeline.training.trainer import fit
from stage1_tokenizer import ImageTokenizer
from stage2_prior import ImagePrior, Level, PriorObjective, StreamConfig, TextTokenizer
from stage2_prior.text import CAPTIONS_TO_LEARN, LengthReport

_log = logging.getLogger(__name__)
_log.addFilter(on_main_process)

_ROWS_AT_A_TIME = 1000


@with_run_lock
def train_prior(experiment: Experiment) -> Path:
    """Stage 2 on the codes dataset; returns `RUN/prior` (the text tokenizer lies in
    `RUN/text_tokenizer`)."""
    folder = experiment.folder / "prior"
    train = with_resolved_batch(experiment.prior.train, folder)
    tokenizer = load_complete(
        ImageTokenizer.from_pretrained, experiment.folder / "tokenizer", "train-tokenizer"
    )
    codes = {
        split: CodesDataset(experiment.folder / "codes", split) for split in ("train", "held_out")
    }
    check_tokenizer(codes["train"].manifest, tokenizer.fingerprint, experiment.folder / "codes")
    check_init_from(experiment)
    origin = (
        PretrainedPrior(experiment.prior.init_from, tokenizer.fingerprint)
        if experiment.prior.init_from
        else None
    )
    settings = _settings(
        replace(experiment, prior=replace(experiment.prior, train=train)), codes["train"], origin
    )
    if is_complete(folder, settings):
        return folder
    accelerator = begin_stage(experiment, folder, settings)
    text = text_tokenizer(experiment, codes, accelerator, origin)
    prior = _build_prior(experiment, tokenizer, text, origin)
    adapter = (
        LoRAAdapter(prior, experiment.prior, origin.identity)
        if origin and experiment.prior.lora_rank
        else None
    )
    objective = PriorObjective(
        prior,
        experiment.prior.objective,
        train.orders,
        experiment.sequence.captioning_fraction,
        activation_checkpointing=train.activation_checkpointing,
    )
    objective.record_training()
    sampler = partial(
        BatchSampler, codes["train"].lengths, seed=experiment.seed, weights=codes["train"].weights
    )
    data = PriorData(codes, text, experiment, accelerator)

    def task(batch_size: int) -> Task:
        batches = sampler(batch_size)
        return Task(
            objective,
            partial(data.batch, batches),
            data.held_out_batches,
            "nats_per_code",
            partial(_sample_images, experiment, tokenizer, prior, text, data.prompts(8)),
            sample_names=partial(data.names, batches),
        )

    if has_auto_batch(train):
        probe = task(accelerator.num_processes)
        train = resolve_auto_batch(
            train, probe, experiment.precision, accelerator, rows=len(codes["train"]), label="prior"
        )
        write_stage_settings(accelerator, folder, settings := settings | {"train": to_dict(train)})
    figures = fit(
        task(train.resolved_batch()[0]),
        train,
        accelerator,
        folder,
        seed=experiment.seed,
        bf16=uses_bf16(experiment.precision, accelerator.device),
        compile_networks=should_compile(train, accelerator.device),
        label="prior",
    )
    if adapter is not None:
        adapter.merge_and_save(folder, accelerator)
    finalize_stage(accelerator, prior, folder, settings, figures)
    return folder


def _settings(
    experiment: Experiment, codes: CodesDataset, origin: PretrainedPrior | None
) -> dict[str, Any]:
    """What the prior depends on."""
    made = {"tokenizer": codes.manifest["tokenizer"], "sources": codes.manifest["sources"]}
    return {
        "seed": experiment.seed,
        "precision": experiment.precision,
        "codes": made | {"settings": codes.manifest["settings"]},
        "text": to_dict(experiment.text),
        "sequence": to_dict(experiment.sequence),
        **to_dict(experiment.prior),
        "init_from": origin and origin.identity,
    }


def _build_prior(
    experiment: Experiment,
    tokenizer: ImageTokenizer,
    text: TextTokenizer,
    origin: PretrainedPrior | None,
) -> ImagePrior:
    """A new prior for this tokenizer's codes and this vocabulary, with the weights of `origin` if
    there is one.

    Raises:
        ValueError: there are more sampling steps than codes.
    """
    vectors = tokenizer.code_vectors
    stream = StreamConfig(
        text_vocab_size=text.vocab_size,
        text_length=text.length,
        levels=tuple(
            Level(grid=level.grid, num_codes=level.num_codes) for level in tokenizer.layout
        ),
        code_dim=vectors.shape[1],
        any_order=experiment.prior.train.code_order != "raster"
        or (origin is not None and origin.prior.stream.config.any_order),
        pad_id=text.pad_id,
        start_id=text.start_id,
        end_id=text.end_id,
    )
    codes_per_image, steps = (
        sum(level.length for level in stream.levels),
        experiment.sampling.num_inference_steps,
    )
    if steps is not None and steps > codes_per_image:
        raise ValueError(
            f"sampling.num_inference_steps is {steps}; an image has {codes_per_image} codes, so "
            "it can be at most that"
        )
    torch.manual_seed(experiment.seed + 1)
    prior = ImagePrior(experiment.prior.model, stream)
    prior.set_codebook(vectors)
    if origin is not None:
        origin.load_into(prior)
    return prior


class PriorData:
    """Batches of codes and captions. Each is a pure function of the step and the process."""

    def __init__(
        self,
        codes: dict[str, CodesDataset],
        text: TextTokenizer,
        experiment: Experiment,
        accelerator: Accelerator,
    ) -> None:
        self.train, self.held_out, self.text = codes["train"], codes["held_out"], text
        self.options, self.seed = experiment.text, experiment.seed
        self.process, self.processes, self.device = (
            accelerator.process_index,
            accelerator.num_processes,
            accelerator.device,
        )
        self.several_captions = self.train.captions_in_all > len(self.train)

    def batch(self, sampler: BatchSampler, step: int) -> dict[str, torch.Tensor]:
        """This process's part of a step's batch."""
        rows = sampler.share(step, self.process, self.processes)
        random = np.random.default_rng([self.seed, step, self.process])
        views = random.integers(0, self.train.views, size=len(rows))
        # Drawn only where there is a choice: what follows is drawn by the same numbers.
        draws = random.random(len(rows)).tolist() if self.several_captions else None
        captions = self.train.captions(rows.tolist(), draws)
        if self.options.bpe_dropout:
            ids = self.text.encode_with_dropout(
                captions, self.options.bpe_dropout, random, truncate=self.options.truncate
            )
        else:
            ids = self.text.encode(captions, truncate=self.options.truncate)
        return {
            "text_ids": ids,
            "codes": torch.from_numpy(self.train.codes(rows.tolist(), views.tolist())),
        }

    def names(self, sampler: BatchSampler, step: int) -> list[str]:
        """What to call the images of a step's batch."""
        return [f"row {row}" for row in sampler.share(step, self.process, self.processes)]

    def held_out_batches(self) -> Iterator[dict[str, torch.Tensor]]:
        for first in range(0, len(self.held_out), EVALUATION_BATCH):
            rows = list(range(first, min(first + EVALUATION_BATCH, len(self.held_out))))
            ids = self.text.encode(self.held_out.captions(rows), truncate=True).to(self.device)
            yield {
                "text_ids": ids,
                "codes": torch.from_numpy(self.held_out.codes(rows)).to(self.device),
            }

    def prompts(self, count: int) -> list[str]:
        """The first held-out captions."""
        return self.held_out.captions(list(range(min(count, len(self.held_out)))))


def _sample_images(
    experiment: Experiment,
    tokenizer: ImageTokenizer,
    prior: ImagePrior,
    text: TextTokenizer,
    prompts: list[str],
) -> dict[str, np.ndarray]:
    """Two images per prompt as a grid, which is also saved."""
    prior.eval()
    device = prior.device
    pipe = TextToImagePipeline(tokenizer.to(device), prior, text, experiment.sampling)
    with torch.autocast(device.type, enabled=False):
        images = pipe(prompts, num_images_per_prompt=2, truncate=True).images
    prior.train()
    grid = picture_grid([np.asarray(image) for image in images], columns=4)
    save_sample(experiment, "prior", grid)
    return {"samples": grid}


def text_tokenizer(
    experiment: Experiment,
    codes: dict[str, CodesDataset],
    accelerator: Accelerator,
    origin: PretrainedPrior | None = None,
) -> TextTokenizer:
    """Trains the text tokenizer, takes it over with the prior to start from, or loads that of the
    checkpoint that the prior resumes from; keeps it once every caption fits."""
    folder, config = experiment.folder / "text_tokenizer", experiment.text
    # Training it is quick and has one outcome: every process does, so that all see the same error
    # if there is one.
    goes_on = newest_checkpoint(experiment.folder / "prior" / "checkpoints") is not None
    learned = chain.from_iterable(_caption_batches(codes["train"], CAPTIONS_TO_LEARN))
    if (
        origin is not None
    ):  # also where it goes on: the new entries and what spells them follow from the captions
        text = origin.extend_vocab(learned, config)
        _log.info(origin.pieces(text, next(_caption_batches(codes["train"], _ROWS_AT_A_TIME))))
    else:
        text = TextTokenizer.load(folder) if goes_on else TextTokenizer.from_config(config, learned)
    lengths = LengthReport(text.length)
    for captions in chain.from_iterable(_caption_batches(dataset) for dataset in codes.values()):
        lengths.add(captions, text.lengths(captions))
    lengths.check(truncate=config.truncate)
    if lengths.too_long:
        _log.info(
            f"{lengths.too_long} of {lengths.count} captions are cut to "
            f"text.max_length={text.length} slots"
        )
    if accelerator.is_main_process and not goes_on:
        atomic_write_dir(folder, text.save)
    accelerator.wait_for_everyone()
    return TextTokenizer.load(folder)


def _caption_batches(codes: CodesDataset, captions: int | None = None) -> Iterator[list[str]]:
    """All captions, some thousand at a time; or those of evenly spread rows that together have
    about `captions`."""
    rows = (
        len(codes)
        if captions is None
        else min(len(codes), max(len(codes) * captions // codes.captions_in_all, 1))
    )
    for first in range(0, rows, _ROWS_AT_A_TIME):
        spread = [
            row * len(codes) // rows for row in range(first, min(first + _ROWS_AT_A_TIME, rows))
        ]
        yield list(chain.from_iterable(codes.all_captions(spread)))
