"""Whose fault an error is: refusals are 400 and not logged; the unforeseen is logged and 500."""

from __future__ import annotations

import base64
import logging
import re

import pytest

import pipeline.serving.own_routes
from pipeline.inference.pipeline import TextToImagePipeline
from stage2_prior import Engine
from tests.helpers.serving import events_of, png_of

URL = "/v1/images/generations"
HEART = {"prompt": "a red heart", "seed": 7}


@pytest.fixture(scope="module")
def content(pipe):
    return base64.b64encode(png_of(pipe("a red heart", seed=2).images[0])).decode()


def broken(*arguments, **options):
    raise ValueError("operands of the inside")


FAILURES = {
    "a step": (Engine, "step", URL, {}),
    "steps of several codes": (Engine, "step", URL, {"steps": 4}),
    "decoding": (TextToImagePipeline, "decode", URL, {}),
    "scoring": (pipeline.serving.own_routes, "score_each_code", "/v1/score", {"codes": [0] * 16}),
    "captioning": (TextToImagePipeline, "caption", "/v1/captions", {"image": None}),
    "encoding": (TextToImagePipeline, "codes_of", "/v1/tokens", {"image": None}),
}


@pytest.mark.parametrize(("where", "name", "url", "body"), FAILURES.values(), ids=FAILURES)
def test_an_unforeseen_error_is_logged_with_its_request_and_tells_nothing(
    client, content, monkeypatch, caplog, where, name, url, body
):
    fields = {} if url in ("/v1/captions", "/v1/tokens") else HEART
    if url == "/v1/score":
        fields = {"prompt": "a red heart"}
    body = fields | body | ({"image": content} if "image" in body else {})
    before = failures_counted(client, url)
    with monkeypatch.context() as patched:
        patched.setattr(where, name, broken)
        response = client.post(url, json=body, headers={"x-request-id": "mine-1"})
    error = response.json()["error"]
    assert response.status_code == 500 and response.headers["x-request-id"] == "mine-1"
    assert error["type"] == "server_error" and "inside" not in response.text
    (line,) = [one for one in caplog.records if one.getMessage() == "mine-1 failed"]
    assert line.levelno == logging.ERROR and line.exc_info is not None
    assert "ValueError: operands of the inside" in caplog.text
    assert client.post(url, json=body).status_code == 200  # the server stays
    assert failures_counted(client, url) == before + 1


def failures_counted(client, url):
    counted = rf'minidalle_requests_total\{{method="POST",path="{url}",status="500"\}} (\S+)'
    found = re.search(counted, client.get("/metrics").text)
    return float(found[1]) if found else 0


def test_an_unforeseen_error_of_a_stream_is_one_event(client, monkeypatch, caplog):
    headers = {"x-request-id": "mine-2"}
    with monkeypatch.context() as patched:
        patched.setattr(TextToImagePipeline, "decode", broken)
        response = client.post(URL, json=HEART | {"stream": True}, headers=headers)
    ((name, error),) = events_of(response.text)
    assert name == "error" and error["error"]["code"] == "internal_error"
    assert "inside" not in response.text
    assert [one.getMessage() for one in caplog.records if one.exc_info] == ["mine-2 failed"]


REFUSALS = [
    (URL, HEART | {"steps": 99}, "steps is 99"),
    (URL, HEART | {"steps": 99, "stream": True}, "steps is 99"),
    (URL, HEART | {"prompt": "a red heart " * 20}, "tokens and there are"),
    ("/v1/score", {"prompt": "a red heart " * 20, "codes": [0] * 16}, "tokens and there are"),
    ("/v1/captions", {"image": None, "candidates": ["a red heart " * 20]}, "tokens and there are"),
]


@pytest.mark.parametrize(("url", "body", "words"), REFUSALS)
def test_a_refusal_of_the_library_has_its_message_and_is_not_logged(
    client, content, caplog, url, body, words
):
    body = body | ({"image": content} if "image" in body else {})
    response = client.post(url, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "invalid_value"), error
    assert words in error["message"]
    named = [name for name in ("steps", "candidates", "prompt") if name in body]
    assert error["param"] == (named[0] if named else None)
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]
