"""Shapes at any factor and size, the identity start of residual blocks, gradients to every weight, one compiled graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stage1_tokenizer.config import TokenizerConfig
from stage1_tokenizer.networks import Decoder, Encoder, ResidualBlock


def networks(factor: int, size: int = 32, width: int = 32) -> tuple[Encoder, Decoder]:
    config = TokenizerConfig(image_size=size, factor=factor, width=width)
    patch = min(factor, 4)
    return Encoder(3, config.widths, 1, patch, 5), Decoder(5, config.widths, 1, patch, 6)


@pytest.mark.parametrize("size", [32, 64, 96])
@pytest.mark.parametrize("factor", [1, 2, 4, 8, 16, 32])
def test_any_factor_and_size(factor, size):
    encoder, decoder = networks(factor, size)
    features = encoder(torch.zeros(1, 3, size, size))
    assert features.shape == (1, 5, size // factor, size // factor)
    assert decoder(features).shape == (1, 6, size, size)


def test_a_residual_block_starts_as_the_identity():
    x = torch.randn(2, 32, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ResidualBlock(32)(x), x)


@pytest.mark.parametrize("factor", [4, 16])
def test_every_weight_receives_a_gradient_once_blocks_have_left_the_identity(factor):
    torch.manual_seed(0)
    encoder, decoder = networks(factor)
    for module in (*encoder.modules(), *decoder.modules()):
        if isinstance(module, ResidualBlock):
            nn.init.normal_(module.project.weight, std=0.1)
    decoder(encoder(torch.randn(2, 3, 32, 32))).square().sum().backward()
    for network in (encoder, decoder):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_patches_fold_in_place():
    """A code sees the pixels of its own patch and of the eight around it, and no others."""
    encoder, _ = networks(4)
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for block in (m for m in encoder.modules() if isinstance(m, nn.GroupNorm)):
        block.forward = lambda x: x  # norms mix all places; without them the reach is that of the convolutions
    (gradient,) = torch.autograd.grad(encoder(pixels)[0, :, 2, 5].sum(), pixels)
    rows, columns = gradient[0].abs().sum(0).nonzero().unbind(1)
    # One 3x3 stem: the patch and its neighbours (the block is the identity at its start).
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (4, 15, 16, 27)


@pytest.mark.parametrize("factor", [2, 8])
def test_each_network_is_one_graph(factor):
    encoder, decoder = networks(factor)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    features = torch.compile(encoder, backend="eager", fullgraph=True, dynamic=False)(pixels)
    torch.testing.assert_close(features, encoder(pixels))
    features = features.detach()  # the compiler reads .grad of its inputs and warns where they are no leaves
    decoded = torch.compile(decoder, backend="eager", fullgraph=True, dynamic=False)(features)
    torch.testing.assert_close(decoded, decoder(features))
