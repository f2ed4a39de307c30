"""A queue that is full, a request that takes too long, and clients that leave."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from pipeline.inference.pipeline import TextToImagePipeline
from pipeline.serving import middleware, own_routes
from pipeline.serving.sampler import Sampler
from pipeline.serving.schemas import GenerationRequest
from tests.helpers.serving import (
    HeldStep,
    StepGate,
    client_of,
    connected,
    running,
    serving_pipeline,
    tiny_app,
    wait_until,
)

URL = "/v1/images/generations"
SCORE = "/v1/score"
HEART = {"prompt": "a red heart", "seed": 7}


@pytest.fixture(scope="module")
def pipe():
    return serving_pipeline()


def test_a_full_queue_is_429_and_says_when_to_come_again(pipe, monkeypatch):
    gate = StepGate(monkeypatch)
    with client_of(pipe, num_rows=2, max_waiting=1, max_images=2) as client:
        sampler = client.app.state.service.sampler
        first = []
        asking = threading.Thread(
            target=lambda: first.append(client.post(URL, json=HEART | {"n": 2}))
        )
        asking.start()
        wait_until(lambda: sampler.num_pending == 2)
        full = client.post(URL, json=HEART)
        gate.open.set()
        asking.join()
        again = client.post(URL, json=HEART)
    assert full.status_code == 429 and full.headers["retry-after"] == "1"
    assert full.json()["error"]["type"] == "rate_limit_error"
    assert "try again in 1 seconds" in full.json()["error"]["message"]
    assert (first[0].status_code, again.status_code) == (200, 200)


def test_images_that_take_too_long_are_504_and_cancelled(pipe, monkeypatch):
    gate = StepGate(monkeypatch)
    in_any_case = threading.Timer(20, gate.open.set)
    in_any_case.start()
    with client_of(pipe, timeout=0.1) as client:
        late = client.post(URL, json=HEART | {"n": 4})
        gate.open.set()
        in_any_case.cancel()
        sampler = client.app.state.service.sampler
        wait_until(lambda: not sampler.num_pending)
        metrics = client.get("/metrics").text
    assert late.status_code == 504 and late.json()["error"]["code"] == "timeout"
    # One step may be under way.
    assert "minidalle_step_seconds_count 1.0" in metrics or "step_seconds_count 0.0" in metrics


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_is_planned_too_slowly_is_504(pipe, monkeypatch, stream):
    held = threading.Event()
    in_any_case = threading.Timer(20, held.set)
    in_any_case.start()
    monkeypatch.setattr(TextToImagePipeline, "plan", lambda *arguments, **options: held.wait(30))
    with client_of(pipe, timeout=0.1) as client:
        late = client.post(URL, json=HEART | {"stream": stream})
        held.set()
        in_any_case.cancel()
    assert late.status_code == 504 and late.json()["error"]["code"] == "timeout"


def test_a_stream_whose_client_reads_late_ends_with_an_error(pipe, monkeypatch):
    gate = StepGate(monkeypatch)
    service = tiny_app(pipe, timeout=600).state.service

    async def run():
        loop = asyncio.get_running_loop()
        plain = loop.time
        work = await service.generation(GenerationRequest(**HEART, n=2, stream=True))
        images = service.images(work, service.start(work), service.deadline())
        gate.open.set()
        await anext(images)
        # The reader is held up beyond the deadline, and not ended.
        monkeypatch.setattr(loop, "time", lambda: plain() + 601)
        with pytest.raises(TimeoutError):
            await anext(images)

    asyncio.run(run())
    service.close()


def test_requests_that_are_being_planned_fill_the_queue(pipe, monkeypatch):
    """Else the bodies of any number of requests would be held while they wait to be planned."""
    held, planning = threading.Event(), threading.Event()
    in_any_case = threading.Timer(20, held.set)
    in_any_case.start()
    plain = TextToImagePipeline.plan

    def slow(*arguments, **options):
        planning.set()
        held.wait(30)
        return plain(*arguments, **options)

    monkeypatch.setattr(TextToImagePipeline, "plan", slow)
    with (
        client_of(pipe, num_rows=2, max_waiting=1, max_images=2) as client,
        ThreadPoolExecutor(2) as pool,
    ):
        first = [pool.submit(client.post, URL, json=HEART)]
        assert planning.wait(30)
        first.append(pool.submit(client.post, URL, json=HEART))
        sampler = client.app.state.service.sampler
        wait_until(lambda: sampler.num_pending == 2 or held.is_set())
        full = client.post(URL, json=HEART)
        held.set()
        in_any_case.cancel()
        assert [one.result().status_code for one in first] == [200, 200]
        assert sampler.num_pending == 0
    assert full.status_code == 429 and full.headers["retry-after"] == "1"


def test_a_request_that_fails_to_be_planned_gives_its_room_back(pipe):
    with client_of(pipe, num_rows=2, max_waiting=1, max_images=2) as client:
        for _ in range(4):
            refused = client.post(URL, json=HEART | {"prompt": "x " * 400})
            assert refused.status_code == 400
        assert client.app.state.service.sampler.num_pending == 0


def test_a_request_that_never_fits_is_refused_and_not_told_to_come_again(pipe):
    """As where the memory holds fewer slots than were asked for."""
    with client_of(pipe, num_rows=8, max_waiting=1, max_images=5) as client:
        client.app.state.service.sampler.num_rows = 2
        refused = client.post(URL, json=HEART | {"n": 3})
    assert refused.status_code == 400
    assert "at most 2 per request" in refused.json()["error"]["message"]


def test_an_image_is_not_read_where_there_is_no_room(pipe, monkeypatch):
    gate = StepGate(monkeypatch)
    in_any_case = threading.Timer(20, gate.open.set)
    in_any_case.start()
    with client_of(
        serving_pipeline(any_order=True), num_rows=2, max_waiting=1, max_images=2
    ) as client:
        sampler = client.app.state.service.sampler
        asking = threading.Thread(
            target=client.post, args=(URL,), kwargs={"json": HEART | {"n": 2}}
        )
        asking.start()
        wait_until(lambda: sampler.num_pending == 2)
        files = {"image": b"no image"}
        full = client.post("/v1/images/variations", files=files, data={"prompt": "a red heart"})
        gate.open.set()
        in_any_case.cancel()
        asking.join()
        refused = client.post("/v1/images/variations", files=files, data={"prompt": "a red heart"})
    assert full.status_code == 429
    assert refused.json()["error"]["code"] == "invalid_image"


def test_requests_that_sample_nothing_wait_in_a_bounded_queue_and_for_a_limited_time(
    pipe, monkeypatch
):
    free, held_now = threading.Event(), threading.Event()
    plain = own_routes.score_each_code

    def held(prior, ids, codes):
        held_now.set()
        free.wait(60)
        return plain(prior, ids, codes)

    monkeypatch.setattr(own_routes, "score_each_code", held)
    body = {"prompt": "a red heart", "codes": [0] * 16}
    with client_of(pipe, max_waiting=1, max_images=2) as client:
        first = []
        asking = threading.Thread(target=lambda: first.append(client.post(SCORE, json=body)))
        asking.start()
        assert held_now.wait(60)
        full = client.post(SCORE, json=body)
        free.set()
        asking.join()
    assert full.status_code == 429 and full.headers["retry-after"] == "1"
    assert "1 requests run or wait" in full.json()["error"]["message"]
    assert first[0].status_code == 200
    free.clear()
    with client_of(pipe, timeout=0.1) as client:
        late = client.post(SCORE, json=body)
        free.set()
    assert late.status_code == 504 and late.json()["error"]["code"] == "timeout"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(pipe, monkeypatch, stream):
    """Its images are cancelled long before they are complete."""
    fourth = HeldStep(monkeypatch, 4)
    cancel = Sampler.cancel

    def told(sampler, job):
        cancel(sampler, job)
        fourth.released.set()

    monkeypatch.setattr(Sampler, "cancel", told)
    app = tiny_app(pipe, num_rows=2)
    sampler = app.state.service.sampler
    with running(app) as address:
        with connected(address, URL, HEART | {"n": 16, "stream": stream}):
            wait_until(lambda: len(fourth.taken) == 4)
        wait_until(lambda: not sampler.num_pending)
    assert len(fourth.taken) <= 5  # of 128 that 16 images take, two at a time


def test_a_client_that_reads_nothing_of_its_stream_frees_its_place(pipe, monkeypatch, caplog):
    """It holds up nobody, and leaves no traceback."""
    monkeypatch.setattr(middleware, "WRITE_SECONDS", 0.3)
    caplog.set_level("INFO")
    gate = StepGate(monkeypatch)
    app = tiny_app(pipe, max_images=200)
    sampler = app.state.service.sampler
    with (
        running(app, send_buffer=4096) as address,
        connected(address, URL, HEART | {"n": 200, "stream": True}),
    ):
        wait_until(lambda: sampler.num_pending > 0)
        gate.open.set()
        other = httpx.post(f"{address}{URL}", json=HEART, timeout=60)
        wait_until(lambda: f"POST {URL} 499" in caplog.text)
        assert sampler.num_pending == 0
    assert other.status_code == 200
    assert f"POST {URL} 499" in caplog.text and "Traceback" not in caplog.text
