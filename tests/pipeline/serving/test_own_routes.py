"""Scores, captions, tokens, the bundle's description and health."""

from __future__ import annotations

import asyncio
import base64
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import pipeline.serving.own_routes
from pipeline.inference.pipeline import TextToImagePipeline
from tests.helpers.serving import client_of, image_of, png_of, serving_pipeline


@pytest.fixture(scope="module")
def sampled(pipe):
    return pipe("a red heart", seed=2)


@pytest.fixture(scope="module")
def content(sampled):
    return base64.b64encode(png_of(sampled.images[0])).decode()


def test_a_score_is_that_of_an_offline_call(client, pipe, sampled, content):
    body = client.post("/v1/score", json={"prompt": "a red heart", "image": content}).json()
    expected = pipe.score(sampled.images, "a red heart")
    assert body["log_likelihood"] == pytest.approx(float(expected.log_likelihood[0]), abs=1e-3)
    assert body["pmi"] == pytest.approx(float(expected.pmi[0]), abs=1e-3)
    assert sum(body["nats"]) == pytest.approx(-body["log_likelihood"], abs=1e-3)
    again = client.post("/v1/score", json={"prompt": "a red heart", "codes": body["codes"]}).json()
    assert again == body


def test_captions_are_those_of_an_offline_call(client, pipe, sampled, content):
    asked = ["a blue star", "a red heart"]
    body = client.post("/v1/captions", json={"image": content, "candidates": asked}).json()
    expected = pipe.caption(sampled.images[0], asked)
    assert [one["text"] for one in body["data"]] == [text for text, _ in expected]
    drawn = client.post("/v1/captions", json={"image": content, "n": 2, "seed": 5}).json()
    assert [one["text"] for one in drawn["data"]] == [
        text for text, _ in pipe.caption(sampled.images[0], num=2, seed=5)
    ]


def test_many_captions_are_judged_in_parts_and_returned_in_one_order(
    client, pipe, sampled, content, monkeypatch
):
    monkeypatch.setattr(pipeline.serving.own_routes, "CAPTIONS_AT_A_TIME", 2)
    candidates = ["a red heart", "a blue star", "a green ring", "a red star", "a blue heart"]
    body = {"image": content, "candidates": candidates}
    found = client.post("/v1/captions", json=body).json()["data"]
    expected = pipe.caption(sampled.images[0], candidates)
    assert [one["text"] for one in found] == [text for text, _ in expected]
    values = [value for _, value in expected]
    assert [one["log_likelihood"] for one in found] == pytest.approx(values, abs=1e-4)


async def _running_loop():
    return asyncio.get_running_loop()


def test_captions_of_a_request_that_is_given_up_end_with_their_part(pipe, content, monkeypatch):
    asked = []
    judged = TextToImagePipeline.caption
    answered = threading.Event()

    def caption(self, image, candidates, **options):
        asked.append(candidates)
        # The request's time is over.
        (loop,) = loops
        plain = loop.time
        loop.time = lambda: plain() + 601
        loop.call_soon_threadsafe(lambda: None)
        answered.wait(120)
        return judged(self, image, candidates, **options)

    monkeypatch.setattr(TextToImagePipeline, "caption", caption)
    monkeypatch.setattr(pipeline.serving.own_routes, "CAPTIONS_AT_A_TIME", 1)
    with client_of(pipe, timeout=600) as client:
        loops = [client.portal.call(_running_loop)]
        body = {"image": content, "candidates": ["a red heart", "a blue star"]}
        answer = client.post("/v1/captions", json=body)
        answered.set()
    assert answer.status_code == 504 and asked == [["a red heart"]]


def test_tokens_go_both_ways(client, pipe, sampled, content):
    body = client.post("/v1/tokens", json={"image": content}).json()
    assert body["codes"] == pipe.codes_of(sampled.images).flatten().tolist()
    assert body["grids"] == [[4, 4]]
    decoded = client.post("/v1/tokens", json={"codes": sampled.codes.flatten().tolist()}).json()
    assert image_of(decoded).tobytes() == sampled.images[0].tobytes()


@pytest.mark.parametrize(
    ("url", "body", "words"),
    [
        ("/v1/tokens", {}, "one of image and codes"),
        ("/v1/tokens", {"codes": [1, 2]}, "there are 2 codes; an image of tiny has 16"),
        ("/v1/tokens", {"codes": [99] * 16}, "codes here are 0 to 11"),
        ("/v1/tokens", {"codes": [-1] * 16}, "codes here are 0 to 11"),
        ("/v1/tokens", {"image": "???"}, "not base64"),
        ("/v1/tokens", {"image": base64.b64encode(b"no").decode()}, "cannot be read as an image"),
        ("/v1/score", {"prompt": "x" * 2000, "codes": [0] * 16}, "2000 characters"),
        ("/v1/captions", {"image": ""}, "cannot be read as an image"),
    ],
)
def test_what_cannot_be_read_is_refused(client, url, body, words):
    response = client.post(url, json=body)
    assert response.status_code == 400 and words in response.json()["error"]["message"]


