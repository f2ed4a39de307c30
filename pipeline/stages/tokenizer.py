"""Stage 1: trains a tokenizer on images. Knows the run folder; see `training` for the loop."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from pipeline.config.data import data_settings
from pipeline.config.experiment import Experiment, to_dict
from pipeline.data.source import Source
from pipeline.data.streaming.feed import batch_loader
from pipeline.runtime.atomic_io import atomic_write
from pipeline.runtime.devices import should_compile, uses_bf16
from pipeline.runtime.image_grid import bars, grid_image, picture_grid
from pipeline.runtime.log import on_main_process
from pipeline.stages.encode import sources_of
from pipeline.stages.finetune import (
    check_init_from,
    copy_frozen_tokenizer,
    new_tokenizer,
    tokenizer_identity,
)
from pipeline.stages.manifest import (
    begin_stage,
    finalize_stage,
    is_complete,
    with_resolved_batch,
    write_stage_settings,
)
from pipeline.stages.run_lock import with_run_lock
from pipeline.training.auto_batch import has_auto_batch, resolve_auto_batch
from pipeline.training.task import Task
from pipeline.training.trainer import fit
from stage1_tokenizer import ImageTokenizer, TokenizerObjective, to_model_range

_log = logging.getLogger(__name__)
_log.addFilter(on_main_process)

EVALUATION_BATCH = 64


@with_run_lock
def train_tokenizer(experiment: Experiment) -> Path:
    """Stage 1; returns the folder of the trained tokenizer, `RUN/tokenizer`."""
    folder = experiment.folder / "tokenizer"
    check_init_from(experiment)
    if experiment.tokenizer.frozen:
        copy_frozen_tokenizer(experiment, folder)
        return folder
    train = with_resolved_batch(experiment.tokenizer.train, folder)
    source, held_out = sources_of(experiment)
    settings = {
        "seed": experiment.seed,
        "precision": experiment.precision,
        "data": data_settings(to_dict(experiment.data)),
        "pictures": [source.fingerprint, held_out.fingerprint],
        **to_dict(replace(experiment.tokenizer, train=train)),
        "init_from": tokenizer_identity(experiment.tokenizer),
    }
    if is_complete(folder, settings):
        return folder
    accelerator = begin_stage(experiment, folder, settings)
    _report(source)
    if has_auto_batch(train):  # by a tokenizer that is thrown away again
        few = replace(
            experiment.tokenizer,
            train=replace(
                train, batch_size=accelerator.num_processes, gradient_accumulation_steps=1
            ),
        )
        few_at_a_time = replace(experiment, tokenizer=few)
        train = resolve_auto_batch(
            train,
            tokenizer_task(few_at_a_time, accelerator, source, held_out)[0],
            experiment.precision,
            accelerator,
            rows=source.num_images,
            label="tokenizer",
        )
        write_stage_settings(accelerator, folder, settings := settings | {"train": to_dict(train)})
    experiment = replace(experiment, tokenizer=replace(experiment.tokenizer, train=train))
    task, tokenizer = tokenizer_task(experiment, accelerator, source, held_out)
    figures = fit(
        task,
        train,
        accelerator,
        folder,
        seed=experiment.seed,
        bf16=uses_bf16(experiment.precision, accelerator.device),
        compile_networks=should_compile(train, accelerator.device),
        label="tokenizer",
    )
    finalize_stage(accelerator, tokenizer, folder, settings, figures)
    return folder


def tokenizer_task(
    experiment: Experiment, accelerator: Accelerator, source: Source, held_out: Source
) -> tuple[Task, ImageTokenizer]:
    """What stage 1 hands to `fit`, and the new tokenizer in it."""
    torch.manual_seed(experiment.seed)
    tokenizer = new_tokenizer(experiment.tokenizer)
    place = (accelerator.process_index, accelerator.num_processes)
    feed = batch_loader(
        source,
        experiment.tokenizer.train.resolved_batch()[0],
        experiment.seed,
        *place,
        folder=experiment.folder / "data",
    )

    def batch(step: int) -> torch.Tensor:
        return torch.from_numpy(feed.pictures(step))

    def held_out_batches() -> Iterator[torch.Tensor]:
        rows = range(len(held_out))[: experiment.encode.max_val_images]
        for first in range(0, len(rows), EVALUATION_BATCH):
            few = rows[first : first + EVALUATION_BATCH]
            yield torch.from_numpy(held_out.images(few)).to(accelerator.device)

    @torch.no_grad()
    def pictures() -> dict[str, np.ndarray]:
        true = held_out.images(range(min(len(held_out), 8)))
        pixels = to_model_range(torch.from_numpy(true)).to(accelerator.device)
        drawn = tokenizer.to_images(tokenizer.encode(pixels))
        grid = picture_grid([*true, *(np.asarray(p) for p in drawn)], columns=len(true))
        save_sample(experiment, "reconstructions", grid)
        # The most used code on the left: flat is good, and what falls off early is wasted.
        uses = {
            f"code_use_{i}": bars(use.sort(descending=True).values.cpu().numpy())
            for i, use in enumerate(tokenizer.quantizer.usage())
        }
        return {"reconstructions": grid} | uses

    objective = TokenizerObjective(tokenizer, experiment.tokenizer.objective)
    return Task(
        objective, batch, held_out_batches, "nll", pictures, objective.check_health, feed.names
    ), tokenizer


def _report(source: Source) -> None:
    count = source.num_images
    _log.info(
        f"{source.name}: "
        + ("read as it comes" if count is None else f"{count:,} images to train on")
    )
    for problem in source.problems:
        _log.info(f"  {problem}")


def save_sample(experiment: Experiment, name: str, grid: np.ndarray) -> None:
    folder = experiment.folder / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / f"{name}.png") as beside:
        grid_image(grid).save(beside, "PNG")
