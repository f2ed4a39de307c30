"""Ids, tokens, sizes of bodies, slow bodies and hosts."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections import deque
from contextlib import suppress

import pytest

import pipeline.serving.middleware
from pipeline.serving.store import MAX_BYTES, MAX_SECONDS, ImageStore
from tests.helpers.serving import client_of, running, serving_pipeline, tiny_app

URL = "/v1/images/generations"
HEART = {"prompt": "a red heart", "seed": 7}


@pytest.fixture(scope="module")
def client():
    with client_of(max_body_mb=0.01) as client:
        yield client


def test_a_request_has_an_id_in_its_response_and_in_the_log(client, caplog):
    caplog.set_level(logging.INFO, "pipeline.serving")
    given_id = client.get("/healthz", headers={"x-request-id": "mine-1"})
    assert given_id.headers["x-request-id"] == "mine-1"
    odd = client.post(URL, json=HEART, headers={"x-request-id": "a b\x7f"})
    assert len(odd.headers["x-request-id"]) == 32
    lines = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("mine-1 GET /healthz 200 in ") for line in lines)
    assert any(f"{odd.headers['x-request-id']} POST {URL} 200" in line for line in lines)


def test_prompts_are_not_logged_unless_asked(caplog):
    caplog.set_level(logging.INFO, "pipeline.serving")
    with client_of() as client:
        client.post(URL, json=HEART)
        assert "heart" not in caplog.text
        client.post("/v1/score", json={"prompt": "a red heart", "codes": [0] * 16})
        assert "heart" not in caplog.text
    with client_of(log_prompts=True) as client:
        client.post(URL, json=HEART, headers={"x-request-id": "mine-2"})
        scored = {"prompt": "a blue star", "codes": [0] * 16}
        client.post("/v1/score", json=scored, headers={"x-request-id": "mine-3"})
    assert "mine-2 prompt 'a red heart'" in caplog.text
    assert "mine-3 prompt 'a blue star'" in caplog.text


def test_tokens_are_needed_but_for_the_page_and_health():
    with client_of(tokens=("secret", "other")) as client:
        for path in ("/", "/docs", "/healthz", "/readyz", "/openapi.json"):
            assert client.get(path).status_code == 200
        for header in ("", "Bearer wrong", "Basic secret", "Bearer"):
            response = client.post(URL, json=HEART, headers={"Authorization": header})
            error = response.json()["error"]
            assert response.status_code == 401 and error["type"] == "authentication_error"
            assert "Bearer TOKEN" in error["message"]
        assert client.get("/metrics").status_code == 401
        for token in ("secret", "other"):
            response = client.post(URL, json=HEART, headers={"Authorization": f"Bearer {token}"})
            assert response.status_code == 200


def test_large_bodies_are_refused_with_and_without_a_length(client):
    body = json.dumps({"prompt": "x" * 20_000})
    for content in (body, iter([body[:5000].encode(), body[5000:].encode()])):
        headers = {"content-type": "application/json"}
        response = client.post(URL, content=content, headers=headers)
        assert response.status_code == 413
        assert "larger than 0.01 MB" in response.json()["error"]["message"]


def test_a_body_whose_length_is_too_large_is_refused_before_it_comes():
    with running(tiny_app(serving_pipeline(), max_body_mb=0.01)) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as sender:
            head = f"POST {URL} HTTP/1.1\r\nhost: {host}\r\ncontent-length: 20000\r\n"
            sender.sendall(f"{head}content-type: application/json\r\n\r\n".encode())
            answer = sender.recv(4096)
    assert answer.startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example:8000", "x@localhost", "localhost/x", "[::1", ""],
)
def test_other_hosts_are_refused_on_the_loopback(client, host):
    response = client.get("/healthz", headers={"host": host})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "invalid_host" and "use one of 127.0.0.1" in error["message"]


def test_the_host_of_a_proxy_is_answered_where_it_is_given():
    with client_of(public_host="Draw.example.org") as client:
        for host, status in (("draw.example.org", 200), ("localhost", 200), ("evil.example", 400)):
            assert client.get("/healthz", headers={"host": host}).status_code == status


@pytest.mark.parametrize("host", ["localhost", "LocalHost:8000", "127.0.0.1:8000", "[::1]:8000"])
def test_this_machine_s_hosts_are_answered(client, host):
    assert client.get("/healthz", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_pages_of_other_sites_can_send_nothing(client, site):
    refused = client.post(URL, json=HEART, headers={"sec-fetch-site": site})
    assert refused.status_code == 403 and refused.json()["error"]["code"] == "other_site"
    assert client.get("/", headers={"sec-fetch-site": site}).status_code == 200  # a link


@pytest.mark.parametrize("site", ["same-origin", "none"])
def test_the_page_and_the_user_can_send_requests(client, site):
    assert client.post(URL, json=HEART, headers={"sec-fetch-site": site}).status_code == 200


def test_invented_methods_are_one_label_of_the_metrics():
    with client_of() as client:
        for i in range(3):
            assert client.request(f"ODD{i}", "/healthz").status_code == 405
        text = client.get("/metrics").text
    assert 'method="other",path="/healthz",status="405"} 3.0' in text and "ODD" not in text


def test_a_path_that_no_route_has_is_in_the_log_and_in_no_metric(client, caplog):
    caplog.set_level(logging.INFO, "pipeline.serving")
    client.get("/v1/no%0Athing")
    assert "GET /v1/no\\nthing 404 in" in caplog.text
    assert 'path="other"' in client.get("/metrics").text


def test_load_balancers_may_ask_by_head(client):
    for path in ("/", "/healthz", "/readyz"):
        assert client.head(path).status_code == 200


def test_unknown_paths_and_methods(client):
    assert client.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    wrong = client.get(URL)
    assert wrong.status_code == 405 and wrong.json()["error"]["message"].startswith(f"GET {URL}")


def test_the_page_may_load_nothing_from_other_hosts(client):
    for path in ("/", "/docs", "/page/main.js"):
        headers = client.get(path).headers
        assert "default-src 'self'" in headers["content-security-policy"]
        assert headers["cache-control"] == "no-cache"
    assert "access-control-allow-origin" not in client.get("/v1/models").headers


def test_a_body_that_never_comes_ends_in_408(monkeypatch):
    monkeypatch.setattr(pipeline.serving.middleware, "_READ_SECONDS", 0.2)
    with running(tiny_app(serving_pipeline())) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as slow:
            head = f"POST {URL} HTTP/1.1\r\nhost: {host}\r\ncontent-length: 90\r\n"
            slow.sendall(f"{head}content-type: application/json\r\n\r\n{{".encode())
            answer = b"".join(iter(lambda: slow.recv(4096), b"")).decode()
    assert answer.startswith("HTTP/1.1 408") and "no part of the body came" in answer


def test_a_body_that_drips_ends_in_408(monkeypatch):
    with running(tiny_app(serving_pipeline(), timeout=0.4)) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as slow:
            head = f"POST {URL} HTTP/1.1\r\nhost: {host}\r\ncontent-length: 900\r\n"
            slow.sendall(f"{head}content-type: application/json\r\n\r\n".encode())
            slow.setblocking(False)
            answer = b""
            deadline = time.monotonic() + 20
            while not answer and time.monotonic() < deadline:
                with suppress(BrokenPipeError, ConnectionResetError):
                    slow.send(b" ")
                time.sleep(0.05)
                with suppress(BlockingIOError):
                    answer = slow.recv(4096)
    assert answer.startswith(b"HTTP/1.1 408")


PATHS = (URL, "/v1/score", "/v1/captions", "/v1/tokens")


NO_OBJECTS = (b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"{}" * 9)
NO_NUMBERS = (b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "a", "n": Infinity}')
NO_TEXT = (b'{"prompt": "\\ud800"}',)
ENDLESS = (b'{"prompt": "a", "n": %s, "best_of": %s}' % (b"9" * 4000, b"9" * 4000),)


@pytest.mark.parametrize("content", NO_OBJECTS + NO_NUMBERS + NO_TEXT + ENDLESS)
def test_malformed_bodies_are_refused(client, content):
    for path in PATHS:
        response = client.post(path, content=content, headers={"content-type": "application/json"})
        assert response.status_code == 400 and "message" in response.json()["error"]


def test_the_store_drops_the_oldest_by_size_and_by_age():
    times = deque([0.0])
    store = ImageStore(clock=lambda: times[0])
    first = store.add(b"x" * (MAX_BYTES // 2), "png")
    second = store.add(b"y" * (MAX_BYTES // 2), "png")
    assert first != second and store.get(first) is not None
    third = store.add(b"z", "webp")
    assert store.get(first) is None and store.get(second) is not None
    times[0] = MAX_SECONDS + 1
    assert store.get(second) is None and store.get(third) is None
    assert third.endswith(".webp")
