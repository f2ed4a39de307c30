"""`TokenizerModule`: its interface for every quantizer, factor and likelihood."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from stage1_tokenizer import (
    HierarchicalOptions,
    Level,
    TokenizerConfig,
    TokenizerModule,
    TokenizerObjective,
    to_model_range,
    to_uint8,
)
from tests.helpers.tokenizers import (
    ALL_KINDS,
    EVERY_KIND,
    EVERY_LATENT_KIND,
    EVERY_TOKENIZER,
    KINDS,
    LATENT_KINDS,
    objective_of,
    tiny_tokenizer,
)


@EVERY_KIND
@pytest.mark.parametrize(
    "likelihood", ["l2", "learned_l2", "l1", "logit_laplace", "discretized_logistic"]
)
def test_images_become_codes_and_codes_become_images(kind, likelihood, images):
    tokenizer = tiny_tokenizer(**KINDS[kind], likelihood=likelihood)
    codes = tokenizer.encode(to_model_range(images))
    assert codes.dtype == torch.int64 and 0 <= codes.min() <= codes.max() < tokenizer.num_codes
    levels = tokenizer.layout
    assert codes.shape == (
        (6, 4, 4) if len(levels) == 1 else (6, sum(level.length for level in levels))
    )
    pixels = tokenizer.decode(codes)
    assert pixels.shape == (6, 3, 16, 16) and -1 <= pixels.min() <= pixels.max() <= 1
    output = tokenizer(to_model_range(images))
    assert torch.equal(output.quantized.codes, codes)
    torch.testing.assert_close(
        tokenizer.likelihood.image(output.parameters).clamp(-1, 1), pixels, atol=1e-5, rtol=0
    )


@EVERY_KIND
def test_a_tokenizer_in_bf16_encodes_and_decodes(kind, images):
    tokenizer = tiny_tokenizer(**KINDS[kind]).to(torch.bfloat16)
    pixels = to_model_range(images)
    codes = tokenizer.encode(pixels)
    assert torch.equal(tokenizer(pixels).quantized.codes, codes)
    assert (
        tokenizer.decode(codes).isfinite().all() and tokenizer.decode(codes).dtype == torch.float32
    )


@pytest.mark.parametrize(
    ("factor", "size"), [(1, 5), (2, 14), (4, 12), (8, 24), (16, 32), (32, 64)]
)
def test_any_downsample_factor_and_size(factor, size):
    tokenizer = tiny_tokenizer(downsample_factor=factor, image_size=size)
    assert tokenizer.grid == (size // factor, size // factor)
    assert tokenizer.layout == (Level(grid=tokenizer.grid, num_codes=12),)
    codes = tokenizer.encode(torch.zeros(2, 3, size, size))
    assert codes.shape == (2, *tokenizer.grid)
    assert tokenizer.decode(codes).shape == (2, 3, size, size)


@EVERY_KIND
def test_code_vectors_are_what_the_decoder_sees(kind):
    tokenizer = tiny_tokenizer(**KINDS[kind])
    vectors, levels = tokenizer.code_vectors, tokenizer.layout
    assert (
        len(vectors) == sum(level.num_codes for level in levels)
        and vectors.ndim == 2
        and not vectors.requires_grad
    )
    if len(levels) == 1:
        codes = torch.randint(
            0, tokenizer.num_codes, (2, 4, 4), generator=torch.Generator().manual_seed(0)
        )
        torch.testing.assert_close(
            vectors[codes].permute(0, 3, 1, 2), tokenizer.quantizer.embed(codes, (4, 4))
        )


@EVERY_KIND
def test_an_image_has_the_same_codes_alone_as_in_a_batch(kind, images):
    tokenizer = tiny_tokenizer(**KINDS[kind])
    pixels = to_model_range(images)
    assert torch.equal(
        tokenizer.encode(pixels), torch.cat([tokenizer.encode(p[None]) for p in pixels])
    )


@EVERY_KIND
def test_encode_runs_in_eval_mode_and_restores_training_mode(kind, images):
    tokenizer = tiny_tokenizer(**KINDS[kind])
    expected, before = tokenizer.encode(to_model_range(images)), tokenizer.fingerprint
    tokenizer.train()
    assert torch.equal(tokenizer.encode(to_model_range(images)), expected)
    assert tokenizer.fingerprint == before and tokenizer.quantizer.training


def test_failing_encoder_restores_the_quantizer(tokenizer):
    def fail(*_):
        raise RuntimeError("out of memory")

    tokenizer.train().encoder.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        tokenizer.encode(torch.zeros(1, 3, 16, 16))
    assert tokenizer.quantizer.training


def test_pil_images_of_any_mode(tokenizer):
    images = [Image.new(mode, (16, 16)) for mode in ("RGB", "L", "1", "CMYK", "RGBA")]
    codes = tokenizer.to_codes(images)
    assert codes.shape == (5, 4, 4)
    white = tokenizer.to_codes([Image.new("RGB", (16, 16), "white")])
    assert torch.equal(codes[4:], white)  # nothing but transparency is white paper
    drawn = tokenizer.to_images(codes)
    assert [image.size for image in drawn] == [(16, 16)] * 5 and drawn[0].mode == "RGB"
    assert torch.equal(
        torch.from_numpy(np.asarray(drawn[2]).copy()), to_uint8(tokenizer.decode(codes))[2]
    )


@EVERY_KIND
@pytest.mark.parametrize(("height", "width"), [(32, 16), (16, 48)])
def test_images_of_other_sizes_round_trip(kind, height, width):
    tokenizer = tiny_tokenizer(**KINDS[kind])
    pixels = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    grid = (height // 4, width // 4)
    codes = tokenizer.encode(pixels)
    drawn = tokenizer.decode(codes, grid)
    output = tokenizer(pixels)
    assert drawn.shape == pixels.shape
    torch.testing.assert_close(
        tokenizer.likelihood.image(output.parameters).clamp(-1, 1), drawn, atol=1e-5, rtol=0
    )
    if codes.ndim == 3:
        assert codes.shape == (2, *grid) and torch.equal(tokenizer.decode(codes), drawn)


@pytest.mark.parametrize(
    ("size", "near"), [((18, 16), "16x16"), ((16, 1), "16x4"), ((30, 33), "32x32")]
)
def test_a_size_that_the_grid_does_not_divide_is_refused_with_the_nearest_that_fits(
    tokenizer, size, near
):
    with pytest.raises(
        ValueError,
        match=rf"pixels are {size[0]}x{size[1]} .* multiples of 4; the nearest that fits is {near}",
    ):
        tokenizer.to_codes([Image.new("RGB", size)])
    hierarchical = tiny_tokenizer(**KINDS["hierarchical"])  # its coarse codes cover 8 pixels
    with pytest.raises(ValueError, match="multiples of 8; the nearest that fits is 16x16"):
        hierarchical.to_codes([Image.new("RGB", (20, 16))])


@pytest.mark.parametrize("shape", [(1, 1, 16, 16), (3, 16, 16)])
def test_pixels_of_another_shape_are_refused(tokenizer, shape):
    with pytest.raises(
        ValueError, match=r"pixels have shape .* and must be \(batch, 3, height, width\)"
    ):
        tokenizer.encode(torch.zeros(shape))


def test_codes_outside_the_grid_or_codebook_are_refused(tokenizer):
    with pytest.raises(
        ValueError, match=r"codes have shape \(1, 16\) and must be \(batch, height, width\)"
    ):
        tokenizer.decode(torch.zeros(1, 16, dtype=torch.long))
    with pytest.raises(
        ValueError, match=r"codes have shape \(1, 4, 4\) and must be \(batch, 2, 2\)"
    ):
        tokenizer.decode(torch.zeros(1, 4, 4, dtype=torch.long), (2, 2))
    with pytest.raises(ValueError, match=r"codes have shape \(1, 4, 4\) and must be \(batch, 20\)"):
        tiny_tokenizer(**KINDS["hierarchical"]).decode(torch.zeros(1, 4, 4, dtype=torch.long))
    for low, high in ((-1, 3), (0, 12)):
        codes = torch.full((1, 4, 4), low)
        codes[0, 0, 0] = high
        with pytest.raises(
            ValueError, match=rf"codes lie in {low}\.\.{high} and must lie in 0\.\.11"
        ):
            tokenizer.decode(codes)
    uneven = tiny_tokenizer(
        quantizer="hierarchical", hierarchical=HierarchicalOptions(width=16, coarse_codes=(5,))
    )
    codes = torch.full((1, 20), 11)
    codes[:, :4] = 4
    assert uneven.decode(codes).shape == (1, 3, 16, 16)
    codes[0, 3] = 5
    with pytest.raises(ValueError, match=r"codes of level 1 lie in 4\.\.5 and must lie in 0\.\.4"):
        uneven.decode(codes)


@EVERY_TOKENIZER
def test_gradients_of_the_objective_reach_every_parameter(kind, images):
    tokenizer = tiny_tokenizer(**ALL_KINDS[kind]).train()
    (loss,) = TokenizerObjective(tokenizer, objective_of(kind)).losses(images, 500)
    loss.value.backward()
    missing = [
        n for n, p in tokenizer.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ]
    assert not missing
    assert all(p.grad.isfinite().all() for p in tokenizer.parameters())


@EVERY_LATENT_KIND
@pytest.mark.parametrize("likelihood", ["l2", "l1", "logit_laplace"])
def test_images_become_latents_and_latents_become_images(kind, likelihood, images):
    tokenizer = tiny_tokenizer(**LATENT_KINDS[kind], likelihood=likelihood)
    pixels = to_model_range(images)
    posterior = tokenizer.posterior(pixels)
    assert tokenizer.latent_dim == {"gaussian": 64, "gaussian vector": 10}[kind]
    assert posterior.mean.shape == posterior.log_std.shape == (6, tokenizer.latent_dim)
    drawn = tokenizer.decode_latents(posterior.mean)
    assert drawn.shape == (6, 3, 16, 16) and -1 <= drawn.min() <= drawn.max() <= 1
    output = tokenizer(pixels)
    torch.testing.assert_close(
        tokenizer.likelihood.image(output.parameters).clamp(-1, 1), drawn, atol=1e-5, rtol=0
    )
    torch.testing.assert_close(tokenizer.reconstruct(pixels), drawn, atol=1e-5, rtol=0)
    assert tokenizer.layout == () and output.quantized.codes.shape == (6, 0)
    assert tokenizer.num_codes == 0


def test_latents_of_a_grid_are_in_the_order_feature_row_column(images):
    tokenizer = tiny_tokenizer(quantizer="gaussian")
    pixels = to_model_range(images)
    features = tokenizer.encoder(pixels)
    mean = tokenizer.posterior(pixels).mean
    assert mean[1, 2 * 16 + 3 * 4 + 1] == features[1, 2, 3, 1]
    seen = tokenizer.quantizer.unflatten(mean, (4, 4))
    torch.testing.assert_close(seen, features[:, :4])


@pytest.mark.parametrize(("height", "width"), [(32, 16), (16, 48)])
def test_grid_latents_take_images_of_other_sizes(height, width):
    tokenizer = tiny_tokenizer(quantizer="gaussian")
    pixels = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    grid = (height // 4, width // 4)
    mean = tokenizer.posterior(pixels).mean
    assert mean.shape == (2, 4 * grid[0] * grid[1])
    drawn = tokenizer.decode_latents(mean, grid)
    assert drawn.shape == pixels.shape
    torch.testing.assert_close(tokenizer.reconstruct(pixels), drawn)


@EVERY_LATENT_KIND
def test_gaussian_tokenizer_in_bf16_encodes_and_decodes(kind, images):
    tokenizer = tiny_tokenizer(**LATENT_KINDS[kind]).to(torch.bfloat16)
    posterior = tokenizer.posterior(to_model_range(images))
    assert posterior.mean.dtype == torch.float32
    drawn = tokenizer.decode_latents(posterior.sample())
    assert drawn.isfinite().all() and drawn.dtype == torch.float32


def test_one_latent_vector_refuses_images_of_another_size():
    tokenizer = tiny_tokenizer(**LATENT_KINDS["gaussian vector"])
    with pytest.raises(
        ValueError,
        match=r"pixels are 32x16 \(width x height\) and this tokenizer's one latent vector is for "
        r"16x16; crop or resize to it first",
    ):
        tokenizer.reconstruct(torch.zeros(1, 3, 16, 32))
    for fails in (
        lambda: tokenizer(torch.zeros(1, 3, 16, 32)),
        lambda: tokenizer.decode_latents(torch.zeros(1, 10), (4, 8)),
    ):
        with pytest.raises(
            ValueError,
            match=r"a grid of 4x8 and the one latent vector of this tokenizer is for 4x4; give "
            r"images of the size that it was trained on, or train with .*latents=grid",
        ):
            fails()


@EVERY_LATENT_KIND
def test_codes_are_refused_where_latents_are_gaussian(kind):
    tokenizer = tiny_tokenizer(**LATENT_KINDS[kind])
    codes = torch.zeros(1, 4, 4, dtype=torch.long)
    uses = [
        ("encode", lambda: tokenizer.encode(torch.zeros(1, 3, 16, 16))),
        ("encode", lambda: tokenizer.to_codes([Image.new("RGB", (16, 16))])),
        ("decode", lambda: tokenizer.decode(codes)),
        ("decode", lambda: tokenizer.to_images(codes)),
    ]
    for name, use in uses:
        with pytest.raises(
            ValueError,
            match=rf"^this tokenizer has Gaussian latents, and {name} needs codes; train one "
            r"with tokenizer\.model\.quantizer=vq, or use its latents \(in Python: posterior and "
            r"decode_latents\)$",
        ):
            use()
    with pytest.raises(ValueError, match="this tokenizer has Gaussian latents and no codes; train"):
        tokenizer.code_vectors  # noqa: B018


def test_latents_are_refused_where_there_are_codes(tokenizer):
    uses = {
        "posterior": lambda: tokenizer.posterior(torch.zeros(1, 3, 16, 16)),
        "latent_parameters": lambda: tokenizer.decode_latents(torch.zeros(1, 64)),
    }
    for name, use in uses.items():
        with pytest.raises(
            ValueError,
            match=rf"^this tokenizer has codes \(quantizer vq\), and {name} needs Gaussian "
            r"latents; use encode and decode, or train a tokenizer with "
            r"tokenizer\.model\.quantizer=gaussian$",
        ):
            use()
    assert tokenizer.latent_dim == 0


@pytest.mark.parametrize("shape", [(2, 63), (64,), (1, 4, 4, 4)])
def test_latents_of_another_shape_are_refused(shape):
    tokenizer = tiny_tokenizer(quantizer="gaussian")
    with pytest.raises(ValueError, match=r"latents have shape .* and must be \(batch, 64\)"):
        tokenizer.decode_latents(torch.zeros(shape))


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
    scaled = TokenizerModule(
        TokenizerConfig(**{**tokenizer.own_config.__dict__, "likelihood_scale": 0.2})
    )
    scaled.load_state_dict(tokenizer.state_dict())
    assert scaled.fingerprint != fingerprint


def test_the_fingerprint_does_not_depend_on_memory_format(tokenizer):
    before = tokenizer.fingerprint
    assert tokenizer.to(memory_format=torch.contiguous_format).fingerprint == before
