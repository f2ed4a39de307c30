"""The page in a browser: what it draws is what the pipeline draws; edits, errors, history, tokens;
its looks and its use by keyboard."""

from __future__ import annotations

import base64
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import uvicorn
from PIL import Image

from pipeline.inference.known_prompts import KnownPrompts
from pipeline.inference.pipeline import TextToImagePipeline
from pipeline.serving.app import create_app
from pipeline.serving.images import ImageService
from pipeline.serving.metrics import Metrics
from pipeline.serving.sampler import Sampler
from pipeline.serving.settings import ServerSettings
from tests.helpers.pipelines import CAPTIONS, tiny_pipeline

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs the browser Chromium"),
]
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
expect = playwright.expect
SIZE = 16
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
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_config=None, access_log=False, ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}", pipe, gate)
    gate.open()
    server.should_exit = True
    thread.join()


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
    with playwright.sync_playwright() as manager:
        browser = manager.chromium.launch(executable_path=CHROMIUM, args=list(ARGS))
        expect.set_options(timeout=TIMEOUT)
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
def page(open_page, any_order) -> Any:
    page = open_page(any_order.url)
    expect(page.locator("#form")).to_be_visible()
    return page


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


def ready(page: Any, count: int, run: int = 0) -> None:
    """Waits until all images of a run are there; 0 is the newest one."""
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


# Drawing


def test_images_have_the_codes_of_the_offline_pipeline(page, any_order):
    draw(page, count=2, seed=7, temperature=0.8)
    expected = offline(any_order, num_images_per_prompt=2, seed=7, temperature=0.8)
    for image in (0, 1):
        assert np.array_equal(pixels(page, image=image), np.asarray(expected.images[image]))
        for level in (0, 1):
            shown = shown_codes(page, level, image)
            assert shown == flat(expected.codes[image], level), (image, level)
    likelihoods = page.locator(".nats").all_text_contents()
    assert likelihoods == [f"{float(value):.1f} nats" for value in expected.log_likelihood]
    expect(page.locator(".run-facts")).to_have_text("seed 7")


def test_images_say_their_prompt_to_screen_readers(page):
    draw(page, "a blue star", 2)
    alts = page.locator(".open img").evaluate_all("all => all.map((image) => image.alt)")
    assert alts == ["a blue star"] * 2
    expect(page.locator("#status")).to_have_text("2 of 2 images are ready.")
    expect(page.locator("#status")).to_have_attribute("role", "status")


def test_a_style_is_appended_to_the_prompt(page):
    page.locator("input[name=style][value=noto]").check(force=True)
    draw(page)
    expect(page.locator(".run h3")).to_have_text("a red heart, noto style")


def test_a_preview_is_shown_before_its_image_is_complete(page, any_order):
    any_order.gate.close_after(6)
    options(page, n=1)
    page.locator("#prompt").fill("a red star")
    page.locator("#draw").click()
    expect(page.locator("img.preview")).to_be_visible()
    expect(page.locator(".open")).to_have_count(0)
    any_order.gate.open()
    ready(page, 1)
    expect(page.locator("img.preview")).to_have_count(0)


def test_cancel_ends_a_request_and_leaves_no_image(page, any_order):
    any_order.gate.close_after(3)
    options(page, n=2)
    page.locator("#prompt").fill("a red star")
    page.locator("#draw").click()
    expect(page.locator(".tile.waiting")).to_have_count(2)
    page.locator("#cancel").click()
    expect(page.locator("#status")).to_have_text("Cancelled. 0 of 2 images are ready.")
    expect(page.locator(".tile")).to_have_count(0)
    any_order.gate.open()
    draw(page)
    expect(page.locator(".tile")).to_have_count(1)


def test_an_error_is_shown_in_the_servers_words_and_goes_with_the_next_try(page):
    options(page, n=99)
    page.locator("#draw").click()
    alert = page.get_by_role("alert").first
    expect(alert).to_have_text("n * best_of is 99; this server samples at most 16 per request")
    expect(page.locator(".run")).to_have_count(0)
    draw(page)
    expect(alert).to_be_empty()


