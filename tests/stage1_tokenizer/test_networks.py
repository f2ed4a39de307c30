"""Shapes at any factor and size, the identity start of residual blocks, gradients to every weight, one compiled graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stage1_tokenizer.config import TokenizerConfig
from stage1_tokenizer.networks import Decoder, Encoder, ResidualBlock


def networks(factor: int, size: int = 32, width: int = 32, kernel: int = 3) -> tuple[Encoder, Decoder]:
    config = TokenizerConfig(image_size=size, factor=factor, width=width)
    patch = min(factor, 4)
    return Encoder(3, config.widths, 1, kernel, patch, 5), Decoder(5, config.widths, 1, patch, 6)


@pytest.mark.parametrize("size", [32, 64, 96])
@pytest.mark.parametrize("factor", [1, 2, 4, 8, 16, 32])
def test_any_factor_and_size(factor, size):
    encoder, decoder = networks(factor, size)
    features = encoder(torch.zeros(1, 3, size, size))
    assert features.shape == (1, 5, size // factor, size // factor)
    assert decoder(features).shape == (1, 6, size, size)


@pytest.mark.parametrize(("kernel", "reach"), [(1, 0), (3, 1)])
def test_a_code_sees_its_own_place_or_its_neighbours_too(kernel, reach):
    torch.manual_seed(0)
    encoder, _ = networks(8, 64, kernel=kernel)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.1)
    pixels = torch.randn(1, 3, 64, 64, requires_grad=True)
    encoder(pixels)[0, :, 4, 4].sum().backward()
    seen = pixels.grad[0].abs().sum(0).unflatten(0, (8, 8)).unflatten(2, (8, 8)).sum((1, 3)) > 0
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[4 - reach : 5 + reach, 4 - reach : 5 + reach] = True
    assert torch.equal(seen, expected)


def test_residual_blocks_start_as_the_identity():
    torch.manual_seed(0)
    encoder, decoder = networks(8)
    blocks = [m for network in (encoder, decoder) for m in network.modules() if isinstance(m, ResidualBlock)]
    unchanged = []
    for block in blocks:
        block.register_forward_hook(lambda _, given, result: unchanged.append(torch.equal(given[0], result)))
    decoder(encoder(torch.randn(2, 3, 32, 32)))
    assert len(unchanged) == len(blocks) > 0 and all(unchanged)


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
    """A code sees all pixels of its own patch, at most those of the eight around it, and no others."""
    encoder, _ = networks(4)
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for norm in (m for m in encoder.modules() if isinstance(m, (nn.GroupNorm, nn.LayerNorm))):
        norm.forward = lambda x: x  # one over the picture mixes all places; without it the reach is that of the convolutions
    (gradient,) = torch.autograd.grad(encoder(pixels)[0, :, 2, 5].sum(), pixels)
    reached = gradient[0].abs().sum(0) > 0
    assert reached[8:12, 20:24].all()
    reached[4:16, 16:28] = False
    assert not reached.any()


@pytest.mark.parametrize("factor", [2, 8])
def test_each_network_is_one_graph(factor):
    encoder, decoder = networks(factor)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    features = torch.compile(encoder, backend="eager", fullgraph=True, dynamic=False)(pixels)
    torch.testing.assert_close(features, encoder(pixels))
    features = features.detach()  # the compiler reads .grad of its inputs and warns where they are no leaves
    decoded = torch.compile(decoder, backend="eager", fullgraph=True, dynamic=False)(features)
    torch.testing.assert_close(decoded, decoder(features))
