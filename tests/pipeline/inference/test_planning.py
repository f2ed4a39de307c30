"""Plans of edits, extensions and variations: they sample what the calls return."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from stage1_tokenizer.pixels import image_array
from tests.helpers.pipelines import tiny_pipeline


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(any_order=True)


@pytest.fixture(scope="module")
def image(pipe):
    return pipe("a blue star", seed=1).images[0]


@pytest.fixture
def mask():
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (0, 0, 8, 16))
    return mask


def assert_samples(pipe, plan, output):
    samples = plan.sample(pipe.prior)
    assert torch.equal(samples.codes, output.codes.flatten(1))
    assert torch.equal(samples.log_likelihood, output.log_likelihood)
    assert plan.seeds == output.seeds


def test_a_plan_of_an_edit_samples_the_edit(pipe, image, mask):
    options = {"num_images": 2, "seed": 3, "temperature": 0.7}
    plan = pipe.plan_edit(image, mask, "a red heart", **options)
    output = pipe.edit(image, mask, "a red heart", **options)
    assert_samples(pipe, plan, output)
    drawn = pipe.decode(plan.sample(pipe.prior), plan.seeds).images
    for found, expected in zip(plan.composite(drawn), output.images, strict=True):
        assert np.array_equal(image_array(found), image_array(expected))


def test_a_plan_of_an_extension_samples_the_extension(pipe, image):
    small = image.crop((0, 0, 8, 8))
    plan = pipe.plan_outpaint(small, "a red heart", at=(4, 8), num_images=2, seed=3)
    assert_samples(pipe, plan, pipe.outpaint(small, "a red heart", at=(4, 8), num_images=2, seed=3))
    placed = image_array(plan.original)[8:, 4:12]
    assert np.array_equal(placed, image_array(small))
    assert not plan.replaced[8:, 4:12].any() and plan.replaced.sum() == 16 * 16 - 8 * 8


def test_a_plan_of_a_variation_samples_the_variation(pipe, image):
    plan = pipe.plan_variation(image, 0.25, "a red heart", num_images=3, seed=3)
    assert_samples(pipe, plan, pipe.vary(image, 0.25, "a red heart", num_images=3, seed=3))
    assert (~plan.known).sum(1).tolist() == [4, 4, 4]


def test_an_empty_mask_leaves_nothing_to_sample(pipe, image):
    plan = pipe.plan_edit(image, Image.new("L", (16, 16), 0), "a red heart")
    assert plan.known.all()
    for call in (plan.check, plan.sample):
        with pytest.raises(ValueError, match="all 16 codes are known"):
            call(pipe.prior)


def test_a_plan_is_checked_without_sampling(pipe):
    pipe.plan(["x"], num_inference_steps=4).check(pipe.prior)
    raster = tiny_pipeline()
    for change, words in (
        ({"num_inference_steps": 4}, "several codes per step"),
        ({"guidance_scale": 2.0}, "caption dropout"),
    ):
        with pytest.raises(ValueError, match=words):
            raster.plan(["x"], **change).check(raster.prior)
    with pytest.raises(ValueError, match="at most the 16 codes"):
        pipe.plan(["x"], num_inference_steps=17).check(pipe.prior)


def test_plans_refuse_what_the_calls_refuse(pipe, image, mask):
    with pytest.raises(ValueError, match="the mask is 8x8 and the image 16x16"):
        pipe.plan_edit(image, mask.resize((8, 8)), "x")
    with pytest.raises(ValueError, match="fills the canvas"):
        pipe.plan_outpaint(image, "x")
    with pytest.raises(ValueError, match="num_images is 0"):
        pipe.plan_variation(image, 0.5, "x", num_images=0)


def test_a_plan_of_one_prompt_is_that_of_a_list_and_bad_input_is_refused(pipe):
    assert pipe.plan("a blue star", seed=2).seeds == pipe.plan(["a blue star"], seed=2).seeds
    with pytest.raises(ValueError, match="no prompt was given"):
        pipe.plan([])
    with pytest.raises(ValueError, match="num_images is 0"):
        pipe.plan(["a blue star"], num_images=0)