def test_warnings_about_the_prompt_are_shown(page):
    draw(page, "a red hart")
    expect(page.locator(".warnings li")).to_contain_text("the nearest names: 'a red heart'")


# Files and history


def test_settings_are_read_back_from_a_downloaded_file(page, open_page, any_order, tmp_path):
    page.locator("input[name=style][value=blob]").check(force=True)
    draw(page, "a blue star", 2, seed=5, temperature=0.75, guidance_scale=2.5, top_k=7)
    with page.expect_download() as download:
        page.locator(".tile a").nth(1).click()
    assert download.value.suggested_filename == "a-blue-star-blob-style-5-2.png"
    file = tmp_path / "image.png"
    download.value.save_as(file)
    expected = {
        "prompt": "a blue star",
        "seed": "5",
        "temperature": "0.75",
        "guidance_scale": "2.5",
        "top_k": "7",
        "top_p": "",
        "n": "4",
    }
    for give in (chosen, dropped):
        other = open_page(any_order.url)
        expect(other.locator("#form")).to_be_visible()
        give(other, file)
        expect(other.locator("#prompt")).to_have_value("a blue star")
        found = {name: other.locator(f"#{name}").input_value() for name in expected}
        assert found == expected
        expect(other.locator("input[name=style][value=blob]")).to_be_checked()
        expect(other.locator("#random")).not_to_be_checked()
    other.locator("#n").fill("2")
    other.locator("#draw").click()
    ready(other, 2)
    assert np.array_equal(pixels(other, image=1), np.asarray(Image.open(file).convert("RGB")))


def chosen(page: Any, file: Path) -> None:
    page.locator("#file").set_input_files(file)


def dropped(page: Any, file: Path) -> None:
    content = base64.b64encode(file.read_bytes()).decode()
    transfer = page.evaluate_handle(
        """(content) => {
            const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "image.png", { type: "image/png" }));
            return transfer;
        }""",
        content,
    )
    page.dispatch_event("body", "drop", {"dataTransfer": transfer})


def test_a_file_without_settings_is_refused(page, tmp_path):
    file = tmp_path / "plain.png"
    Image.new("RGB", (4, 4)).save(file)
    chosen(page, file)
    expect(page.locator("#alert")).to_contain_text("plain.png holds no settings")


def test_images_are_there_after_a_reload_until_the_history_is_cleared(page):
    draw(page, "a red heart", 2, seed=1)
    draw(page, "a blue star")
    before = [pixels(page, run=1, image=image) for image in (0, 1)]
    page.reload()
    ready(page, 2, run=1)
    expect(page.locator(".run h3")).to_have_text(["a blue star", "a red heart"])
    for image in (0, 1):
        assert np.array_equal(pixels(page, run=1, image=image), before[image])
    page.on("dialog", lambda dialog: dialog.accept())
    page.locator("#clear").click()
    expect(page.locator("#empty")).to_be_visible()
    page.reload()
    expect(page.locator("#empty")).to_be_visible()
    expect(page.locator(".run")).to_have_count(0)


# What an image can become


def test_an_edit_keeps_every_pixel_outside_the_painted_mask(page):
    draw(page, seed=2)
    before = pixels(page)
    choose(page, "edit")
    canvas = page.locator("#stage-mask")
    box = canvas.bounding_box()
    scale = box["width"] / SIZE
    page.locator("#brush").fill("4")
    page.mouse.move(box["x"] + 4 * scale, box["y"] + 4 * scale)
    page.mouse.down()
    page.mouse.move(box["x"] + 6 * scale, box["y"] + 6 * scale, steps=3)
    page.mouse.up()
    expect(page.locator("#mask-readout")).to_have_text("4 of 16 codes are resampled.")
    page.locator("#edit-prompt").fill("a blue star")
    page.locator("#edit-go").click()
    ready(page, 1)
    expect(page.locator(".run h3").first).to_have_text("edit: a blue star")
    changed = (pixels(page) != before).any(axis=2)
    rows, columns = np.nonzero(changed)
    assert changed.any() and min(rows.min(), columns.min()) >= 2
    assert max(rows.max(), columns.max()) <= 8


