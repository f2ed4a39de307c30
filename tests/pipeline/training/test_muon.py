"""Muon: orthogonal updates, the same steps as torch's own on matrices, kernels as matrices."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.training.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8), (1, 16, 16)])
def test_orthogonalised_singular_values_are_near_one(shape):
    generator = torch.Generator().manual_seed(0)
    result = orthogonalize(torch.randn(shape, generator=generator))
    values = torch.linalg.svdvals(result.float())
    assert result.shape == shape and 0.5 < float(values.min()) <= float(values.max()) < 1.4


def test_batched_orthogonalisation_equals_one_by_one():
    matrices = torch.randn(4, 12, 18, generator=torch.Generator().manual_seed(1))
    together = orthogonalize(matrices * torch.tensor([1e-6, 1.0, 30.0, 1e4])[:, None, None])
    for matrix, result in zip(matrices, together, strict=True):
        torch.testing.assert_close(result, orthogonalize(matrix[None])[0], atol=0.03, rtol=0)


@pytest.mark.parametrize("native", [True, False])
def test_iterations_are_in_bf16_only_where_the_device_computes_it(native, monkeypatch):
    monkeypatch.setattr("pipeline.training.muon.uses_bf16", lambda precision, device: native)
    result = orthogonalize(torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(5)))
    assert result.dtype == torch.float32
    assert torch.equal(result, result.bfloat16().float()) == native


def test_steps_equal_torchs_muon():
    start = torch.randn(24, 40, generator=torch.Generator().manual_seed(2))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    own = Muon([ours], lr=0.1, weight_decay=0.01)
    reference = torch.optim.Muon(
        [theirs], lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(4):
        gradient = torch.randn(24, 40, generator=torch.Generator().manual_seed(10 + step))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        own.step()
        reference.step()
    moved = (theirs - start).norm()
    assert moved > 1 and (ours - theirs).norm() < 0.02 * moved


def test_convolution_kernels_are_flattened_to_matrices():
    start = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(3))
    kernel = nn.Parameter(start.clone().to(memory_format=torch.channels_last))
    matrix = nn.Parameter(start.reshape(8, 36).clone())
    gradient = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(4))
    kernel.grad, matrix.grad = (
        gradient.clone().to(memory_format=torch.channels_last),
        gradient.reshape(8, 36).clone(),
    )
    for parameter in (kernel, matrix):
        Muon([parameter], lr=0.1).step()
    torch.testing.assert_close(kernel.detach().reshape(8, 36), matrix.detach())


def test_parameters_without_gradient_do_not_change():
    still, moved = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    moved.grad = torch.eye(4)
    Muon([still, moved], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(still, torch.ones(4, 4)) and not torch.equal(moved, torch.ones(4, 4))
