"""`minidalle estimate`: the memory that each training stage of an experiment takes, from its
configuration alone. Reads no data."""

from __future__ import annotations

from functools import partial

import psutil
import torch

from pipeline.config.experiment import Experiment
from pipeline.config.train import TrainConfig
from pipeline.runtime.devices import should_compile, uses_bf16
from pipeline.stages.finetune import LoRAAdapter
from pipeline.stages.prior import stream_config
from pipeline.training.batch import to_device
from pipeline.training.memory_estimate import MemoryEstimate, Probe, estimate_training_memory
from pipeline.training.task import Objective
from stage1_tokenizer import TokenizerModule, TokenizerObjective
from stage2_prior import LatentPriorModule, PriorModule, PriorObjective

_RUNNING = 150 * 2**20
"""Bytes that a training on a CPU takes besides its networks and the loaded program: data,
evaluations, trackers, memory that the allocator keeps. Fitted to the measured trainings of
docs/scaling.md."""


def estimate(experiment: Experiment, *, processes: int = 1) -> dict[str, MemoryEstimate]:
    """Memory per process of each trained stage, by name, on this machine's device. A prior of
    Gaussian latents, which is small, is estimated only where it is trained with the tokenizer.

    Args:
        processes: number of processes that share the training.

    Raises:
        ValueError: `processes` is below 1; or `train.batch_size` or
            `train.gradient_accumulation_steps` is `auto`, which fills the memory there is.
    """
    if processes < 1:
        raise ValueError(f"processes is {processes}; it must be at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    program = 0 if device.type == "cuda" else psutil.Process().memory_info().rss + _RUNNING
    tokenizer = TokenizerModule(experiment.tokenizer.model)
    estimates = {}
    if not experiment.tokenizer.frozen:
        model = experiment.tokenizer.model
        shape = (8, *model.size, model.channels)
        images = torch.randint(256, shape, dtype=torch.uint8)
        latent_prior = (
            LatentPriorModule(experiment.prior.latent, tokenizer.latent_dim)
            if experiment.prior.joint
            else None
        )
        objective = TokenizerObjective(
            tokenizer.train(), experiment.tokenizer.objective, latent_prior=latent_prior
        )
        train = experiment.tokenizer.train
        estimates["tokenizer"] = _estimate(
            "tokenizer", objective, images, train, experiment.precision, device, processes, program
        )
    if not experiment.tokenizer.model.has_codes:
        return estimates
    prior_objective, batch = trial_objective(experiment, tokenizer, 8)
    train = experiment.prior.train
    estimates["prior"] = _estimate(
        "prior", prior_objective, batch, train, experiment.precision, device, processes, program
    )
    return estimates


def trial_objective(
    experiment: Experiment, tokenizer: TokenizerModule, rows: int
) -> tuple[PriorObjective, dict[str, torch.Tensor]]:
    """The objective of a prior of the experiment's sizes, and a batch of that many arbitrary rows.
    The vocabulary is as large as the configuration allows."""
    stream = stream_config(
        tokenizer,
        experiment.text.vocab_size,
        experiment.text.max_length,
        any_order=experiment.prior.train.code_order != "raster",
    )
    prior = PriorModule(experiment.prior.model, stream)
    if experiment.prior.lora_rank:
        LoRAAdapter(prior, experiment.prior, {"prior": "of an estimate"})
    train = experiment.prior.train
    objective = PriorObjective(
        prior.train(),
        experiment.prior.objective,
        train.orders,
        experiment.sequence.captioning_fraction,
        activation_checkpointing=train.activation_checkpointing,
    )
    return objective, {
        "text_ids": torch.randint(3, stream.text_vocab_size, (rows, stream.text_length)),
        "codes": torch.zeros(rows, prior.stream.image_length, dtype=torch.long),
    }


# Eight parameters: two callers above, which differ in the first four alone.
def _estimate(
    label: str,
    objective: Objective,
    batch: torch.Tensor | dict[str, torch.Tensor],
    train: TrainConfig,
    precision: str,
    device: torch.device,
    processes: int,
    program: int,
) -> MemoryEstimate:
    batch_size, micro_batches = train.resolved_batch(label)
    for network in objective.networks.values():
        network.to(device)
    autocast = partial(
        torch.autocast, device.type, torch.bfloat16, enabled=uses_bf16(precision, device)
    )
    rows = max(batch_size // micro_batches // processes, 1)
    return estimate_training_memory(
        Probe(objective, train.steps - 1, autocast, device, simulated=device.type != "cuda"),
        train,
        to_device(batch, device),
        rows,
        compiled=should_compile(train, device),
        several=processes > 1,
        program=program,
    )
