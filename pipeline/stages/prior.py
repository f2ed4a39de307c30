"""Stage 2: trains a prior on a codes dataset. Knows the run folder; see `training` for the loop."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from pipeline.config.data import tag_settings
from pipeline.config.experiment import Experiment, to_dict
from pipeline.data.codes.dataset import CodesDataset, check_tokenizer
from pipeline.data.sampler import BatchSampler
from pipeline.data.tags import varied_tags
from pipeline.inference.pipeline import TextToImagePipeline
from pipeline.runtime.distributed import make_accelerator
from pipeline.runtime.image_grid import make_grid
from pipeline.stages.captions import saved_text_tokenizer, text_tokenizer, training_ids
from pipeline.stages.finetune import LoRAAdapter, PretrainedPrior, check_init_from
from pipeline.stages.latent_prior import (
    LatentPriorTraining,
    latent_prior_training,
    latent_sources,
    train_latent_prior,
)
from pipeline.stages.manifest import StageRun, load_complete
from pipeline.stages.run_lock import with_run_lock
from pipeline.stages.tokenizer import EVALUATION_BATCH, save_sample
from pipeline.training.task import Task
from stage1_tokenizer import TokenizerModule
from stage1_tokenizer.pixels import image_array
from stage2_prior import Level, PriorModule, PriorObjective, StreamConfig, TextTokenizer


@with_run_lock
def train_prior(experiment: Experiment) -> Path:
    """Stage 2 on the codes dataset, or on Gaussian latents of the images; returns `RUN/prior` (the
    text tokenizer lies in `RUN/text_tokenizer`)."""
    if not experiment.tokenizer.model.has_codes:
        return train_latent_prior(experiment)
    section = experiment.prior
    tokenizer = load_complete(
        TokenizerModule.from_pretrained, experiment.folder / "tokenizer", "train-tokenizer"
    )
    codes = {
        split: CodesDataset(experiment.folder / "codes", split) for split in ("train", "held_out")
    }
    _check_captions(codes, experiment)
    check_tokenizer(codes["train"].manifest, tokenizer.fingerprint, experiment.folder / "codes")
    check_init_from(experiment.tokenizer, section, experiment.text.max_length)
    origin = (
        PretrainedPrior(section.init_from, tokenizer.fingerprint) if section.init_from else None
    )
    inputs = _inputs(experiment, codes["train"].manifest, origin)
    run = StageRun(experiment, "prior", section.train, inputs)
    if run.is_complete():
        if saved_text_tokenizer(experiment) is None:
            accelerator = make_accelerator(experiment.folder, [], experiment.process_timeout)
            text_tokenizer(experiment, codes, accelerator, origin)
        return run.folder
    accelerator = run.begin()
    text = text_tokenizer(experiment, codes, accelerator, origin)
    prior = _build_prior(experiment, tokenizer, text, origin)
    adapter = None
    if origin and section.lora_rank:
        adapter = LoRAAdapter(prior, section, origin.identity, origin.text.vocab_size)
    training = PriorTraining(experiment, accelerator, codes, tokenizer, prior, text)
    metrics = run.fit(training.task, images=len(codes["train"]))
    if adapter is not None:
        adapter.merge_and_save(run.folder, accelerator)
    run.finalize(prior, metrics)
    return run.folder


def _check_captions(codes: dict[str, CodesDataset], experiment: Experiment) -> None:
    """Raises ValueError where the images of the codes have no captions."""
    if any(split.captions_in_all < len(split) for split in codes.values()):
        raise ValueError(
            f"{experiment.folder / 'codes'} has images without captions, and a prior is trained on "
            f"captions; add captions to {' and '.join(experiment.data.sources)} (docs/data.md), "
            "move that folder away and run `minidalle encode` again"
        )


def new_prior_training(
    experiment: Experiment, accelerator: Accelerator
) -> PriorTraining | LatentPriorTraining:
    """What `train_prior` trains, with new weights, for trial steps. The stages before it are done;
    only the text tokenizer is written."""
    tokenizer = load_complete(
        TokenizerModule.from_pretrained, experiment.folder / "tokenizer", "train-tokenizer"
    )
    if not experiment.tokenizer.model.has_codes:
        sources = latent_sources(experiment)
        return latent_prior_training(experiment, accelerator, tokenizer, sources)
    codes = {
        split: CodesDataset(experiment.folder / "codes", split) for split in ("train", "held_out")
    }
    text = text_tokenizer(experiment, codes, accelerator)
    prior = _build_prior(experiment, tokenizer, text, None)
    return PriorTraining(experiment, accelerator, codes, tokenizer, prior, text)


def _inputs(
    experiment: Experiment, manifest: dict[str, Any], origin: PretrainedPrior | None
) -> dict[str, Any]:
    """What the prior depends on.

    Args:
        manifest: that of the codes.
    """
    return {
        "seed": experiment.seed,
        "precision": experiment.precision,
        "codes": {key: manifest[key] for key in ("tokenizer", "sources", "settings")},
        "text": to_dict(experiment.text),
        "sequence": to_dict(experiment.sequence),
        "tags": tag_settings(experiment.data),
        **{k: v for k, v in to_dict(experiment.prior).items() if k not in ("latent", "joint")},
        "init_from": origin and origin.identity,
    }


def stream_config(
    tokenizer: TokenizerModule,
    vocab_size: int,
    text_length: int,
    *,
    any_order: bool,
    **special_ids: int,
) -> StreamConfig:
    """The stream of captions and of a tokenizer's codes."""
    return StreamConfig(
        text_vocab_size=vocab_size,
        text_length=text_length,
        levels=tuple(
            Level(grid=level.grid, num_codes=level.num_codes) for level in tokenizer.layout
        ),
        code_dim=tokenizer.code_vectors.shape[1],
        any_order=any_order,
        **special_ids,
    )


