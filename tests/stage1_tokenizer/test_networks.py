"""Shapes at any factor and size, the identity start of residual blocks, gradients to every weight,
one compiled graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stage1_tokenizer import (
    ObjectiveConfig,
    TokenizerConfig,
    TokenizerModule,
    TokenizerObjective,
    VqganOptions,
    to_model_range,
)
from stage1_tokenizer.networks.attention import SpatialAttention
from stage1_tokenizer.networks.patch import Decoder, Encoder, ResidualBlock
from stage1_tokenizer.networks.transformer import positions
from tests.helpers.tokenizers import EVERY_LATENT_KIND, KINDS, LATENT_KINDS, tiny_tokenizer


def networks(
    factor: int, size: int = 32, width: int = 32, kernel: int = 3
) -> tuple[Encoder, Decoder]:
    config = TokenizerConfig(image_size=size, downsample_factor=factor, width=width)
    patch = min(factor, 4)
    return Encoder(3, config.widths, 1, kernel, patch, 5), Decoder(5, config.widths, 1, patch, 6)


@pytest.mark.parametrize("size", [32, 64, 96])
@pytest.mark.parametrize("factor", [1, 2, 4, 8, 16, 32])
def test_any_downsample_factor_and_size(factor, size):
    encoder, decoder = networks(factor, size)
    features = encoder(torch.zeros(1, 3, size, size))
    assert features.shape == (1, 5, size // factor, size // factor)
    assert decoder(features).shape == (1, 6, size, size)


@pytest.mark.parametrize(("kernel", "reach"), [(1, 0), (3, 1)])
def test_receptive_field_of_a_code(kernel, reach):
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
    blocks = [
        m
        for network in (encoder, decoder)
        for m in network.modules()
        if isinstance(m, ResidualBlock)
    ]
    unchanged = []
    for block in blocks:
        block.register_forward_hook(
            lambda _, given, result: unchanged.append(torch.equal(given[0], result))
        )
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


def test_patches_fold_to_channels_and_back():
    """A code sees all pixels of its own patch, at most those of the eight around it, and no
    others."""
    encoder, _ = networks(4)
    pixels = torch.randn(
        1, 3, 32, 32, generator=torch.Generator().manual_seed(0), requires_grad=True
    )
    for norm in (m for m in encoder.modules() if isinstance(m, (nn.GroupNorm, nn.LayerNorm))):
        # One over the image mixes all places; without it the reach is that of the convolutions
        norm.forward = lambda x: x
    (gradient,) = torch.autograd.grad(encoder(pixels)[0, :, 2, 5].sum(), pixels)
    reached = gradient[0].abs().sum(0) > 0
    assert reached[8:12, 20:24].all()
    reached[4:16, 16:28] = False
    assert not reached.any()


@pytest.mark.parametrize("factor", [2, 8])
def test_each_network_compiles_to_one_graph(factor):
    encoder, decoder = networks(factor)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    features = torch.compile(encoder, backend="eager", fullgraph=True, dynamic=False)(pixels)
    torch.testing.assert_close(features, encoder(pixels))
    # The compiler reads .grad of its inputs and warns where they are no leaves
    features = features.detach()
    decoded = torch.compile(decoder, backend="eager", fullgraph=True, dynamic=False)(features)
    torch.testing.assert_close(decoded, decoder(features))


ARCHITECTURES = {
    "attention": {"attention": True},
    "transformer": {"architecture": "transformer"},
    "dalle": {"architecture": "dalle"},
    "vqgan": {
        "architecture": "vqgan",
        "vqgan": VqganOptions(channels=32, multipliers=(1, 1, 2), blocks=1, latent_channels=8),
    },
    "vqgan without attention": {
        "architecture": "vqgan",
        "vqgan": VqganOptions(
            channels=32, multipliers=(1, 2, 1), blocks=2, latent_channels=8, attention=False
        ),
    },
}
EVERY_ARCHITECTURE = pytest.mark.parametrize("architecture", ARCHITECTURES)


@EVERY_ARCHITECTURE
@pytest.mark.parametrize("kind", ["vq", "gumbel", "binary", "hierarchical"])
def test_every_architecture_takes_images_of_any_size_to_codes_and_back(architecture, kind):
    tokenizer = tiny_tokenizer(**KINDS[kind], **ARCHITECTURES[architecture])
    for height, width in ((16, 16), (32, 16)):
        pixels = torch.rand(2, 3, height, width) * 2 - 1
        codes = tokenizer.encode(pixels)
        assert tokenizer.decode(codes, (height // 4, width // 4)).shape == pixels.shape


@EVERY_ARCHITECTURE
@EVERY_LATENT_KIND
def test_every_architecture_takes_images_to_gaussian_latents_and_back(architecture, kind, images):
    tokenizer = tiny_tokenizer(**LATENT_KINDS[kind], **ARCHITECTURES[architecture])
    pixels = to_model_range(images)
    assert tokenizer.posterior(pixels).mean.shape == (6, tokenizer.latent_dim)
    assert tokenizer.reconstruct(pixels).shape == pixels.shape


def test_vqgan_has_as_many_features_as_gaussian_latents_need():
    """Mean and standard deviation would otherwise both be linear in `code_dim` features."""
    tokenizer = tiny_tokenizer(quantizer="gaussian", **ARCHITECTURES["vqgan"])
    assert tokenizer.encoder.quant_conv.out_channels == 8
    assert isinstance(tokenizer.encoder.project, torch.nn.Identity)


@EVERY_ARCHITECTURE
def test_every_weight_of_every_architecture_gets_a_gradient(architecture, images):
    tokenizer = tiny_tokenizer(**ARCHITECTURES[architecture]).train()
    with torch.no_grad():  # identities at the start would keep some from it
        for parameter in tokenizer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    (loss,) = TokenizerObjective(tokenizer, ObjectiveConfig()).losses(images, 0)
    loss.value.backward()
    # A bias to all keys alike changes no attention.
    missing = [
        n
        for n, p in tokenizer.named_parameters()
        if not (p.grad is not None and p.grad.any()) and not n.endswith(".k.bias")
    ]
    assert not missing
    matrices = {id(p) for p in tokenizer.hidden_matrices()}
    assert all((p.ndim == 4) <= (id(p) in matrices) for p in tokenizer.parameters())


@EVERY_ARCHITECTURE
def test_every_architecture_survives_saving(architecture, tmp_path, images):
    tokenizer = tiny_tokenizer(**ARCHITECTURES[architecture])
    tokenizer.save_pretrained(tmp_path)
    pixels = to_model_range(images)
    for loader in (TokenizerModule.from_pretrained, TokenizerModule.from_pretrained):
        again = loader(tmp_path)
        assert again.fingerprint == tokenizer.fingerprint and torch.equal(
            again.encode(pixels), tokenizer.encode(pixels)
        )


@pytest.mark.parametrize("architecture", ["attention", "transformer", "vqgan"])
def test_attention_sees_the_whole_image(architecture):
    """A code depends on pixels that no convolution of these depths reaches."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(image_size=64, **ARCHITECTURES[architecture])
    with torch.no_grad():
        for parameter in tokenizer.encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    pixels = torch.randn(1, 3, 64, 64, requires_grad=True)
    tokenizer.encoder(pixels)[0, :, 0, 0].sum().backward()
    assert pixels.grad[0, :, -4:, -4:].abs().sum() > 0


@pytest.mark.parametrize("grid", [(3, 4), (16, 17)], ids=["few positions", "many positions"])
def test_attention_by_hand(grid):
    torch.manual_seed(0)
    block = SpatialAttention(6, nn.Identity())
    x = torch.randn(2, 6, *grid)
    tokens = x.flatten(2)
    q, k, v = (
        torch.einsum("oc,bcn->bon", m.weight[:, :, 0, 0], tokens) + m.bias[:, None]
        for m in (block.q, block.k, block.v)
    )
    weights = (torch.einsum("bcq,bck->bqk", q, k) / 6**0.5).softmax(-1)
    mixed = torch.einsum("bqk,bck->bcq", weights, v).reshape(2, 6, *grid)
    torch.testing.assert_close(block(x), x + block.proj_out(mixed))


def test_position_embeddings_are_distinct():
    table = positions(9, 7, 32, torch.device("cpu"))
    assert table.shape == (63, 32) and torch.cdist(table, table).add(torch.eye(63)).min() > 0.1
    # Rows come first
    torch.testing.assert_close(positions(5, 7, 32, torch.device("cpu")), table[:35])
