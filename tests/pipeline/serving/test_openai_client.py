"""The official client of OpenAI's API against a running server."""

from __future__ import annotations

import base64
import io

import httpx
import openai
import pytest
from PIL import Image

from pipeline.inference.pipeline import TextToImagePipeline
from tests.helpers.serving import png_of, running, serving_pipeline, tiny_app


@pytest.fixture(scope="module")
def pipe():
    return serving_pipeline(any_order=True)


@pytest.fixture(scope="module")
def client(pipe):
    with (
        running(tiny_app(pipe, tokens=("secret",))) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def image(pipe):
    return pipe("a blue star", seed=1).images[0]


def pixels_of(content):
    return Image.open(io.BytesIO(base64.b64decode(content))).tobytes()


def test_generate(client, pipe):
    found = client.images.generate(
        model="tiny",
        prompt="a red heart",
        n=2,
        size="16x16",
        output_format="webp",
        extra_body={"seed": 5, "guidance_scale": 2.0, "best_of": 2},
    )
    expected = pipe("a red heart", num_images_per_prompt=2, best_of=2, seed=5, guidance_scale=2.0)
    assert [one.codes for one in found.data] == expected.codes.flatten(1).tolist()
    assert found.output_format == "webp" and found.usage.output_tokens == 4 * 16
    assert pixels_of(found.data[0].b64_json) == expected.images[0].tobytes()


def test_fields_that_clients_of_openai_send(client, pipe):
    found = client.images.generate(
        prompt="a red heart",
        quality="standard",
        moderation="auto",
        output_format="jpeg",
        output_compression=90,
        extra_body={"seed": 5},
    )
    assert found.data[0].codes == pipe("a red heart", seed=5).codes.flatten().tolist()
    image = Image.open(io.BytesIO(base64.b64decode(found.data[0].b64_json)))
    assert image.format == "JPEG"
    with pytest.raises(openai.BadRequestError, match="style: this server has no such field"):
        client.images.generate(prompt="a red heart", style="vivid")


def test_generate_with_urls(client):
    found = client.images.generate(prompt="a red heart", response_format="url")
    headers = {"Authorization": "Bearer secret"}
    content = httpx.get(found.data[0].url, headers=headers, timeout=120).content
    assert Image.open(io.BytesIO(content)).size == (16, 16)


def test_generate_as_a_stream(client, pipe):
    stream = client.images.generate(
        prompt="a red heart", stream=True, partial_images=3, extra_body={"seed": 5}
    )
    events = list(stream)
    *previews, last = events
    assert last.type == "image_generation.completed" and last.usage.output_tokens == 16
    assert last.codes == pipe("a red heart", seed=5).codes.flatten().tolist()
    assert [one.type for one in previews] == ["image_generation.partial_image"] * len(previews)
    assert len(previews) <= 3
    numbers = [one.partial_image_index for one in previews]
    assert numbers == sorted(numbers)


def test_edit(client, pipe, image):
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (0, 0, 8, 16))
    found = client.images.edit(
        image=("image.png", png_of(image)),
        mask=("mask.png", png_of(mask)),
        prompt="a red heart",
        input_fidelity="high",
        quality="high",
        extra_body={"seed": 5},
    )
    expected = pipe.edit(image, mask, "a red heart", seed=5)
    assert found.data[0].codes == expected.codes.flatten().tolist()
    *_, last = client.images.edit(
        image=("image.png", png_of(image)),
        mask=("mask.png", png_of(mask)),
        prompt="a red heart",
        stream=True,
        extra_body={"seed": 5},
    )
    assert last.type == "image_edit.completed"
    assert last.codes == expected.codes.flatten().tolist()


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning", "ignore:an empty prompt")
def test_variation(client, pipe, image):
    found = client.images.create_variation(
        image=("image.png", png_of(image)), n=2, extra_body={"seed": 5}
    )
    expected = pipe.vary(image, 0.5, "", num_images=2, seed=5)
    assert [one.codes for one in found.data] == expected.codes.flatten(1).tolist()


def test_models(client):
    assert [one.id for one in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.models.retrieve("other")


def test_errors(client):
    with pytest.raises(openai.BadRequestError, match="draws 16x16 alone") as refused:
        client.images.generate(prompt="a red heart", size="1024x1024")
    assert refused.value.param == "size" and refused.value.code == "invalid_size"
    with pytest.raises(openai.AuthenticationError, match="needs a token"):
        client.with_options(api_key="wrong").images.generate(prompt="a red heart")


def test_an_error_within_a_stream(client, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("broken")

    monkeypatch.setattr(TextToImagePipeline, "decode", broken)
    stream = client.images.generate(prompt="a red heart", stream=True)
    with pytest.raises(openai.APIError, match="see its log"):
        list(stream)


def test_a_stream_that_is_refused_does_not_begin(client):
    with pytest.raises(openai.BadRequestError, match="steps is 99"):
        client.images.generate(prompt="a red heart", stream=True, extra_body={"steps": 99})