def _build_prior(
    experiment: Experiment,
    tokenizer: TokenizerModule,
    text: TextTokenizer,
    origin: PretrainedPrior | None,
) -> PriorModule:
    """A new prior for this tokenizer's codes and this vocabulary, with the weights of `origin` if
    there is one.

    Raises:
        ValueError: there are more sampling steps than codes.
    """
    stream = stream_config(
        tokenizer,
        text.vocab_size,
        text.length,
        any_order=experiment.prior.train.code_order != "raster"
        or (origin is not None and origin.prior.stream.config.any_order),
        pad_id=text.pad_id,
        start_id=text.start_id,
        end_id=text.end_id,
    )
    check_inference_steps(experiment, tokenizer)
    torch.manual_seed(experiment.seed + 1)
    prior = PriorModule(experiment.prior.model, stream)
    prior.set_codebook(tokenizer.code_vectors)
    if origin is not None:
        origin.load_into(prior)
    return prior


def check_inference_steps(experiment: Experiment, tokenizer: TokenizerModule) -> None:
    """Raises ValueError where there are more sampling steps than codes."""
    codes_per_image = sum(level.length for level in tokenizer.layout)
    steps = experiment.sampling.num_inference_steps
    if steps is not None and steps > codes_per_image:
        raise ValueError(
            f"sampling.num_inference_steps is {steps}; an image has {codes_per_image} codes, so "
            "it can be at most that"
        )


class PriorTraining:
    """A prior, its objective and its codes and captions: what stage 2 hands to the training loop.

    Each batch is a pure function of the step and the process.
    """

    def __init__(
        self,
        experiment: Experiment,
        accelerator: Accelerator,
        codes: dict[str, CodesDataset],
        tokenizer: TokenizerModule,
        prior: PriorModule,
        text: TextTokenizer,
    ) -> None:
        self.experiment = experiment
        self.accelerator = accelerator
        self.train = codes["train"]
        self.held_out = codes["held_out"]
        self.tokenizer = tokenizer
        self.prior = prior
        self.text = text
        self.objective = PriorObjective(
            prior,
            experiment.prior.objective,
            experiment.prior.train.orders,
            experiment.sequence.captioning_fraction,
            activation_checkpointing=experiment.prior.train.activation_checkpointing,
        )
        self.objective.record_training()
        self.several_captions = self.train.captions_in_all > len(self.train)

    def task(self, batch_size: int) -> Task:
        """What `fit` trains, with this many images per step over all processes."""
        sampler = BatchSampler(
            self.train.lengths, batch_size, seed=self.experiment.seed, weights=self.train.weights
        )
        return Task(
            self.objective,
            partial(self._batch, sampler),
            self._eval_batches,
            "nats_per_code",
            self._sample_images,
            sample_names=partial(self._names, sampler),
        )

    def _rows(self, sampler: BatchSampler, step: int) -> list[int]:
        """Rows of this process's part of a step's batch."""
        process = self.accelerator.process_index
        return sampler.share(step, process, self.accelerator.num_processes).tolist()

    def _batch(self, sampler: BatchSampler, step: int) -> dict[str, torch.Tensor]:
        """This process's part of a step's batch."""
        rows = self._rows(sampler, step)
        seed = [self.experiment.seed, step, self.accelerator.process_index]
        random = np.random.default_rng(seed)
        views = random.integers(0, self.train.views, size=len(rows)).tolist()
        # Sampled only where there is a choice: BPE dropout takes the numbers that follow.
        draws = random.random(len(rows)).tolist() if self.several_captions else None
        captions = self.train.captions(rows, draws)
        options = self.experiment.text
        tags = self.experiment.data.tags
        captions = varied_tags(captions, rows, tags, self.experiment.seed, step)
        # Lengths were checked in the captions' own order.
        truncate = options.truncate or tags.vary
        ids = training_ids(self.text, captions, options, random, truncate=truncate)
        return {"text_ids": ids, "codes": torch.from_numpy(self.train.codes(rows, views))}

    def _names(self, sampler: BatchSampler, step: int) -> list[str]:
        """What to call the images of a step's batch."""
        return self.train.names(self._rows(sampler, step))

    def _eval_batches(self) -> Iterator[dict[str, torch.Tensor]]:
        device = self.accelerator.device
        for first in range(0, len(self.held_out), EVALUATION_BATCH):
            rows = list(range(first, min(first + EVALUATION_BATCH, len(self.held_out))))
            ids = self.text.encode(self.held_out.captions(rows), truncate=True)
            codes = torch.from_numpy(self.held_out.codes(rows))
            yield {"text_ids": ids.to(device), "codes": codes.to(device)}

    def _sample_images(self) -> dict[str, np.ndarray]:
        """Two images for each of the first validation captions, as a grid, which is also saved."""
        prompts = self.held_out.captions(list(range(min(8, len(self.held_out)))))
        self.prior.eval()
        device = self.prior.device
        pipe = TextToImagePipeline(
            self.tokenizer.to(device), self.prior, self.text, self.experiment.sampling
        )
        with torch.autocast(device.type, enabled=False):
            images = pipe(prompts, num_images_per_prompt=2, truncate=True).images
        self.prior.train()
        grid = make_grid([image_array(image) for image in images], columns=4)
        save_sample(self.experiment.folder, "prior", grid)
        return {"samples": grid}
