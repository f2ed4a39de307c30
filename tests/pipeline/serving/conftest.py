"""Tiny pipelines, clients of their servers, and a browser."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from pipeline.inference.known_prompts import KnownPrompts
from pipeline.inference.pipeline import TextToImagePipeline
from tests.helpers.page import ARGS, TIMEOUT, Served, served
from tests.helpers.pipelines import CAPTIONS, tiny_pipeline
from tests.helpers.serving import client_of, serving_pipeline


@pytest.fixture(scope="module")
def pipe() -> TextToImagePipeline:
    """One that can do everything. Modules that need another one have a fixture of this name."""
    pipe = serving_pipeline(any_order=True)
    pipe.prior.config.trained_image_first = True
    return pipe


@pytest.fixture(scope="module")
def client(pipe) -> Iterator[TestClient]:
    with client_of(pipe) as client:
        yield client


@pytest.fixture(scope="module")
def any_order() -> Iterator[Served]:
    """A bundle of two levels that can do everything."""
    pipe = tiny_pipeline(any_order=True, quantizer="hierarchical")
    pipe.prior.config.trained_with_caption_dropout = True
    pipe.prior.config.trained_image_first = True
    pipe.known_prompts = KnownPrompts(("noto", "blob"), tuple(CAPTIONS))
    with served(pipe) as server:
        yield server


@pytest.fixture(scope="module")
def raster() -> Iterator[Served]:
    """A bundle that can only draw, behind a token."""
    with served(tiny_pipeline(), ("secret",)) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs the browser Chromium")
    with playwright.sync_playwright() as manager:
        browser = manager.chromium.launch(executable_path=chromium, args=list(ARGS))
        playwright.expect.set_options(timeout=TIMEOUT)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser) -> Iterator[Callable[..., Any]]:
    """Opens pages in a profile of their own. None may fail, or break the page's own policy."""
    contexts = []
    problems: list[str] = []

    def on_console(message: Any) -> None:
        if "Content Security Policy" in message.text:
            problems.append(message.text)

    def opened(url: str, **options: Any) -> Any:
        context = browser.new_context(**options)
        context.set_default_timeout(TIMEOUT)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", on_console)
        page.goto(url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not problems


@pytest.fixture
def page(open_page, any_order) -> Iterator[Any]:
    page = open_page(any_order.url)
    page.locator("#form").wait_for()
    yield page
    any_order.gate.open()  # where a test failed before it did
