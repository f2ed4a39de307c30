"""A browser on the server's page: servers whose sampling can be stopped, and what tests do on a
page."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.inference.pipeline import TextToImagePipeline
from pipeline.serving.app import create_app
from pipeline.serving.images import ImageService
from pipeline.serving.metrics import Metrics
from pipeline.serving.sampler import Sampler
from pipeline.serving.settings import ServerSettings
from tests.helpers.serving import running

ARGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
TIMEOUT = 60_000
"""Milliseconds."""
SIZE = 16
"""Of images, in pixels."""
CELL = 4
"""Of the finest codes, in pixels."""


@dataclass
class Gate:
    """Stops sampling before a step, until it is opened."""

    steps: int | None = None
    """That may still be taken; None for all."""
    _opened: threading.Event = field(default_factory=threading.Event)

    def close_after(self, steps: int) -> None:
        self._opened.clear()
        self.steps = steps

    def open(self) -> None:
        self.steps = None
        self._opened.set()

    def on_step(self, seconds: float, images: int) -> None:
        if self.steps is None:
            return
        self.steps -= 1
        if self.steps <= 0:
            self._opened.wait()


@dataclass
class Served:
    """A server in this process."""

    url: str
    pipe: TextToImagePipeline
    gate: Gate


@contextmanager
def served(pipe: TextToImagePipeline, tokens: tuple[str, ...] = ()) -> Iterator[Served]:
    gate = Gate()
    sampler = Sampler(pipe.prior, num_rows=8, on_step=gate.on_step)
    service = ImageService(pipe, sampler, ServerSettings(slots=4), "tiny")
    app = create_app(service, Metrics(), tokens=tokens)
    with running(app) as url:
        try:
            yield Served(url, pipe, gate)
        finally:
            gate.open()


def options(page: Any, **values: Any) -> None:
    """Fills fields by their ids."""
    page.locator("#more").evaluate("node => { node.open = true; }")
    if "seed" in values:
        page.locator("#random").uncheck()
    for name, value in values.items():
        page.locator(f"#{name}").fill(str(value))


def draw(page: Any, prompt: str = "a red heart", count: int = 1, **values: Any) -> None:
    options(page, n=count, **values)
    page.locator("#prompt").fill(prompt)
    page.locator("#draw").click()
    ready(page, count)


def ready(page: Any, count: int, run: int = 0, *, runs: int = 1) -> None:
    """Waits until all images of a run are there; 0 is the newest one of at least `runs`. A run
    that needs files begins some time after the click."""
    from playwright.sync_api import expect

    page.locator(".run").nth(runs - 1).wait_for()
    expect(page.locator(".run").nth(run).locator(".open")).to_have_count(count)
    expect(page.locator("#cancel")).to_be_hidden()


def choose(page: Any, mode: str, image: int = 0) -> None:
    """Opens an image of the newest run."""
    page.locator(".open").nth(image).click()
    page.locator(f"[data-mode={mode}]").click()


def shown_codes(page: Any, level: int, image: int = 0) -> list[int]:
    """The numbers in the view of codes."""
    choose(page, "tokens", image)
    page.locator(".code").first.wait_for()
    page.locator("#level").select_option(str(level))
    codes = [int(text) for text in page.locator(".code").all_text_contents()]
    page.locator("#viewer-close").click()
    return codes


def flat(codes: Any, level: int) -> list[int]:
    """Codes of one level of an offline image: 4 coarse ones, then 16."""
    return codes.flatten().tolist()[slice(4) if level == 0 else slice(4, None)]


def pixels(page: Any, run: int = 0, image: int = 0) -> np.ndarray:
    """(H,W,3) of an image in the gallery."""
    drawn = page.locator(".run").nth(run).locator(".open img").nth(image)
    url = drawn.evaluate(
        """async (image) => {
            await image.decode();
            const canvas = document.createElement("canvas");
            canvas.width = image.naturalWidth;
            canvas.height = image.naturalHeight;
            const context = canvas.getContext("2d");
            context.drawImage(image, 0, 0);
            return [...context.getImageData(0, 0, canvas.width, canvas.height).data];
        }"""
    )
    return np.array(url, dtype=np.uint8).reshape(SIZE, SIZE, 4)[..., :3]


def offline(server: Served, prompt: str = "a red heart", **sampling: Any) -> Any:
    return server.pipe(prompt, **sampling)
