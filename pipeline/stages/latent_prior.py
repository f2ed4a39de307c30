"""Stage 2 of Gaussian latents: trains a prior on samples of the posteriors of a frozen tokenizer.
Knows the run folder; see `training` for the loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pipeline.config.data import data_settings, tag_settings
from pipeline.config.experiment import Experiment, to_dict
from pipeline.data.readers.base import NoCaptions
from pipeline.data.sampler import BatchSampler, order_of
from pipeline.data.source import Source
from pipeline.data.tags import varied_tags
from pipeline.inference.bundle import attach_encoder
from pipeline.inference.latent_pipeline import LatentPipeline
from pipeline.runtime.distributed import make_accelerator
from pipeline.runtime.image_grid import make_grid
from pipeline.stages.captions import (
    SourceCaptions,
    saved_text_tokenizer,
    text_tokenizer,
    training_ids,
)
from pipeline.stages.manifest import LATENT_PRIOR, StageRun, load_complete
from pipeline.stages.sources import every_image, sources_of
from pipeline.stages.tokenizer import EVALUATION_BATCH, save_sample
from pipeline.training.task import Task
from stage1_tokenizer import TokenizerModule, to_model_range
from stage1_tokenizer.pixels import image_array
from stage2_prior import (
    AggregatedPosterior,
    LatentPriorConfig,
    LatentPriorModule,
    LatentPriorObjective,
    TextTokenizer,
    VampPrior,
)
from stage2_prior.objective import PriorLoss

CAPTIONS = 5_000
"""Images whose captions the text tokenizer learns from, and whose lengths are checked."""


def train_latent_prior(experiment: Experiment) -> Path:
    """A prior of the run's tokenizer's latents; returns `RUN/prior`. The text tokenizer lies in
    `RUN/text_tokenizer`.

    `standard` and `aggregated` have nothing to train, and what was trained together with the
    tokenizer (`prior.joint`) is only evaluated and written.

    Raises:
        ValueError: the images are streamed; there are fewer than `prior.latent.components`; or as
            `train_prior`.
        FileNotFoundError: there is no tokenizer yet.
    """
    refuse_streams(experiment)
    section = experiment.prior
    tokenizer = load_complete(
        TokenizerModule.from_pretrained, experiment.folder / "tokenizer", "train-tokenizer"
    )
    sources = latent_sources(experiment)
    run = StageRun(
        experiment,
        "prior",
        section.train,
        _inputs(experiment, tokenizer, sources),
        num_images=[source.num_images for source in sources.values()],
    )
    if run.is_complete():
        if saved_text_tokenizer(experiment) is None:
            accelerator = make_accelerator(experiment.folder, [], experiment.process_timeout)
            text_tokenizer(experiment, _captions(experiment, sources), accelerator)
        return run.folder
    accelerator = run.begin()
    training = latent_prior_training(experiment, accelerator, tokenizer, sources)
    prior = training.prior
    if section.joint or not any(p.requires_grad for p in prior.parameters()):
        metrics = training.deliver()
    else:
        metrics = run.fit(training.task, images=len(sources["train"]))
    run.finalize(prior, metrics)
    return run.folder


def latent_prior_training(
    experiment: Experiment,
    accelerator: Accelerator,
    tokenizer: TokenizerModule,
    sources: dict[str, Source],
) -> LatentPriorTraining:
    """A new prior of this tokenizer's latents and its captions' tokenizer, which is saved, on the
    accelerator's device."""
    text = text_tokenizer(experiment, _captions(experiment, sources), accelerator)
    tokenizer.to(accelerator.device).eval().requires_grad_(False)
    prior = _build_prior(experiment, tokenizer, text, sources["train"])
    return LatentPriorTraining(experiment, accelerator, sources, tokenizer, prior, text)


def latent_sources(experiment: Experiment) -> dict[str, Source]:
    """Images of `train` and `held_out`. Only a conditional prior leaves out those without captions.

    Raises:
        NoCaptions: the prior is conditional, and there are none.
        ValueError, FileNotFoundError: as `sources_of`.
    """
    try:
        found = (
            sources_of(experiment.data, experiment.folder, experiment.process_timeout)
            if experiment.sees_captions
            else every_image(experiment, "prior")
        )
    except NoCaptions as error:
        raise NoCaptions(
            f"{error}\nprior.latent.context_features is "
            f"{experiment.prior.latent.context_features}; a prior with 0 needs no captions"
        ) from error
    return dict(zip(("train", "held_out"), found, strict=True))


