"""Two processes over gloo: codebook statistics are those of the global batch, restarts are
identical, evaluation does not communicate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stage1_tokenizer import (
    GaussianOptions,
    GumbelOptions,
    ObjectiveConfig,
    ResidualOptions,
    ScoreFunctionOptions,
    SignOptions,
    TokenizerObjective,
    VectorOptions,
)
from stage1_tokenizer.quantizers import (
    GaussianQuantizer,
    GumbelQuantizer,
    ResidualQuantizer,
    ScoreFunctionQuantizer,
    SignQuantizer,
    VectorQuantizer,
)
from tests.helpers.tokenizers import ALL_KINDS, AffinePrior, objective_of, tiny_tokenizer

pytestmark = pytest.mark.distributed

PROCESSES = 2
SHAPE = (4, 4, 4, 4)


def batch(step: int, rank: int | None) -> Tensor:
    """Features of a step: one process's half, or the whole."""
    halves = [
        torch.randn(SHAPE, generator=torch.Generator().manual_seed(100 * step + r))
        for r in range(PROCESSES)
    ]
    return torch.cat(halves) if rank is None else halves[rank]


def averages() -> VectorQuantizer:
    """Started on a fixed codebook, never restarting: what is left are the moving averages."""
    vq = VectorQuantizer(16, 4, VectorOptions(dead_code_threshold=0.0, normalize=False, decay=0.8))
    vq.codebook.copy_(torch.randn(16, 4, generator=torch.Generator().manual_seed(3)))
    vq.sums.copy_(vq.codebook)
    vq.counts.fill_(1.0)
    vq.initialized.fill_(True)
    return vq


def restarting(codebook: str) -> VectorQuantizer:
    return VectorQuantizer(
        64, 4, VectorOptions(dead_code_threshold=0.9, dead_code_check_every=2, codebook=codebook)
    )  # type: ignore[arg-type]


def shared_residual() -> ResidualQuantizer:
    torch.manual_seed(0)
    vector = VectorOptions(dead_code_threshold=0.9, dead_code_check_every=2, kmeans_iterations=3)
    return ResidualQuantizer(16, 4, ResidualOptions(depth=2, shared=True), vector)


def baseline(rank: int | None) -> Tensor:
    score = ScoreFunctionQuantizer(4, 4, ScoreFunctionOptions(baseline_decay=0.5)).train()
    for step in range(4):
        cost = batch(step, rank)
        score.surrogate(cost, torch.zeros(len(cost), 2, 2))
    return score.baseline.clone()


def entropy_gradient(rank: int | None) -> Tensor:
    """Of the penalty to a parameter that shifts all features; data-parallel training averages it
    over the processes."""
    shift = torch.zeros(4, requires_grad=True)
    sign = SignQuantizer(16, SignOptions(inverse_temperature=0.5), spherical=False).train()
    sign.entropy_penalty(batch(0, rank) + shift[:, None, None]).backward()
    return shift.grad


def free_bits_gradient(rank: int | None) -> Tensor:
    """Of the KL to a parameter that shifts all features, with free bits that some dimensions have
    used up over both halves of the batch and not in each."""
    shift = torch.zeros(4, requires_grad=True)
    options = GaussianOptions(free_bits=0.55)
    gaussian = GaussianQuantizer(2, (4, 4), options).train()
    kl = gaussian(batch(0, rank) + shift[:, None, None], 1.0).kl
    assert kl is not None
    kl.backward()
    return shift.grad


def latent_prior_gradients(rank: int, wrap: Callable[[nn.Module], nn.Module]) -> dict[str, Tensor]:
    """Of the tokenizer and its learned prior, for images and noise of this rank."""
    tokenizer = tiny_tokenizer(quantizer="gaussian").train()
    objective = TokenizerObjective(
        tokenizer, ObjectiveConfig(kl_ramp_steps=0), latent_prior=AffinePrior(64)
    )
    draws = torch.Generator().manual_seed(rank)
    images = torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8, generator=draws)
    wrapped = {name: wrap(network) for name, network in objective.networks.items()}
    torch.manual_seed(rank)
    for loss in objective.losses(images, 0, wrapped):
        loss.value.backward()
    return {
        f"{name}.{key}": parameter.grad.clone()
        for name, network in objective.networks.items()
        for key, parameter in network.named_parameters()
        if parameter.grad is not None
    }


