"""`ImageTokenizer`: the contract of codes and pictures, whatever the quantizer, the factor and the likelihood."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from stage1_tokenizer import ImageTokenizer, Level, TokenizerConfig, to_model_range, to_pictures
from tests.stage1_tokenizer.conftest import tiny_tokenizer

QUANTIZERS = pytest.mark.parametrize("quantizer", ["vq", "gumbel"])


@QUANTIZERS
@pytest.mark.parametrize("likelihood", ["l2", "l1", "logit_laplace"])
def test_pictures_become_a_grid_of_codes_and_codes_become_pictures(quantizer, likelihood, pictures):
    tokenizer = tiny_tokenizer(quantizer=quantizer, likelihood=likelihood)
    codes = tokenizer.encode(to_model_range(pictures))
    assert codes.shape == (6, 4, 4) and codes.dtype == torch.int64 and 0 <= codes.min() <= codes.max() < 12
    pixels = tokenizer.decode(codes)
    assert pixels.shape == (6, 3, 16, 16) and -1 <= pixels.min() <= pixels.max() <= 1
    output = tokenizer(to_model_range(pictures))
    assert torch.equal(output.codes, codes)
    torch.testing.assert_close(tokenizer.likelihood.picture(output.parameters).clamp(-1, 1), pixels, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("factor", "size"), [(1, 5), (2, 14), (4, 12), (8, 24), (16, 32), (32, 64)])
def test_any_factor_and_size(factor, size):
    tokenizer = tiny_tokenizer(factor=factor, image_size=size)
    assert tokenizer.grid == (size // factor, size // factor)
    assert tokenizer.layout == (Level(grid=tokenizer.grid, num_codes=12),)
    codes = tokenizer.encode(torch.zeros(2, 3, size, size))
    assert codes.shape == (2, *tokenizer.grid)
    assert tokenizer.decode(codes).shape == (2, 3, size, size)


@QUANTIZERS
def test_code_vectors_are_what_the_decoder_sees(quantizer):
    tokenizer = tiny_tokenizer(quantizer=quantizer)
    codes = torch.randint(0, 12, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    vectors = tokenizer.code_vectors
    assert len(vectors) == 12 and not vectors.requires_grad
    assert torch.equal(vectors[codes].permute(0, 3, 1, 2), tokenizer.quantizer.embed(codes))


@QUANTIZERS
def test_a_picture_has_the_same_codes_alone_as_in_a_batch(quantizer, pictures):
    tokenizer = tiny_tokenizer(quantizer=quantizer)
    pixels = to_model_range(pictures)
    assert torch.equal(tokenizer.encode(pixels), torch.cat([tokenizer.encode(p[None]) for p in pixels]))


@QUANTIZERS
def test_encoding_is_that_of_evaluation_even_while_training_and_changes_nothing(quantizer, pictures):
    tokenizer = tiny_tokenizer(quantizer=quantizer)
    expected, before = tokenizer.encode(to_model_range(pictures)), tokenizer.fingerprint
    tokenizer.train()
    assert torch.equal(tokenizer.encode(to_model_range(pictures)), expected)
    assert tokenizer.fingerprint == before and tokenizer.quantizer.training


def test_an_encoder_that_fails_leaves_the_quantizer_as_it_was(tokenizer):
    def fail(*_):
        raise RuntimeError("out of memory")

    tokenizer.train().encoder.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        tokenizer.encode(torch.zeros(1, 3, 16, 16))
    assert tokenizer.quantizer.training


def test_pil_pictures_of_any_mode(tokenizer):
    images = [Image.new(mode, (16, 16)) for mode in ("RGB", "L", "1", "CMYK", "RGBA")]
    codes = tokenizer.to_codes(images)
    assert codes.shape == (5, 4, 4)
    white = tokenizer.to_codes([Image.new("RGB", (16, 16), "white")])
    assert torch.equal(codes[4:], white)  # nothing but transparency is white paper
    drawn = tokenizer.to_images(codes)
    assert [image.size for image in drawn] == [(16, 16)] * 5 and drawn[0].mode == "RGB"
    assert torch.equal(torch.from_numpy(np.asarray(drawn[2]).copy()), to_pictures(tokenizer.decode(codes))[2])


def test_pil_pictures_of_another_size_are_refused_and_the_way_out_named(tokenizer):
    with pytest.raises(ValueError, match=r"20x16 and the tokenizer works at 16x16; use .*resize_and_crop"):
        tokenizer.to_codes([Image.new("RGB", (20, 16))])


@pytest.mark.parametrize("shape", [(1, 3, 16, 8), (1, 1, 16, 16), (3, 16, 16)])
def test_pixels_of_another_shape_are_refused(tokenizer, shape):
    with pytest.raises(ValueError, match=r"pixels have shape .* and must be \(batch, 3, 16, 16\)"):
        tokenizer.encode(torch.zeros(shape))


def test_codes_of_another_grid_or_book_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"codes have shape \(1, 16\) and must be \(batch, 4, 4\)"):
        tokenizer.decode(torch.zeros(1, 16, dtype=torch.long))
    for low, high in ((-1, 3), (0, 12)):
        codes = torch.full((1, 4, 4), low)
        codes[0, 0, 0] = high
        with pytest.raises(ValueError, match=rf"codes lie in {low}\.\.{high} and must lie in 0\.\.11"):
            tokenizer.decode(codes)


def test_gradients_reach_every_parameter():
    for quantizer in ("vq", "gumbel"):
        tokenizer = tiny_tokenizer(quantizer=quantizer).train()
        output = tokenizer(torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)), 1.0)
        (output.parameters.square().sum() + output.loss).backward()
        missing = [n for n, p in tokenizer.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert not missing, (quantizer, missing)


def test_convolutions_are_channels_last(tokenizer):
    weights = [m.weight for m in tokenizer.modules() if isinstance(m, torch.nn.Conv2d)]
    assert weights and all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)


def test_compiling_in_place_keeps_the_names_of_the_weights(tokenizer):
    names = list(tokenizer.state_dict())
    fingerprint = tokenizer.fingerprint
    tokenizer.compile_networks()
    assert list(tokenizer.state_dict()) == names and tokenizer.fingerprint == fingerprint


def test_the_fingerprint_changes_with_every_tensor_and_with_the_configuration(tokenizer):
    fingerprint = tokenizer.fingerprint
    assert len(fingerprint) == 16 and int(fingerprint, 16) >= 0
    assert copy.deepcopy(tokenizer).fingerprint == fingerprint
    for name in tokenizer.state_dict():
        other = copy.deepcopy(tokenizer)
        tensor = other.state_dict()[name]
        tensor.copy_(~tensor if tensor.dtype == torch.bool else tensor + 1)
        assert other.fingerprint != fingerprint, name
    scaled = ImageTokenizer(TokenizerConfig(**{**tokenizer.own_config.__dict__, "likelihood_scale": 0.2}))
    scaled.load_state_dict(tokenizer.state_dict())
    assert scaled.fingerprint != fingerprint


def test_the_fingerprint_does_not_depend_on_memory_format(tokenizer):
    before = tokenizer.fingerprint
    assert tokenizer.to(memory_format=torch.contiguous_format).fingerprint == before
