"""Tokenizers on a GPU: every quantizer, codebook statistics, restarts, published weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stage1_tokenizer import TokenizerModule, VectorOptions
from stage1_tokenizer.convert_checkpoints import align_state_dict, convert
from stage1_tokenizer.quantizers import VectorQuantizer
from tests.helpers.published_weights import vqgan
from tests.helpers.tokenizers import (
    ALL_KINDS,
    EVERY_LATENT_KIND,
    EVERY_TOKENIZER,
    KINDS,
    LATENT_KINDS,
    tiny_tokenizer,
)

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", KINDS)
def test_encoding_and_decoding_equal_those_of_the_cpu(kind, device):
    tokenizer = tiny_tokenizer(**KINDS[kind])
    pixels = torch.rand(4, 3, 16, 16) * 2 - 1
    codes, drawn = tokenizer.encode(pixels), tokenizer.decode(tokenizer.encode(pixels))
    there = tokenizer.to(device)
    found = there.encode(pixels.to(device))
    assert (found.cpu() == codes).float().mean() > 0.98  # a near tie may fall the other way
    torch.testing.assert_close(there.decode(codes.to(device)).cpu(), drawn, rtol=1e-3, atol=1e-3)


@EVERY_LATENT_KIND
def test_posteriors_equal_those_of_the_cpu(kind, device):
    tokenizer = tiny_tokenizer(**LATENT_KINDS[kind])
    pixels = torch.rand(4, 3, 16, 16) * 2 - 1
    posterior = tokenizer.posterior(pixels)
    z = posterior.sample(torch.Generator().manual_seed(0))
    drawn = tokenizer.decode_latents(z)
    there = tokenizer.to(device)
    found = there.posterior(pixels.to(device))
    torch.testing.assert_close(found.mean.cpu(), posterior.mean, rtol=1e-3, atol=1e-3)
    sampled = found.sample(torch.Generator().manual_seed(0))
    torch.testing.assert_close(sampled.cpu(), z, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        there.decode_latents(z.to(device)).cpu(), drawn, rtol=1e-3, atol=1e-3
    )


@EVERY_TOKENIZER
def test_every_quantizer_has_gradients(kind, device):
    tokenizer = tiny_tokenizer(**ALL_KINDS[kind]).to(device).train()
    pixels = torch.rand(8, 3, 16, 16, device=device) * 2 - 1
    output = tokenizer(pixels, 0.9 if tokenizer.quantizer.relaxed else None)
    value = (
        tokenizer.likelihood.nll_map(pixels.clamp(0.01, 0.99), output.parameters).mean()
        + output.quantized.loss
    )
    value.backward()
    gradients = [p.grad for p in tokenizer.parameters() if p.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)


def learned(device: torch.device, **options: object) -> tuple[VectorQuantizer, list[Tensor]]:
    """After five steps, and the codes of each. No vector lies between two codes: their distances
    differ by 6e-3 at least."""
    quantizer = VectorQuantizer(24, 4, VectorOptions(**options)).to(device).train()  # type: ignore[arg-type]
    codes = []
    for step in range(5):
        vectors = torch.randn(8 * 16, 4, generator=torch.Generator().manual_seed(365 + step))
        features = vectors.reshape(8, 4, 4, 4).permute(0, 3, 1, 2).to(device)
        codes.append(quantizer(features).codes.cpu())
    return quantizer, codes


@pytest.mark.parametrize(
    "options",
    [
        {"dead_code_threshold": 0.0},
        {"dead_code_threshold": 0.5, "dead_code_check_every": 2},
        {"kmeans_iterations": 3},
    ],
)
def test_codebook_statistics_and_restarts_equal_those_of_the_cpu(options, device):
    expected, codes = learned(torch.device("cpu"), **options)
    found, found_codes = learned(device, **options)
    assert all(torch.equal(a, b) for a, b in zip(codes, found_codes, strict=True))
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(
            found.state_dict()[name].cpu(),
            value,
            rtol=1e-4,
            atol=1e-4,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("style", ["taming", "llamagen"])
def test_published_vqgan_weights_compute_as_on_the_cpu(style, device):
    weights = vqgan(
        channels=32, multipliers=(1, 2), blocks=1, latent=8, dim=8, codes=50, style=style
    )
    config, ours = convert(
        weights, "llamagen" if style == "llamagen" else "taming-vqgan", "weights"
    )
    tokenizer = TokenizerModule(config)
    tokenizer.load_state_dict(align_state_dict(config, ours, tokenizer.state_dict(), "weights"))
    tokenizer.eval()
    pixels = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(5)) * 2 - 1
    codes = tokenizer.encode(pixels)
    drawn = tokenizer.decode(codes)
    there = tokenizer.to(device)
    assert (there.encode(pixels.to(device)).cpu() == codes).float().mean() > 0.98
    torch.testing.assert_close(there.decode(codes.to(device)).cpu(), drawn, rtol=1e-3, atol=1e-3)