def _captions(experiment: Experiment, sources: dict[str, Source]) -> dict[str, SourceCaptions]:
    """What the text tokenizer learns from, by split. An unconditional prior reads no caption: its
    bundle has a vocabulary of bytes."""
    limit = CAPTIONS if experiment.prior.latent.context_features else 0
    return {split: SourceCaptions(source, limit) for split, source in sources.items()}


def refuse_streams(experiment: Experiment) -> None:
    """Raises ValueError where images are streamed, which a prior of latents does not read."""
    if experiment.data.streaming:
        raise ValueError(
            "data.streaming is on, and a prior of Gaussian latents reads images and captions in "
            "any order; set it to false, or use `minidalle train-tokenizer` alone"
        )


def _inputs(
    experiment: Experiment, tokenizer: TokenizerModule, sources: dict[str, Source]
) -> dict[str, Any]:
    """What the prior depends on."""
    section = experiment.prior
    conditional = section.latent.context_features > 0
    return {
        "seed": experiment.seed,
        "precision": experiment.precision,
        "tokenizer": tokenizer.fingerprint,
        "data": data_settings(to_dict(experiment.data)),
        "sources": {split: source.fingerprint for split, source in sources.items()},
        "latent": to_dict(section.latent),
        "joint": section.joint,
        "text": to_dict(experiment.text) if conditional else None,
        "tags": tag_settings(experiment.data) if conditional else None,
        "caption_dropout": section.objective.caption_dropout if conditional else None,
    }


def _build_prior(
    experiment: Experiment, tokenizer: TokenizerModule, text: TextTokenizer, source: Source
) -> LatentPriorModule:
    """A new prior of this tokenizer's latents and this vocabulary, on the tokenizer's device; or
    the one that was trained together with the tokenizer.

    Raises:
        ValueError: there are fewer images than components that come from images.
    """
    if experiment.prior.joint:
        folder = experiment.folder / "tokenizer" / LATENT_PRIOR
        joint: LatentPriorModule = load_complete(
            LatentPriorModule.from_pretrained, folder, "train-tokenizer"
        )
        return joint.to(tokenizer.device)
    config = experiment.prior.latent
    own = tokenizer.own_config
    torch.manual_seed(experiment.seed + 1)
    model = LatentPriorModule(
        config,
        tokenizer.latent_dim,
        (own.channels, *own.size) if config.kind == "vamp" else None,
        text_vocab_size=text.vocab_size if config.context_features else 0,
        text_pad_id=text.pad_id,
    ).to(tokenizer.device)
    attach_encoder(model, tokenizer)
    prior = model.prior
    if isinstance(prior, AggregatedPosterior | VampPrior):
        check_components(config, len(source))
        images = source.images(range(config.components))
        pixels = to_model_range(torch.from_numpy(images)).to(tokenizer.device)
        if isinstance(prior, VampPrior):
            prior.set_pseudo_inputs(pixels)
        else:
            found = [tokenizer.posterior(few) for few in pixels.split(EVALUATION_BATCH)]
            prior.set_posteriors(
                torch.cat([one.mean for one in found]), torch.cat([one.log_std for one in found])
            )
    return model


def check_components(config: LatentPriorConfig, images: int) -> None:
    """Raises ValueError where there are fewer images than components that come from images."""
    if config.kind in ("vamp", "aggregated") and images < config.components:
        raise ValueError(
            f"prior.latent.components is {config.components} and there are {images} images to "
            f"train on; {config.kind} takes one per component, set it lower"
        )


