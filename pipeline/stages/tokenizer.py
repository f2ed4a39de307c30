"""Stage 1: trains a tokenizer on images. Knows the run folder; see `training` for the loop."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from pipeline.config.data import data_settings
from pipeline.config.experiment import Experiment, to_dict
from pipeline.data.sampler import MapBatchLoader
from pipeline.data.source import Source
from pipeline.data.streaming.feed import StreamBatchLoader, batch_loader
from pipeline.runtime.atomic_io import atomic_write_png
from pipeline.runtime.image_grid import bars, grid_image, make_grid
from pipeline.runtime.log import on_main_process
from pipeline.stages.finetune import (
    check_init_from,
    copy_frozen_tokenizer,
    new_tokenizer,
    tokenizer_identity,
)
from pipeline.stages.manifest import StageRun
from pipeline.stages.run_lock import with_run_lock
from pipeline.stages.sources import every_image
from pipeline.training.task import Task
from stage1_tokenizer import TokenizerObjective, to_model_range, to_uint8
from stage2_prior import LatentPriorModule

_log = logging.getLogger(__name__)
_log.addFilter(on_main_process)

EVALUATION_BATCH = 64


@with_run_lock
def train_tokenizer(experiment: Experiment, *, seconds_after: float = 0.0) -> Path:
    """Stage 1; returns the folder of the trained tokenizer, `RUN/tokenizer`.

    Args:
        seconds_after: estimated seconds that the run takes after this stage, for the progress bar.
    """
    section = experiment.tokenizer
    check_init_from(section, experiment.prior, experiment.text.max_length)
    if section.frozen:
        return copy_frozen_tokenizer(experiment)
    source, held_out = every_image(experiment, "tokenizer")
    inputs = {
        "seed": experiment.seed,
        "precision": experiment.precision,
        "data": data_settings(to_dict(experiment.data)),
        "images": [source.fingerprint, held_out.fingerprint],
        **to_dict(section),
        "init_from": tokenizer_identity(section),
        "latent_prior": to_dict(experiment.prior.latent) if experiment.prior.joint else None,
    }
    run = StageRun(
        experiment,
        "tokenizer",
        section.train,
        inputs,
        earlier={"images": [source.earlier_fingerprint, held_out.fingerprint]},
        num_images=[source.num_images, held_out.num_images],
    )
    if run.is_complete():
        return run.folder
    accelerator = run.begin()
    _report(source)
    training = TokenizerTraining(experiment, accelerator, source, held_out)
    metrics = run.fit(training.task, images=source.num_images, seconds_after=seconds_after)
    run.finalize(training.tokenizer, metrics, training.latent_prior)
    return run.folder


class TokenizerTraining:
    """A new tokenizer, its objective and its images: what stage 1 hands to the training loop. With
    `prior.joint` also a new prior of its latents."""

    def __init__(
        self, experiment: Experiment, accelerator: Accelerator, source: Source, held_out: Source
    ) -> None:
        torch.manual_seed(experiment.seed)
        self.tokenizer = new_tokenizer(experiment.tokenizer)
        self.latent_prior = (
            LatentPriorModule(experiment.prior.latent, self.tokenizer.latent_dim)
            if experiment.prior.joint
            else None
        )
        self.objective = TokenizerObjective(
            self.tokenizer, experiment.tokenizer.objective, latent_prior=self.latent_prior
        )
        self.experiment = experiment
        self.accelerator = accelerator
        self.held_out = held_out
        # Once, though `batch_size: auto` asks for two tasks: streams keep threads.
        self.loader = batch_loader(
            source,
            accelerator.num_processes,
            experiment.seed,
            accelerator.process_index,
            accelerator.num_processes,
            folder=experiment.folder / "data",
        )

    def task(self, batch_size: int) -> Task:
        """What `fit` trains, with this many images per step over all processes."""
        loader = self.loader.with_batch_size(batch_size)
        return Task(
            self.objective,
            partial(_batch, loader),
            self._eval_batches,
            self.objective.best_metric,
            self._sample_images,
            self.objective.check_health,
            loader.names,
        )

    def _eval_batches(self) -> Iterator[torch.Tensor]:
        rows = range(len(self.held_out))[: self.experiment.encode.max_val_images]
        for first in range(0, len(rows), EVALUATION_BATCH):
            few = rows[first : first + EVALUATION_BATCH]
            yield torch.from_numpy(self.held_out.images(few)).to(self.accelerator.device)

    @torch.no_grad()
    def _sample_images(self) -> dict[str, np.ndarray]:
        """The first validation images above their reconstructions, and how often each code is
        used, where there are codes."""
        true = self.held_out.images(range(min(len(self.held_out), 8)))
        pixels = to_model_range(torch.from_numpy(true)).to(self.accelerator.device)
        drawn = to_uint8(self.tokenizer.reconstruct(pixels)).cpu().numpy()
        grid = make_grid([*true, *drawn], columns=len(true))
        save_sample(self.experiment.folder, "reconstructions", grid)
        # The most used code is on the left. A flat curve is good; codes behind its end are wasted.
        uses = {
            f"code_use_{i}": bars(use.sort(descending=True).values.cpu().numpy())
            for i, use in enumerate(self.tokenizer.quantizer.usage())
        }
        return {"reconstructions": grid} | uses


def _batch(loader: MapBatchLoader | StreamBatchLoader, step: int) -> torch.Tensor:
    return torch.from_numpy(loader.images(step))


def _report(source: Source) -> None:
    count = source.num_images
    _log.info(
        f"{source.name}: "
        + ("read as it comes" if count is None else f"{count:,} images to train on")
    )
    for problem in source.problems:
        _log.info(f"  {problem}")


def save_sample(run_dir: Path, name: str, grid: np.ndarray) -> None:
    """Writes a grid of images (H,W,3) to `RUN/samples/NAME.png`."""
    atomic_write_png(run_dir / "samples" / f"{name}.png", grid_image(grid))
