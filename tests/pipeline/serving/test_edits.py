"""Edits, extensions and variations: those of an offline call; masks, and what is refused."""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pipeline.serving.sampler import Job
from pipeline.serving.schemas import EditFields
from stage1_tokenizer.pixels import image_array
from tests.helpers.serving import client_of, image_of, png_of, serving_pipeline

EDITS = "/v1/images/edits"
VARIATIONS = "/v1/images/variations"
FIELDS = {"prompt": "a red heart", "seed": "3", "n": "2"}


@pytest.fixture(scope="module")
def pipe():
    return serving_pipeline(any_order=True)


@pytest.fixture(scope="module")
def image(pipe):
    return pipe("a blue star", seed=1).images[0]


def black(size=(16, 16)):
    return Image.new("L", size, 0)


def left_half():
    mask = black()
    mask.paste(255, (0, 0, 8, 16))
    return mask


def transparent_half(image):
    mask = image.convert("RGBA")
    mask.paste((0, 0, 0, 0), (0, 0, 8, 16))
    return mask


def post(client, url, image, mask=None, **fields):
    files = {"image": png_of(image)} | ({} if mask is None else {"mask": png_of(mask)})
    return client.post(url, data=FIELDS | fields, files=files)


def codes_of(response):
    assert response.status_code == 200, response.text
    return [data["codes"] for data in response.json()["data"]]


@pytest.mark.parametrize("kind", ["white", "transparent"])
def test_an_edit_is_that_of_an_offline_call(client, pipe, image, kind):
    mask = left_half() if kind == "white" else transparent_half(image)
    response = post(client, EDITS, image, mask)
    expected = pipe.edit(image, left_half(), "a red heart", num_images=2, seed=3)
    assert codes_of(response) == expected.codes.flatten(1).tolist()
    edited = image_array(image_of(response.json()["data"][0]))
    assert np.array_equal(edited[:, 8:], image_array(image)[:, 8:])
    assert not np.array_equal(edited[:, :8], image_array(image)[:, :8])


def test_an_extension_is_that_of_an_offline_call(client, pipe, image):
    small = image.crop((0, 0, 8, 8))
    response = post(client, EDITS, small, outpaint_at="4,8")
    expected = pipe.outpaint(small, "a red heart", at=(4, 8), num_images=2, seed=3)
    assert codes_of(response) == expected.codes.flatten(1).tolist()


def test_only_the_codes_that_are_sampled_are_counted(client, pipe, image):
    known = pipe.plan_edit(image, left_half(), "a red heart", num_images=2, seed=3).known
    sampled = post(client, EDITS, image, left_half()).json()["usage"]["output_tokens"]
    assert 0 < sampled == 2 * int((~known).sum()) < 32
    varied = post(client, VARIATIONS, image, strength="0.25").json()["usage"]["output_tokens"]
    assert varied == 2 * 4


def test_a_variation_is_that_of_an_offline_call(client, pipe, image):
    response = post(client, VARIATIONS, image, strength="0.3")
    expected = pipe.vary(image, 0.3, "a red heart", num_images=2, seed=3)
    assert codes_of(response) == expected.codes.flatten(1).tolist()


def test_a_list_of_one_image_is_an_image_and_longer_ones_are_refused(client, pipe, image):
    """OpenAI's client sends a list as the field `image[]`."""
    mask = ("mask", png_of(left_half()))
    one = ("image[]", png_of(image))
    expected = codes_of(post(client, EDITS, image, left_half()))
    assert codes_of(client.post(EDITS, data=FIELDS, files=[one, mask])) == expected
    for files, count in (([one, one, mask], 2), ([mask], 0)):
        refused = client.post(EDITS, data=FIELDS, files=files)
        error = refused.json()["error"]
        assert (refused.status_code, error["param"]) == (400, "image")
        assert f"there are {count} images; give one" in error["message"]