class _OfImages:
    """The objective of a prior on batches of `images` uint8 (B,H,W,C): latents are sampled from
    their posteriors."""

    def __init__(self, tokenizer: TokenizerModule, objective: LatentPriorObjective) -> None:
        self.tokenizer = tokenizer
        self.objective = objective
        self.networks: dict[str, nn.Module] = objective.networks

    def compile(self) -> None:
        """Compiles the prior and the encoder in place."""
        self.objective.compile()
        self.tokenizer.compile_networks()

    def losses(
        self,
        batch: Mapping[str, Tensor],
        step: int,
        networks: Mapping[str, nn.Module] | None = None,
    ) -> Iterator[PriorLoss]:
        """As `LatentPriorObjective.losses`; samples by torch's global generator."""
        yield from self.objective.losses(self._sampled(batch), step, networks)

    def evaluate(self, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
        """As `LatentPriorObjective.evaluate`, with one seeded sample per image."""
        noise = torch.Generator().manual_seed(0)
        return self.objective.evaluate(self._sampled(batch, noise) for batch in batches)

    def _sampled(
        self, batch: Mapping[str, Tensor], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        posterior = self.tokenizer.posterior(to_model_range(batch["images"]))
        others = {name: tensor for name, tensor in batch.items() if name != "images"}
        return others | {"latents": posterior.sample(generator)}


class LatentPriorTraining:
    """A prior, its objective, its images and captions: what this stage hands to the training loop.

    Each batch is a pure function of the step and the process.

    Args:
        sources: images and captions of `train` and `held_out`.
        tokenizer: frozen, on the accelerator's device.
    """

    def __init__(
        self,
        experiment: Experiment,
        accelerator: Accelerator,
        sources: dict[str, Source],
        tokenizer: TokenizerModule,
        prior: LatentPriorModule,
        text: TextTokenizer,
    ) -> None:
        self.experiment = experiment
        self.accelerator = accelerator
        self.source = sources["train"]
        self.held_out = sources["held_out"]
        self.tokenizer = tokenizer
        self.prior = prior
        self.text = text
        objective = LatentPriorObjective(
            prior, text.encode([""])[0], experiment.prior.objective.caption_dropout
        )
        objective.record_training()
        self.objective = _OfImages(tokenizer, objective)

    def task(self, batch_size: int) -> Task:
        """What `fit` trains, with this many images per step over all processes."""
        order = order_of(self.source, batch_size, self.experiment.seed)
        return Task(
            self.objective,
            partial(self._batch, order),
            self._eval_batches,
            "prior_nll",
            self._sample_images,
            sample_names=lambda step: self.source.names(self._rows(order, step)),
        )

    def deliver(self) -> dict[str, float]:
        """Evaluates a prior that is not trained here; returns its validation metrics."""
        metrics = self.objective.evaluate(self._eval_batches())
        if self.accelerator.is_main_process:
            self._sample_images()
        return metrics

    def _rows(self, order: BatchSampler, step: int) -> list[int]:
        """Rows of this process's part of a step's batch."""
        accelerator = self.accelerator
        return order.share(step, accelerator.process_index, accelerator.num_processes).tolist()

    def _batch(self, order: BatchSampler, step: int) -> dict[str, Tensor]:
        """This process's part of a step's batch."""
        place = (self.accelerator.process_index, self.accelerator.num_processes)
        rows = self._rows(order, step)
        batch = {"images": torch.from_numpy(self.source.images(rows, order.draws(step, *place)))}
        if self.prior.context_features:
            random = np.random.default_rng([self.experiment.seed, step, place[0]])
            draws = random.random(len(rows))
            captions = [
                own[int(draw * len(own))]
                for own, draw in zip(self.source.all_captions(rows), draws, strict=True)
            ]
            captions = varied_tags(
                captions, rows, self.experiment.data.tags, self.experiment.seed, step
            )
            # Lengths were checked on some of the captions alone.
            batch["text_ids"] = training_ids(
                self.text, captions, self.experiment.text, random, truncate=True
            )
        return batch

    def _eval_batches(self) -> Iterator[dict[str, Tensor]]:
        device = self.accelerator.device
        rows = range(len(self.held_out))[: self.experiment.encode.max_val_images]
        for first in range(0, len(rows), EVALUATION_BATCH):
            few = rows[first : first + EVALUATION_BATCH]
            batch = {"images": torch.from_numpy(self.held_out.images(few)).to(device)}
            if self.prior.context_features:
                ids = self.text.encode(self.held_out.captions(few), truncate=True)
                batch["text_ids"] = ids.to(device)
            yield batch

    def _sample_images(self) -> dict[str, np.ndarray]:
        """Sixteen images as a grid, which is also saved: two for each of the first validation
        captions, or without one where the prior is unconditional."""
        prompts = [""]
        if self.prior.context_features:
            prompts = self.held_out.captions(range(min(8, len(self.held_out))))
        pipe = LatentPipeline(self.tokenizer, self.prior, self.text, self.experiment.sampling)
        with torch.autocast(self.prior.device.type, enabled=False):
            count = 2 if self.prior.context_features else 16
            images = pipe(prompts, num_images_per_prompt=count, truncate=True).images
        grid = make_grid([image_array(image) for image in images], columns=4)
        save_sample(self.experiment.folder, "prior", grid)
        return {"samples": grid}