def test_captions_need_a_prior_of_codes_first(content):
    with client_of(serving_pipeline()) as client:
        response = client.post("/v1/captions", json={"image": content})
    assert response.status_code == 400 and "codes first" in response.json()["error"]["message"]


def test_a_model_says_what_it_can_do(client):
    listed = client.get("/v1/models").json()
    (model,) = listed["data"]
    assert listed["object"] == "list" and model["id"] == "tiny"
    assert (model["width"], model["height"], model["grids"]) == (16, 16, [[4, 4]])
    assert (model["can_edit"], model["can_caption"], model["can_guide"]) == (True, True, True)
    assert model["defaults"]["guidance_scale"] == 1.0
    assert client.get("/v1/models/tiny").json() == model
    missing = client.get("/v1/models/other")
    assert (
        missing.status_code == 404
        and "this server has 'tiny'" in missing.json()["error"]["message"]
    )


def test_health_and_metrics(pipe):
    with client_of(pipe) as client:
        assert client.get("/healthz").json() == {"status": "ok"}
        assert "minidalle_slots 4.0" in client.get("/metrics").text
        assert client.get("/readyz").json() == {"status": "ready"}
        client.post("/v1/images/generations", json={"prompt": "a red heart", "n": 2})
        text = client.get("/metrics").text
    route = 'path="/v1/images/generations"'
    assert f'minidalle_requests_total{{method="POST",{route},status="200"}} 1.0' in text
    for name in ("minidalle_images_total 2.0", "minidalle_codes_total 32.0"):
        assert name in text
    assert "minidalle_step_seconds_count" in text and "minidalle_request_seconds_bucket" in text


def test_readyz_is_503_after_the_server_began_to_stop(pipe):
    from fastapi.testclient import TestClient

    from pipeline.serving.app import create_app
    from pipeline.serving.metrics import Metrics
    from pipeline.serving.state import ServerState
    from tests.helpers.serving import tiny_app

    service = tiny_app(pipe).state.service
    state = ServerState()
    app = create_app(service, Metrics(), state=state)
    before = TestClient(app, "http://localhost").get("/readyz")
    assert (before.status_code, before.json()) == (503, {"status": "starting"})
    with TestClient(app, "http://localhost") as client:
        state.status = "stopping"
        assert client.get("/readyz").status_code == 503


def test_the_interface_is_described(client):
    described = client.get("/openapi.json").json()
    assert {"/v1/images/generations", "/v1/images/edits", "/v1/score"} <= set(described["paths"])
    assert "best_of" in described["components"]["schemas"]["GenerationRequest"]["properties"]


def test_scores_and_captions_of_broken_weights_are_errors(client, pipe, monkeypatch):
    content = base64.b64encode(png_of(pipe("a red heart", seed=2).images[0])).decode()
    monkeypatch.setattr(
        pipeline.serving.own_routes,
        "score_each_code",
        lambda prior, ids, codes: torch.full((1, 16), float("nan")),
    )
    monkeypatch.setattr(
        TextToImagePipeline, "caption", lambda *arguments, **options: [("a", float("nan"))]
    )
    for url, body in (
        ("/v1/score", {"prompt": "a red heart", "codes": [0] * 16}),
        ("/v1/captions", {"image": content}),
    ):
        response = client.post(url, json=body)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (500, "sampling_failed"), url
        assert "the bundle is damaged" in error["message"]


def test_images_do_not_wait_for_scores(client, monkeypatch):
    held, begun = threading.Event(), threading.Event()
    plain = pipeline.serving.own_routes.score_each_code

    def slow(*arguments):
        begun.set()
        assert held.wait(60)
        return plain(*arguments)

    monkeypatch.setattr(pipeline.serving.own_routes, "score_each_code", slow)
    body = {"prompt": "a red heart", "codes": [0] * 16}
    with ThreadPoolExecutor(1) as pool:
        scored = pool.submit(client.post, "/v1/score", json=body)
        assert begun.wait(60)
        drawn = client.post("/v1/images/generations", json={"prompt": "a red heart"})
        assert drawn.status_code == 200 and not scored.done()
        held.set()
        assert scored.result().status_code == 200