def test_a_mask_of_the_keyboard_gives_the_edit_of_the_offline_pipeline(page, any_order):
    draw(page, seed=3)
    image = Image.fromarray(pixels(page))
    choose(page, "edit")
    canvas = page.locator("#stage-mask")
    canvas.focus()
    for key in ("ArrowRight", "Space", "ArrowDown", "Space", "ArrowDown", "Space", "Space"):
        page.keyboard.press(key)
    readout = page.locator("#mask-readout")
    expect(readout).to_have_text("Row 3, column 2: kept. 2 of 16 codes are resampled.")
    page.locator("#edit-go").click()
    ready(page, 1)
    mask = Image.new("L", (SIZE, SIZE), 0)
    mask.paste(255, (CELL, 0, 2 * CELL, 2 * CELL))
    expected = any_order.pipe.edit(image, mask, "a red heart", seed=3)
    assert np.array_equal(pixels(page), np.asarray(expected.images[0]))
    assert shown_codes(page, 1) == flat(expected.codes[0], 1)


def test_masks_can_be_erased_undone_and_cleared_and_an_empty_one_is_refused(page):
    draw(page)
    choose(page, "edit")
    canvas = page.locator("#stage-mask")
    readout = page.locator("#mask-readout")
    page.locator("#brush").fill("2")
    spot = {
        "x": canvas.bounding_box()["width"] * 0.375,
        "y": canvas.bounding_box()["height"] * 0.375,
    }
    canvas.click(position=spot)
    expect(readout).to_have_text("1 of 16 codes are resampled.")
    page.locator("input[name=tool][value=erase]").check(force=True)
    canvas.click(position=spot)
    expect(readout).to_have_text("0 of 16 codes are resampled.")
    page.locator("#mask-undo").click()
    expect(readout).to_have_text("1 of 16 codes are resampled.")
    page.locator("#mask-clear").click()
    expect(readout).to_have_text("0 of 16 codes are resampled.")
    page.locator("#edit-go").click()
    expect(page.locator("#viewer-alert")).to_contain_text("nothing is marked")