def test_previews_of_an_edit_divide_the_codes_that_are_sampled(pipe, image, monkeypatch):
    """As the sampler reports them: a client may be too slow to see all."""
    reported = []
    plain = Job.report

    def report(job, update):
        reported.append(update)
        plain(job, update)

    monkeypatch.setattr(Job, "report", report)
    with client_of(pipe) as client:
        service = client.app.state.service

        async def run():
            mask = black()
            mask.paste(255, (0, 0, 8, 8))
            fields = EditFields(prompt="a red heart", seed=3, stream=True, partial_images=2)
            work = await service.edit(fields, png_of(image), png_of(mask))
            job = service.start(work)
            async for _ in service.images(work, job, service.deadline()):
                pass
            return work

        work = asyncio.run(run())
    known = work.plan.num_known(16)
    sampled = 16 - known
    assert 4 <= sampled < 16
    seen = [int(one.known.sum()) - known for one in reported[:-1]]
    third = math.ceil(sampled / 3)
    assert seen == [count for count in (third, 2 * third) if count < sampled]


def test_steps_of_several_codes_are_those_of_an_offline_call(client, pipe):
    body = {"prompt": "a red heart", "seed": 3, "n": 2, "steps": 4}
    response = client.post("/v1/images/generations", json=body)
    expected = pipe("a red heart", num_images_per_prompt=2, seed=3, num_inference_steps=4)
    assert codes_of(response) == expected.codes.flatten(1).tolist()


@pytest.mark.parametrize(
    ("mask", "fields", "param", "words"),
    [
        (black((8, 8)), {}, "mask", "the mask is 8x8 and the image 16x16"),
        (black(), {}, "mask", "the mask is empty"),
        (None, {}, "mask", "one of mask and outpaint_at"),
        (left_half(), {"outpaint_at": "0,0"}, "mask", "one of mask and outpaint_at"),
        (None, {"outpaint_at": "0,0"}, "image", "fills the canvas"),
        (None, {"outpaint_at": "north"}, "outpaint_at", "pattern"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(client, image, mask, fields, param, words):
    response = post(client, EDITS, image, mask, **fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert words in error["message"]


def test_images_that_do_not_fit_are_refused(client, image):
    large = post(client, EDITS, image.resize((32, 32)), left_half().resize((32, 32)))
    assert large.status_code == 400
    assert "the image is 32x32 and this prior draws 16x16" in large.json()["error"]["message"]
    assert large.json()["error"]["param"] == "image"
    files = {"image": b"no image", "mask": png_of(left_half())}
    broken = client.post(EDITS, data=FIELDS, files=files)
    assert broken.status_code == 400 and broken.json()["error"]["param"] == "image"
    assert broken.json()["error"]["code"] == "invalid_image"


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(client):
    many = Image.new("1", (2**13, 2**11 + 1))
    error = post(client, EDITS, many, left_half())
    assert error.status_code == 400 and error.json()["error"]["param"] == "image"
    assert "pixels" in error.json()["error"]["message"]


def test_a_prior_in_raster_order_says_so(image):
    with client_of(serving_pipeline()) as client:
        response = post(client, EDITS, image, left_half())
    assert response.status_code == 400
    assert "raster order" in response.json()["error"]["message"]


def test_a_png_says_what_was_changed(client, pipe, image):
    def settings(response):
        return json.loads(image_of(response.json()["data"][0]).text["minidalle"])

    varied = settings(post(client, VARIATIONS, image, strength="0.25"))
    assert varied["strength"] == 0.25 and varied["seed"] == 3
    small = image.resize((8, 8))
    extended = settings(post(client, EDITS, small, outpaint_at="4,4"))
    assert extended["outpaint_at"] == "4,4" and "strength" not in extended


def test_a_png_of_an_edit_has_the_steps_that_were_asked_for_and_no_others(image):
    """The bundle's own number is for whole images, and fewer are taken for a part."""
    pipe = serving_pipeline(any_order=True)
    pipe.defaults = replace(pipe.defaults, num_inference_steps=8)
    with client_of(pipe) as client:
        for fields, steps in (({}, None), ({"steps": "2"}, 2)):
            (first, _) = post(client, VARIATIONS, image, strength="0.25", **fields).json()["data"]
            settings = json.loads(image_of(first).text["minidalle"])
            assert settings.get("num_inference_steps") == steps