def run(quantizer: torch.nn.Module, rank: int | None, steps: int = 6) -> dict[str, Tensor]:
    quantizer.train()
    for step in range(steps):
        quantizer(batch(step, rank), 1.0)
    return {k: v.clone() for k, v in quantizer.state_dict().items()}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES
    )
    torch.manual_seed(rank)  # the processes' own generators differ, as in training
    vq = restarting("ema")
    states = {
        "averages": run(averages(), rank),
        "ema": run(vq, rank),
        "gradient": run(restarting("gradient"), rank),
        "gumbel": run(GumbelQuantizer(4, 4, GumbelOptions()), rank),
        "residual": run(shared_residual(), rank),
        "other": {
            "baseline": baseline(rank),
            "entropy gradient": entropy_gradient(rank),
            "free bits gradient": free_bits_gradient(rank),
        },
        "latent prior": latent_prior_gradients(rank, DistributedDataParallel),
    }
    if rank == 0:  # a collective in here would wait for the other process for ever
        for kind, changes in ALL_KINDS.items():
            TokenizerObjective(tiny_tokenizer(**changes), objective_of(kind)).evaluate(
                [torch.zeros(2, 16, 16, 3).byte()]
            )
    dist.barrier()
    torch.save(states, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(work, args=(str(folder),), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


def test_codebook_ema_equals_that_of_the_global_batch(states):
    whole = run(averages(), None)
    for state in states:
        for name, tensor in whole.items():
            torch.testing.assert_close(
                state["averages"][name], tensor, msg=lambda m, name=name: f"{name}: {m}"
            )


def test_gumbel_usage_is_summed_over_processes(states):
    whole = run(GumbelQuantizer(4, 4, GumbelOptions()), None)
    for state in states:
        torch.testing.assert_close(state["gumbel"]["counts"], whole["counts"])


def test_baseline_is_averaged_over_processes(states):
    torch.testing.assert_close(states[0]["other"]["baseline"], baseline(None))
    assert torch.equal(states[0]["other"]["baseline"], states[1]["other"]["baseline"])


def test_entropy_penalty_gradient_equals_that_of_the_global_batch(states):
    averaged = sum(state["other"]["entropy gradient"] for state in states) / PROCESSES
    torch.testing.assert_close(averaged, entropy_gradient(None))
    assert not torch.allclose(states[0]["other"]["entropy gradient"], averaged)


def test_free_bits_gradient_equals_that_of_the_global_batch(states):
    averaged = sum(state["other"]["free bits gradient"] for state in states) / PROCESSES
    torch.testing.assert_close(averaged, free_bits_gradient(None))
    alone = sum(free_bits_gradient(rank) for rank in range(PROCESSES)) / PROCESSES
    assert not torch.allclose(alone, averaged)  # the halves do not use up the same dimensions


def test_gradients_of_tokenizer_and_latent_prior_are_averaged(states):
    first, second = (state["latent prior"] for state in states)
    alone = [latent_prior_gradients(rank, lambda network: network) for rank in range(PROCESSES)]
    assert {"latent_prior.prior.mean", "latent_prior.prior.log_std"} <= first.keys()
    assert first.keys() == alone[0].keys()
    for name, gradient in first.items():
        assert torch.equal(second[name], gradient), name
        mean = (alone[0][name] + alone[1][name]) / 2
        torch.testing.assert_close(gradient, mean, msg=lambda m, name=name: f"{name}: {m}")


def test_residual_codebooks_are_identical_on_all_processes(states):
    first, second = (state["residual"] for state in states)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(run(shared_residual(), 0)["books.0.codebook"], first["books.0.codebook"])


@pytest.mark.parametrize("kind", ["ema", "gradient"])
def test_initialisation_and_restarts_are_identical_on_all_processes(states, kind):
    first, second = (state[kind] for state in states)
    assert all(torch.equal(first[name], second[name]) for name in first)
    alone = run(restarting(kind), 0)
    assert not torch.equal(alone["codebook"], first["codebook"])  # there was more than one process


def test_restarts_use_vectors_of_all_processes(states):
    """With a restart at the last step, codes sit at vectors of either process's batch."""
    import torch.nn.functional as F

    book = F.normalize(states[0]["gradient"]["codebook"], dim=1)
    taken = []
    for rank in range(PROCESSES):
        vectors = F.normalize(batch(5, rank).permute(0, 2, 3, 1).flatten(0, 2), dim=1)
        taken.append(int((torch.cdist(book, vectors).min(1).values < 0.02).sum()))
    assert min(taken) > 0, taken
