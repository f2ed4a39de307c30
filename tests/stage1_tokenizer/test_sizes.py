"""Tokenizers at another size than they were made for, and of rectangles."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from stage1_tokenizer import TokenizerConfig, TokenizerModule, TokenizerObjective, VqganOptions
from tests.helpers.tokenizers import (
    ALL_KINDS,
    EVERY_KIND,
    EVERY_TOKENIZER,
    KINDS,
    LATENT_KINDS,
    objective_of,
    tiny_tokenizer,
)

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "patch": {"attention": True},
    "transformer": {"architecture": "transformer"},
    "dalle": {"architecture": "dalle"},
    "vqgan": {
        "architecture": "vqgan",
        "vqgan": VqganOptions(channels=32, multipliers=(1, 1, 1), blocks=1, latent_channels=8),
    },
}


def pixels(height: int, width: int) -> torch.Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_a_square_given_as_two_numbers_is_one_number():
    """So that settings and fingerprints of squares do not depend on the form."""
    config = TokenizerConfig(image_size=(64, 64))
    assert config == TokenizerConfig(image_size=64) and config.image_size == 64
    assert tiny_tokenizer(image_size=[16, 16]).fingerprint == tiny_tokenizer().fingerprint


@EVERY_KIND
def test_codes_of_rectangles_are_a_rectangle(kind):
    tokenizer = tiny_tokenizer(**KINDS[kind], image_size=(16, 32))
    assert tokenizer.grid == (4, 8) and tokenizer.size == (16, 32)
    codes = tokenizer.encode(pixels(16, 32))
    assert codes[0].numel() == sum(level.length for level in tokenizer.layout)
    assert tokenizer.decode(codes).shape == (2, 3, 16, 32)


@EVERY_TOKENIZER
def test_a_tokenizer_is_trained_on_rectangles(kind):
    tokenizer = tiny_tokenizer(**ALL_KINDS[kind], image_size=(16, 32)).train()
    images = ((pixels(16, 32) + 1) * 127.5).to(torch.uint8).permute(0, 2, 3, 1)
    found = next(TokenizerObjective(tokenizer, objective_of(kind)).losses(images, 1))
    found.value.backward()
    assert math.isfinite(float(found.value.detach()))
    assert any(p.grad is not None and p.grad.any() for p in tokenizer.encoder.parameters())


@EVERY_KIND
def test_another_size_keeps_the_weights_and_the_codes(kind):
    tokenizer = tiny_tokenizer(**KINDS[kind])
    other = tokenizer.at_size((32, 16))
    assert (other.size, other.grid, other.training) == ((32, 16), (8, 4), False)
    assert torch.equal(other.encode(pixels(32, 16)), tokenizer.encode(pixels(32, 16)))
    assert torch.equal(other.encode(pixels(16, 16)), tokenizer.encode(pixels(16, 16)))
    assert sum(level.length for level in other.layout) == 2 * sum(
        level.length for level in tokenizer.layout
    )
    assert other.fingerprint == tokenizer.at_size([32, 16]).fingerprint != tokenizer.fingerprint


def test_a_tokenizer_at_its_own_size_is_itself():
    tokenizer = tiny_tokenizer()
    assert tokenizer.at_size(16) is tokenizer is tokenizer.at_size((16, 16))
    assert tokenizer.at_size((32, 32)).fingerprint == tokenizer.at_size(32).fingerprint


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_takes_another_size(architecture):
    tokenizer = tiny_tokenizer(**ARCHITECTURES[architecture]).at_size((24, 40))
    codes = tokenizer.encode(pixels(24, 40))
    assert codes.shape == (2, 6, 10) and tokenizer.decode(codes).shape == (2, 3, 24, 40)


def test_codes_of_a_rectangle_are_those_of_its_squares():
    """A code of the default encoder sees the pixels that it covers and no other."""
    tokenizer = tiny_tokenizer()
    image = pixels(16, 32)
    halves = [tokenizer.encode(half) for half in image.split(16, dim=3)]
    assert torch.equal(tokenizer.at_size((16, 32)).encode(image), torch.cat(halves, dim=2))


def test_rectangles_turned_give_turned_grids():
    """Height and width are not swapped on any way: what is drawn at the right stays there."""
    tokenizer = tiny_tokenizer(image_size=(16, 32))
    image = torch.zeros(1, 3, 16, 32)
    image[:, :, 4:8, 20:24] = 1.0
    codes = tokenizer.encode(image)[0]
    changed = (codes != codes[0, 0]).nonzero().tolist()
    assert changed == [[1, 5]]


def test_a_saved_tokenizer_of_rectangles_is_loaded_at_its_size(tmp_path):
    tokenizer = tiny_tokenizer().at_size((16, 32))
    tokenizer.save_pretrained(tmp_path)
    loaded = TokenizerModule.from_pretrained(tmp_path)
    assert loaded.size == (16, 32) and loaded.fingerprint == tokenizer.fingerprint
    assert torch.equal(loaded.encode(pixels(16, 32)), tokenizer.encode(pixels(16, 32)))


def test_one_latent_vector_is_for_one_size():
    tokenizer = tiny_tokenizer(**LATENT_KINDS["gaussian vector"], image_size=(16, 32))
    assert tokenizer.decode_latents(tokenizer.posterior(pixels(16, 32)).mean).shape[2:] == (16, 32)
    with pytest.raises(
        ValueError, match=r"is for images of 32x16 .*16x16 are asked for; set data.image_size=\[16"
    ):
        tokenizer.at_size(16)
    with pytest.raises(ValueError, match=r"pixels are 16x16 .* vector is for 32x16"):
        tokenizer.posterior(pixels(16, 16))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((30, 60), r"image_size \[30, 60\] is not a multiple of 4, .* that fits is \[32, 60\]"),
        ((0, 16), r"image_size is \[0, 16\]; it must be at least 1"),
        ((16, 16, 3), r"image_size is \[16, 16, 3\]; it must be one number, or \[height, width\]"),
        ((16,), r"image_size is \[16\]; it must be one number, or \[height, width\]"),
    ],
)
def test_sizes_that_fit_no_grid_are_refused(size, message):
    with pytest.raises(ValueError, match=message):
        tiny_tokenizer().at_size(size)
