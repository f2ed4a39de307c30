"""Servers of tiny pipelines: in this process without a network, or at a port of the loopback."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image

from pipeline.inference.pipeline import TextToImagePipeline
from pipeline.serving import sampler
from pipeline.serving.app import create_app
from pipeline.serving.images import ImageService
from pipeline.serving.metrics import Metrics
from pipeline.serving.sampler import Sampler
from pipeline.serving.settings import ServerSettings
from stage2_prior import Engine, Finished
from tests.helpers.pipelines import tiny_pipeline


def serving_pipeline(**options: Any) -> TextToImagePipeline:
    """As `tiny_pipeline`, with guidance allowed."""
    pipe = tiny_pipeline(**options)
    pipe.prior.config.trained_with_caption_dropout = True
    return pipe


def tiny_app(
    pipe: TextToImagePipeline,
    *,
    num_rows: int = 8,
    tokens: tuple[str, ...] = (),
    timeout: float = 60.0,
    **settings: Any,
) -> FastAPI:
    """The application of a pipeline, under the name `tiny`."""
    given = ServerSettings(slots=num_rows // 2, timeout=timeout, **settings)
    metrics = Metrics()
    sampler = Sampler(
        pipe.prior, num_rows=num_rows, max_waiting=given.max_waiting, on_step=metrics.on_step
    )
    metrics.watch(sampler)
    return create_app(ImageService(pipe, sampler, given, "tiny"), metrics, tokens=tokens)


@contextmanager
def client_of(pipe: TextToImagePipeline | None = None, **settings: Any) -> Iterator[TestClient]:
    """A client whose calls reach the application without a network."""
    app = tiny_app(pipe or serving_pipeline(), **settings)
    with TestClient(app, "http://localhost", raise_server_exceptions=False) as client:
        yield client


@contextmanager
def running(app: FastAPI, *, send_buffer: int | None = None) -> Iterator[str]:
    """The address of a server in a thread.

    Args:
        send_buffer: bytes that the system keeps per connection for a client that does not read.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    if send_buffer is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Waits for what another thread or process does. Raises TimeoutError where it never does."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("what the test waits for has not happened")
        time.sleep(0.005)


def connected(address: str, url: str, body: Mapping[str, Any]) -> socket.socket:
    """A connection that has sent a request, and has read nothing; its buffer is small."""
    host, port = address.removeprefix("http://").split(":")
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(30)
    client.connect((host, int(port)))
    text = json.dumps(body)
    head = f"POST {url} HTTP/1.1\r\nhost: {host}\r\ncontent-length: {len(text)}\r\n"
    client.sendall(f"{head}content-type: application/json\r\n\r\n{text}".encode())
    return client


def free_port() -> int:
    """A port of the loopback that nothing listens at now."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


class StepGate:
    """Holds the steps of all servers' engines until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        is_open = self.open

        class Held(Engine):
            def step(self) -> list[Finished]:
                is_open.wait()
                return super().step()

        monkeypatch.setattr(sampler, "Engine", Held)


class HeldStep:
    """Holds one step of all engines until `released` is set; `taken` has what was active in each
    step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        self.released = threading.Event()
        self.taken: list[int] = []
        plain = Engine.step

        def step(engine: Engine) -> list[Finished]:
            self.taken.append(engine.num_active)
            if len(self.taken) == number:
                self.released.wait(120)
            return plain(engine)

        monkeypatch.setattr(Engine, "step", step)


def image_of(data: dict[str, Any]) -> Image.Image:
    """The image of an entry of a response."""
    image = Image.open(io.BytesIO(base64.b64decode(data["b64_json"])))
    image.load()
    return image


def png_of(image: Image.Image) -> bytes:
    """An image as a file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def events_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Names and bodies of a stream of server-sent events."""
    found = []
    for block in filter(None, text.split("\n\n")):
        name, data = block.split("\n")
        assert name.startswith("event: ") and data.startswith("data: ")
        found.append((name[7:], json.loads(data[6:])))
    return found
