"""`POST /v1/images/generations`: the codes of an offline call, formats, previews, refusals."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import re

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.serving.images import Complete, Partial
from pipeline.serving.sampler import Preview
from pipeline.serving.schemas import GenerationRequest
from stage1_tokenizer.pixels import image_array
from tests.helpers.pipelines import tiny_icons_pipeline
from tests.helpers.serving import (
    HeldStep,
    client_of,
    events_of,
    image_of,
    png_of,
    serving_pipeline,
    tiny_app,
    wait_until,
)

URL = "/v1/images/generations"
EDITS = "/v1/images/edits"
HEART = {"prompt": "a red heart", "seed": 7}


@pytest.fixture(scope="module")
def pipe():
    return serving_pipeline()


def codes_of(response):
    assert response.status_code == 200, response.text
    return [data["codes"] for data in response.json()["data"]]


def offline(pipe, prompt="a red heart", **options):
    return pipe(prompt, **options).codes.flatten(1).tolist()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance_scale": 3.0, "temperature": 0.7},
        {"top_k": 3, "top_p": 0.9, "min_p": 0.05},
        {"temperature": 0.0},
    ],
)
def test_images_are_those_of_an_offline_call(client, pipe, options):
    response = client.post(URL, json=HEART | {"n": 3} | options)
    output = pipe("a red heart", num_images_per_prompt=3, seed=7, **options)
    assert codes_of(response) == output.codes.flatten(1).tolist()
    body = response.json()
    for data, image, value in zip(body["data"], output.images, output.log_likelihood, strict=True):
        difference = image_array(image_of(data)).astype(int) - image_array(image)
        assert np.abs(difference).max() <= 1
        assert data["log_likelihood"] == pytest.approx(float(value), abs=1e-3)
    assert body["size"] == "16x16" and body["seed"] == 7
    assert body["usage"]["output_tokens"] == 3 * 16


def test_best_of_returns_the_images_of_an_offline_call(client, pipe):
    response = client.post(URL, json=HEART | {"n": 2, "best_of": 4})
    expected = offline(pipe, num_images_per_prompt=2, seed=7, best_of=4)
    assert codes_of(response) == expected
    assert expected != offline(pipe, num_images_per_prompt=2, seed=7)


def test_best_of_by_consensus_returns_the_images_of_an_offline_call(client, pipe):
    response = client.post(URL, json=HEART | {"n": 2, "best_of": 4, "judge": "consensus"})
    assert codes_of(response) == offline(
        pipe, num_images_per_prompt=2, seed=7, best_of=4, judge="consensus"
    )
    assert codes_of(response) != offline(pipe, num_images_per_prompt=2, seed=7, best_of=4)


@pytest.mark.parametrize("change", [{"seed": 0}, {"seed": 0, "size": "auto"}])
def test_a_seed_of_zero_is_a_seed(client, pipe, change):
    response = client.post(URL, json=HEART | change)
    assert codes_of(response) == offline(pipe, seed=0) and response.json()["seed"] == 0


def test_without_a_seed_images_differ_and_can_be_sampled_again(client, pipe):
    first, second = (client.post(URL, json={"prompt": "a blue star"}).json() for _ in range(2))
    assert first["seed"] != second["seed"]
    assert [first["data"][0]["codes"]] == offline(pipe, "a blue star", seed=first["seed"])


@pytest.mark.parametrize("ending", ["png", "jpeg", "webp"])
def test_formats(client, ending):
    body = client.post(URL, json=HEART | {"output_format": ending}).json()
    image = image_of(body["data"][0])
    assert image.format == ending.upper() and image.size == (16, 16)
    assert body["output_format"] == ending


@pytest.mark.parametrize("ending", ["jpeg", "webp"])
def test_compression_makes_smaller_files(client, ending):
    files = {}
    for quality in (None, 100, 0):
        change = {"output_format": ending, "output_compression": quality}
        body = client.post(URL, json=HEART | change).json()
        files[quality] = base64.b64decode(body["data"][0]["b64_json"])
        assert image_of_bytes(files[quality]).format == ending.upper()
    assert len(files[0]) < min(len(files[100]), len(files[None]))


def test_fields_without_a_meaning_here_change_nothing(client):
    fields = {"quality": "high", "moderation": "low", "input_fidelity": "high", "user": "me"}
    assert codes_of(client.post(URL, json=HEART | fields)) == codes_of(client.post(URL, json=HEART))


def test_no_previews_may_be_asked_for_without_a_stream(client):
    assert client.post(URL, json=HEART | {"partial_images": 0}).status_code == 200


def test_a_png_holds_its_settings(client):
    body = client.post(URL, json=HEART | {"temperature": 0.5, "n": 2}).json()
    settings = json.loads(image_of(body["data"][1]).text["minidalle"])
    assert settings == {
        "prompt": "a red heart",
        "best_of": 1,
        "bundle": "tiny",
        "seed": 7,
        "temperature": 0.5,
        "guidance_scale": 1.0,
        "guidance_interval": [0.0, 1.0],
        "image": 1,
    }


def test_transparency_is_kept_or_laid_on_white():
    pipe = serving_pipeline(channels=4)
    with client_of(pipe) as client:
        found = {
            background: client.post(URL, json=HEART | {"background": background}).json()
            for background in ("auto", "transparent", "opaque")
        }
        both = {"background": "transparent", "output_format": "jpeg"}
        refused = client.post(URL, json=HEART | both)
    assert refused.status_code == 400
    assert "a JPEG has no transparency" in refused.json()["error"]["message"]
    modes = {name: image_of(body["data"][0]).mode for name, body in found.items()}
    assert modes == {"auto": "RGBA", "transparent": "RGBA", "opaque": "RGB"}
    said = {name: body["background"] for name, body in found.items()}
    assert said == {"auto": "transparent", "transparent": "transparent", "opaque": "opaque"}


def test_urls_give_the_image_once_it_is_there(client, pipe):
    body = client.post(URL, json=HEART | {"response_format": "url"}).json()
    url = body["data"][0]["url"]
    content = client.get(url)
    assert content.headers["content-type"] == "image/png"
    with client_of(pipe, tokens=("secret",)) as closed:  # whoever has a URL may open it
        header = {"Authorization": "Bearer secret"}
        named = closed.post(URL, json=HEART | {"response_format": "url"}, headers=header)
        assert closed.get(named.json()["data"][0]["url"]).content == content.content
    expected = client.post(URL, json=HEART).json()["data"][0]["b64_json"]
    assert content.content == base64.b64decode(expected)
    gone = client.get(url.replace("/v1/files/", "/v1/files/x"))
    assert gone.status_code == 404 and "or no longer" in gone.json()["error"]["message"]


def images_counted(client):
    return float(re.search(r"(?m)^minidalle_images_total (\S+)", client.get("/metrics").text)[1])


def test_a_stream_has_previews_and_the_image(client, pipe):
    before = images_counted(client)
    body = HEART | {"stream": True, "partial_images": 3, "n": 2}
    found = events_of(client.post(URL, json=body).text)
    names = [name for name, _ in found]
    assert names[-1] == "image_generation.completed" and names.count(names[-1]) == 2
    done = {data["image_index"]: data["codes"] for name, data in found if name == names[-1]}
    assert [done[0], done[1]] == offline(pipe, num_images_per_prompt=2, seed=7)
    assert images_counted(client) == before + 2
    for name, data in found:
        assert data["type"] == name and image_of(data).size == (16, 16)


def test_previews_are_sent_while_codes_are_sampled(pipe, monkeypatch):
    service = tiny_app(pipe).state.service
    sixth = HeldStep(monkeypatch, 6)

    async def run():
        work = await service.generation(GenerationRequest(**HEART, stream=True, preview_every=4))
        found = []
        async for one in service.images(work, service.start(work), service.deadline()):
            found.append(one)
            sixth.released.set()
        return found

    found = asyncio.run(run())
    service.close()
    assert isinstance(found[0], Partial) and isinstance(found[-1], Complete)
    assert [one.number for one in found[:-1]] == list(range(len(found) - 1))


def preview_of(pipe, num_known: int) -> np.ndarray:
    """By the service itself: a client may be too slow to see all previews."""
    service = tiny_app(pipe).state.service
    length = pipe.prior.stream.image_length
    codes = torch.arange(length) % 4
    try:
        work = asyncio.run(service.generation(GenerationRequest(**HEART)))
        update = Preview(image=0, codes=codes, known=torch.arange(length) < num_known)
        return np.asarray(image_of_bytes(service._preview(work, update)))
    finally:
        service.close()


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_preview_shows_the_codes_so_far_and_grey(pipe, rows):
    grey = (preview_of(pipe, 4 * rows) == 128).all(-1).all(axis=1)
    assert grey.tolist() == [False] * 4 * rows + [True] * (16 - 4 * rows)


def test_a_preview_with_transparency_has_the_colours_of_the_image():
    """Colours are premultiplied in the model, and straight in files."""
    pipe = tiny_icons_pipeline()
    shown = preview_of(pipe, pipe.prior.stream.image_length)
    codes = torch.arange(pipe.prior.stream.image_length) % 4
    image = pipe.tokenizer.to_images(pipe.in_layout(codes[None]))[0]
    assert np.array_equal(shown, np.asarray(image))


def image_of_bytes(content):
    return image_of({"b64_json": base64.b64encode(content)})


@pytest.mark.parametrize(
    ("change", "status", "param", "words"),
    [
        ({"prompt": None}, 400, "prompt", "string"),
        ({"size": "32x32"}, 400, "size", "draws 16x16 alone"),
        ({"n": 0}, 400, "n", "greater than or equal to 1"),
        ({"n": 17}, 400, "n", "at most 16"),
        ({"n": 4, "best_of": 5}, 400, "n", r"n \* best_of is 20"),
        ({"prompt": "x" * 1001}, 400, "prompt", "1001 characters"),
        ({"prompt": "a red heart " * 20}, 400, "prompt", "tokens"),
        ({"model": "dall-e-3"}, 404, "model", "this server has 'tiny'"),
        ({"background": "transparent"}, 400, "background", "no transparency"),
        ({"style": "vivid"}, 400, "style", "no such field; leave it out"),
        ({"quality": "best"}, 400, "quality", "'auto', 'low'"),
        ({"output_compression": 50}, 400, "output_compression", "a PNG is lossless"),
        ({"output_compression": 101}, 400, "output_compression", "less than or equal to 100"),
        ({"temperature": -1}, 400, "temperature", "greater"),
        ({"seed": -1}, 400, "seed", "greater"),
        ({"steps": 4}, 400, None, "random"),
        ({"partial_images": 2}, 400, "partial_images", "set stream to true"),
        ({"preview_every": 2}, 400, "preview_every", "set stream to true"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(client, change, status, param, words):
    response = client.post(URL, json=HEART | change)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), error
    assert set(error) == {"message", "type", "param", "code"}
    assert re.search(words, error["message"]), error


def test_no_guidance_from_a_prior_without_caption_dropout():
    pipe = serving_pipeline()
    pipe.prior.config.trained_with_caption_dropout = False
    with client_of(pipe) as client:
        for change in ({"guidance_scale": 2.0}, {"best_of": 2}):
            response = client.post(URL, json=HEART | change)
            assert response.status_code == 400
            assert "caption dropout" in response.json()["error"]["message"]


def test_a_style_that_was_not_trained_is_reported():
    from pipeline.inference.known_prompts import KnownPrompts

    pipe = serving_pipeline(captions=["a red heart, noto style"])
    pipe.known_prompts = KnownPrompts(styles=("noto",), names=("red heart",))
    with client_of(pipe) as client:
        body = client.post(URL, json={"prompt": "red heart, cubist style"}).json()
    assert len(body["warnings"]) == 1 and "'cubist' was not trained" in body["warnings"][0]


def test_weights_that_give_nan_fail_and_the_server_stays():
    pipe = serving_pipeline()
    kept = {name: value.clone() for name, value in pipe.prior.state_dict().items()}
    with client_of(pipe) as client:
        with torch.no_grad():
            for parameter in pipe.prior.parameters():
                parameter.fill_(float("nan"))
        broken = client.post(URL, json=HEART | {"n": 3})
        assert broken.status_code == 500
        assert "not finite" in broken.json()["error"]["message"]
        pipe.prior.load_state_dict(kept)
        again = client.post(URL, json={"prompt": "a blue star", "seed": 1})
        assert codes_of(again) == offline(pipe, "a blue star", seed=1)
        assert "minidalle_images_active 0.0" in client.get("/metrics").text


def random_request(draw, any_order):
    """Where the order is free, some have several codes per step, and some are edits."""
    found = {
        "prompt": draw.choice(["a red heart", "a blue star", "two green rings", "a red star"]),
        "seed": draw.randrange(1000),
        "n": draw.choice([1, 1, 2, 3]),
        "guidance_scale": draw.choice([1.0, 2.0, 3.5]),
        "temperature": draw.choice([0.0, 0.5, 1.0]),
        "top_k": draw.choice([None, 4]),
        "top_p": draw.choice([None, 0.8]),
        "min_p": draw.choice([None, 0.05]),
    }
    if any_order:
        found["steps"] = draw.choice([None, 3, 8])
    if any_order and draw.randrange(2):
        return EDITS, found
    return URL, found | {"best_of": draw.choice([1, 1, 1, 2])}


@pytest.mark.parametrize(("any_order", "count"), [(False, 200), (True, 80)])
def test_many_requests_under_load_give_the_codes_of_offline_calls(any_order, count):
    draw = random.Random(0)
    asked = [random_request(draw, any_order) for _ in range(count)]
    gone = set(draw.sample(range(count), count // 5))
    waits = [draw.random() * count / 100 for _ in asked]
    pipe = serving_pipeline(any_order=any_order)
    app = tiny_app(pipe, max_waiting=1000, timeout=600)
    image = Image.fromarray(np.arange(768, dtype=np.uint8).reshape(16, 16, 3))
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (0, 0, 8, 16))

    def sent(client, url, body):
        if url == URL:
            return client.post(url, json=body)
        fields = {name: str(value) for name, value in body.items() if value is not None}
        return client.post(url, data=fields, files={"image": png_of(image), "mask": png_of(mask)})

    def expected(url, body):
        options = {name: value for name, value in body.items() if name not in ("prompt", "n")}
        options["num_inference_steps"] = options.pop("steps", None)
        if url == URL:
            return offline(pipe, body["prompt"], num_images_per_prompt=body["n"], **options)
        edited = pipe.edit(image, mask, body["prompt"], num_images=body["n"], **options)
        return edited.codes.flatten(1).tolist()

    async def one(client, number):
        await asyncio.sleep(waits[number])
        call = asyncio.ensure_future(sent(client, *asked[number]))
        if number in gone:
            await asyncio.sleep(waits[number] / 20)
            call.cancel()
        return await call

    async def run():
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://localhost") as client,
        ):
            calls = (one(client, number) for number in range(count))
            found = await asyncio.gather(*calls, return_exceptions=True)
            sampler = app.state.service.sampler  # which may be about to cancel the last ones
            await asyncio.to_thread(wait_until, lambda: not sampler.num_pending)
            metrics = (await client.get("/metrics")).text
            return found, metrics

    found, metrics = asyncio.run(run())
    done = [i for i, response in enumerate(found) if isinstance(response, httpx.Response)]
    assert set(range(count)) - gone <= set(done) and len(done) < count
    for i in done:
        assert codes_of(found[i]) == expected(*asked[i]), asked[i]
    assert "minidalle_images_active 0.0" in metrics
    assert "minidalle_images_waiting 0.0" in metrics
