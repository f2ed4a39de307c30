"""Who can use the page: tokens, keyboards, screen readers, phones; what it shows of a bundle."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.helpers.page import choose, draw, options, ready

expect = pytest.importorskip("playwright.sync_api").expect
pytestmark = pytest.mark.slow


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


@pytest.mark.parametrize("token", ["se\u200bcret", "\u201csecret\u201d", "se cret"])
def test_a_token_that_no_header_can_carry_is_refused_and_asked_for_again(open_page, raster, token):
    page = open_page(raster.url)
    for _ in range(2):
        page.locator("#token").fill(token)
        page.keyboard.press("Enter")
        expect(page.locator("#alert")).to_contain_text("no letters beyond ASCII")
        page.reload()
        expect(page.locator("#token-form")).to_be_visible()
    page.locator("#token").fill("secret")
    page.keyboard.press("Enter")
    expect(page.locator("#form")).to_be_visible()


def test_the_page_works_where_the_browser_stores_nothing(open_page, raster):
    page = open_page("about:blank")
    page.add_init_script(
        """for (const name of ["sessionStorage", "indexedDB"]) {
            Object.defineProperty(window, name, {
                get() { throw new DOMException("no storage", "SecurityError"); },
            });
        }"""
    )
    page.goto(raster.url)
    page.locator("#token").fill("secret")
    page.keyboard.press("Enter")
    draw(page)
    expect(page.locator("#alert")).to_be_empty()


def test_what_a_bundle_cannot_do_is_not_shown(page, open_page, raster):
    names = ["#guidance_scale", "#steps", "#styles"]
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


def test_a_bundle_without_guidance_chooses_the_best_by_consensus(open_page, raster):
    plain = open_page(raster.url)
    plain.locator("#token").fill("secret")
    plain.keyboard.press("Enter")
    expect(plain.locator("#form")).to_be_visible()
    options(plain)
    expect(plain.locator("#judge")).to_have_value("consensus")
    expect(plain.locator("#judge option[value=likelihood]")).to_be_disabled()
    draw(plain, best_of=2)
    expect(plain.locator("#alert")).to_be_empty()


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
