"""Pipelines of images that are no squares: height and width are never swapped."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.likelihood.compression import compress, decompress
from tests.helpers.pipelines import tiny_latent_pipeline, tiny_pipeline

SIZE = (32, 16)
"""Width and height, as PIL has them."""


@pytest.fixture(scope="module")
def pipe():
    wide = tiny_pipeline(any_order=True, image_size=(16, 32), likelihood="discretized_logistic")
    wide.prior.config.trained_with_caption_dropout = True
    return wide


@pytest.fixture(scope="module")
def image() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def test_images_have_the_width_and_height_of_the_bundle(pipe):
    output = pipe("a red heart", num_images_per_prompt=2)
    assert [one.size for one in output.images] == [SIZE] * 2 and output.codes.shape == (2, 4, 8)


def test_an_edit_changes_the_masked_part_alone(pipe, image):
    mask = Image.new("L", SIZE)
    mask.paste(255, (20, 0, 32, 8))  # at the top right, in a place that a turned image has not
    edited = pipe.edit(image, mask, "a blue star").images[0]
    changed = (np.asarray(edited) != np.asarray(image)).any(2)
    assert changed[:8, 20:].any() and not changed[8:].any() and not changed[:, :20].any()


def test_a_smaller_image_is_extended_to_the_width_and_height(pipe, image):
    part = image.crop((0, 0, 8, 12))
    grown = pipe.outpaint(part, "a red star", at=(24, 4)).images[0]
    assert grown.size == SIZE and grown.crop((24, 4, 32, 16)).tobytes() == part.tobytes()
    with pytest.raises(ValueError, match="8x12 at 4, 24 does not lie on the canvas of 32x16"):
        pipe.outpaint(part, "a red star", at=(4, 24))


def test_likelihoods_and_surprise_are_of_all_pixels(pipe, image):
    found = pipe.likelihood([image], ["a red heart"])
    assert found.dimensions == 3 * 16 * 32 and torch.isfinite(found.nats).all()
    (surprise,) = pipe.surprise([image], ["a red heart"])
    assert surprise.codes[0].shape == (4, 8) and surprise.pixels.shape == (16, 32)
    assert torch.isfinite(pipe.score([image], ["a red heart"]).log_likelihood).all()


def test_an_image_on_its_side_is_refused(pipe, image):
    turned = image.transpose(Image.Transpose.ROTATE_90)
    for call in (
        lambda: pipe.edit(turned, Image.new("L", turned.size), ""),
        lambda: pipe.score([turned], [""]),
        lambda: pipe.likelihood([turned], [""]),
    ):
        with pytest.raises(ValueError, match="is 16x32 and this prior draws 32x16"):
            call()


def test_a_rectangle_comes_back_from_compression(pipe, image):
    pytest.importorskip("constriction")
    packed = compress(pipe.tokenizer, pipe.prior, pipe.text, image, "a red heart")
    unpacked = decompress(pipe.tokenizer, pipe.prior, pipe.text, packed.data)
    assert unpacked.image.tobytes() == image.tobytes()
    with pytest.raises(ValueError, match="is 16x32 and this bundle compresses images of 32x16"):
        compress(pipe.tokenizer, pipe.prior, pipe.text, image.transpose(Image.Transpose.ROTATE_90))


def test_gaussian_latents_draw_rectangles():
    pipe = tiny_latent_pipeline(image_size=(16, 32))
    assert pipe("a red heart").images[0].size == SIZE


def test_a_tokenizer_and_a_prior_of_unlike_sizes_are_refused(pipe):
    with pytest.raises(ValueError, match="give both from one bundle"):
        type(pipe)(pipe.tokenizer.at_size(16), pipe.prior, pipe.text)


def test_a_bundle_keeps_the_size(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "bundle")
    loaded = type(pipe).from_pretrained(tmp_path / "bundle")
    assert loaded.tokenizer.size == (16, 32)
    assert loaded("a red heart").images[0].tobytes() == pipe("a red heart").images[0].tobytes()