def test_an_extension_keeps_the_image_at_half_its_size(page):
    draw(page, seed=4)
    before = pixels(page).astype(float)
    choose(page, "extend")
    page.get_by_label("bottom right").check(force=True)
    page.locator("#extend-go").click()
    ready(page, 1)
    half = before.reshape(SIZE // 2, 2, SIZE // 2, 2, 3).mean(axis=(1, 3))
    after = pixels(page).astype(float)
    assert np.abs(after[SIZE // 2 :, SIZE // 2 :] - half).mean() < 12
    assert np.abs(after[: SIZE // 2, : SIZE // 2] - half).mean() > 24


def test_variations_are_those_of_the_offline_pipeline(page, any_order):
    draw(page, count=2, seed=6)
    image = Image.fromarray(pixels(page, image=1))
    page.locator(".open").nth(1).click()
    page.locator("#strength").fill("0.25")
    page.locator("#vary").click()
    ready(page, 2)
    expected = any_order.pipe.vary(image, 0.25, "a red heart", num_images=2, seed=6)
    for i in (0, 1):
        assert np.array_equal(pixels(page, image=i), np.asarray(expected.images[i]))


def test_captions_are_listed(page):
    draw(page)
    page.locator(".open").click()
    page.locator("#caption").click()
    expect(page.locator("#captions li")).to_have_count(3)


def test_codes_show_their_number_and_surprise_at_each_level(page):
    draw(page, seed=8)
    choose(page, "tokens")
    expect(page.locator(".code")).to_have_count(16)
    page.locator("#level").select_option("0")
    expect(page.locator(".code")).to_have_count(4)
    page.locator(".code").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    text = page.locator(".code").nth(3).get_attribute("title")
    assert text.startswith("row 2, column 2: code ")
    expect(page.locator("#code-readout")).to_have_text(text)
    nats = [float(one.get_attribute("title").split()[-2]) for one in page.locator(".code").all()]
    colours = page.locator(".code").evaluate_all("all => all.map((one) => one.style.cssText)")
    assert len(set(colours)) == len(set(nats)) > 1


def test_settings_of_an_image_fill_the_form(page):
    draw(page, "a red star", 1, seed=9, temperature=0.5)
    options(page, seed=1, temperature=1)
    page.locator("#prompt").fill("")
    page.locator(".open").click()
    page.locator("#reuse").click()
    expect(page.locator("#prompt")).to_have_value("a red star")
    expect(page.locator("#seed")).to_have_value("9")
    expect(page.locator("#temperature")).to_have_value("0.5")


# Tokens, and what a bundle cannot do


def test_a_token_is_asked_for_and_kept_in_the_tab(open_page, raster):
    page = open_page(raster.url)
    expect(page.locator("#token-form")).to_be_visible()
    expect(page.locator("#form")).to_be_hidden()
    expect(page.locator("#alert")).to_contain_text("this server needs a token")
    page.locator("#token").fill("secret")
    page.keyboard.press("Enter")
    expect(page.locator("#token-form")).to_be_hidden()
    expect(page.locator("#alert")).to_be_empty()
    draw(page)
    page.reload()
    expect(page.locator("#form")).to_be_visible()
    expect(page.locator("#token-form")).to_be_hidden()
    assert page.evaluate("localStorage.length") == 0


def test_what_a_bundle_cannot_do_is_not_shown(page, open_page, raster):
    names = ["#guidance_scale", "#steps", "#best_of", "#styles"]
    inside = ["#caption", "#vary", "[data-mode=edit]", "[data-mode=extend]"]
    options(page)
    draw(page)
    page.locator(".open").click()
    for name in names + inside:
        expect(page.locator(name)).to_be_visible()
    plain = open_page(raster.url)
    plain.locator("#token").fill("secret")
    plain.keyboard.press("Enter")
    draw(plain)
    plain.locator(".open").click()
    for name in names + inside:
        expect(plain.locator(name)).to_be_hidden()


# Looks, keyboard, names


def test_nothing_is_asked_of_another_host(open_page, any_order):
    page = open_page("about:blank")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(any_order.url)
    draw(page)
    choose(page, "tokens")
    page.goto(f"{any_order.url}/docs")
    expect(page.locator(".endpoint").first).to_be_visible()
    hosts = {urlsplit(url).netloc for url in asked if not url.startswith(("data:", "blob:"))}
    assert hosts == {urlsplit(any_order.url).netloc}
    assert any("/v1/images/generations" in url for url in asked)


def test_a_phone_needs_no_horizontal_scrolling(open_page, any_order):
    page = open_page(any_order.url, viewport={"width": 375, "height": 812})
    draw(page, count=3)
    width = "node => [node.scrollWidth, node.clientWidth]"

    def fits(selector: str) -> None:
        there, room = page.locator(selector).evaluate(width)
        assert there <= room <= 375, selector

    fits("html")
    page.locator(".open").first.click()
    for mode in ("view", "tokens", "edit", "extend"):
        page.locator(f"[data-mode={mode}]").click()
        fits("#viewer")
    page.goto(f"{any_order.url}/docs")
    expect(page.locator(".endpoint").first).to_be_visible()
    fits("html")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_light_and_dark(open_page, any_order, scheme):
    page = open_page(any_order.url, color_scheme=scheme)
    expect(page.locator("#form")).to_be_visible()
    colour = page.locator("body").evaluate("node => getComputedStyle(node).backgroundColor")
    assert (luminance(colour) < 0.05) == (scheme == "dark")
    pairs = [
        ("--ink", "--paper"),
        ("--muted", "--paper"),
        ("--muted", "--surface"),
        ("--muted", "--sunken"),
        ("--accent", "--surface"),
        ("--on-accent", "--accent"),
        ("--on-accent", "--accent-strong"),
        ("--bad", "--bad-tint"),
    ]
    for front, back in pairs:
        values = sorted(luminance(variable(page, name)) for name in (front, back))
        assert (values[1] + 0.05) / (values[0] + 0.05) >= 4.5, (front, back)


def variable(page: Any, name: str) -> str:
    return page.evaluate(
        """(name) => {
            const node = document.createElement("p");
            node.style.color = `var(${name})`;
            document.body.append(node);
            const { color } = getComputedStyle(node);
            node.remove();
            return color;
        }""",
        name,
    )


def luminance(colour: str) -> float:
    """Relative luminance of a CSS colour (WCAG 2.2)."""
    values = [float(value) / 255 for value in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_images_are_drawn_and_opened_by_keyboard_alone(page):
    def tab_to(selector: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            focused = page.locator(":focus")
            width = focused.evaluate(
                """(node) => {
                    const shown = node.matches(".chips input") ? node.nextElementSibling : node;
                    return parseFloat(getComputedStyle(shown).outlineWidth);
                }"""
            )
            assert width >= 2, focused.evaluate("node => node.outerHTML")
            if focused.evaluate("(node, selector) => node.matches(selector)", selector):
                return
        pytest.fail(f"no Tab leads to {selector}")

    tab_to("#prompt")
    page.keyboard.type("a red star")
    page.keyboard.press("Enter")
    ready(page, 4)
    tab_to(".open")
    page.keyboard.press("Enter")
    expect(page.locator("#viewer")).to_be_visible()
    tab_to("[data-mode=tokens]")
    page.keyboard.press("Enter")
    expect(page.locator(".code").first).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#viewer")).to_be_hidden()
    expect(page.locator(".open").first).to_be_focused()


def test_every_control_has_a_name(page):
    options(page)
    draw(page, count=2)
    nameless(page)
    page.locator(".open").first.click()
    for mode in ("view", "tokens", "edit", "extend"):
        page.locator(f"[data-mode={mode}]").click()
        nameless(page)
    # A token field, and whatever else is hidden now.
    unlabelled = page.locator("input, select, textarea").evaluate_all(
        """all => all.filter((one) => !one.labels.length && !one.getAttribute("aria-label"))
                     .map((one) => one.outerHTML)"""
    )
    assert not unlabelled


def nameless(page: Any) -> None:
    """Fails where the browser's tree of accessibility has a control without a name."""
    roles = {
        "button", "link", "textbox", "spinbutton", "slider", "checkbox", "radio", "combobox",
        "application", "gridcell", "image", "dialog", "DisclosureTriangle", "listbox",
    }  # fmt: skip
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    session.detach()
    found = [
        node for node in nodes if not node["ignored"] and node.get("role", {}).get("value") in roles
    ]
    assert len(found) > 5
    assert not [node for node in found if not node.get("name", {}).get("value", "").strip()]


def test_motion_is_off_where_it_is_not_wanted(open_page, any_order):
    any_order.gate.close_after(3)
    page = open_page(any_order.url, reduced_motion="reduce")
    options(page, n=1)
    page.locator("#prompt").fill("a red star")
    page.locator("#draw").click()
    tile = page.locator(".tile.waiting .checker")
    expect(tile).to_be_visible()
    name = "node => getComputedStyle(node).animationName"
    assert tile.evaluate(name) == "none"
    page.emulate_media(reduced_motion="no-preference")
    assert tile.evaluate(name) == "breathe"
    any_order.gate.open()
    ready(page, 1)


# The API's page


def test_the_docs_name_every_endpoint_and_field(open_page, any_order):
    page = open_page(f"{any_order.url}/docs")
    expect(page.locator(".endpoint").first).to_be_visible()
    api = page.evaluate("async () => (await fetch('/openapi.json')).json()")
    headings = page.locator(".endpoint h3 code").all_text_contents()
    assert headings == list(api["paths"])
    text = page.locator(".endpoint").first.inner_text()
    for name in api["components"]["schemas"]["GenerationRequest"]["properties"]:
        assert name in text
    assert "the same seed gives the same images" in text
    expect(page.locator("#curl")).to_contain_text(f"curl {any_order.url}/v1/images/generations")
