"""What the page draws is what the pipeline draws; files, history, edits, codes."""

from __future__ import annotations

import base64
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers.page import (
    CELL,
    SIZE,
    choose,
    draw,
    flat,
    offline,
    options,
    pixels,
    ready,
    served,
    shown_codes,
)
from tests.helpers.pipelines import tiny_pipeline

expect = pytest.importorskip("playwright.sync_api").expect
pytestmark = pytest.mark.slow


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


def test_a_stream_that_ends_early_is_an_error(page):
    def ended(route: Any) -> None:
        route.fulfill(status=200, content_type="text/event-stream", body="")

    page.route("**/v1/images/generations", ended)
    options(page, n=2)
    page.locator("#draw").click()
    expect(page.get_by_role("alert").first).to_contain_text("the server does not answer")
    expect(page.locator(".tile")).to_have_count(0)


def test_more_images_than_the_server_allows_are_not_laid_out(page, any_order):
    page.route("**/v1/images/generations", lambda route: None)  # never answers
    options(page, n=200_000)
    page.locator("#draw").click()
    expect(page.locator(".tile")).to_have_count(16)
    page.locator("#cancel").click()


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


def test_what_best_of_chose_by_is_read_back(page, open_page, any_order, tmp_path):
    options(page)
    page.locator("#judge").select_option("consensus")
    draw(page, "a blue star", 1, seed=5, best_of=3)
    with page.expect_download() as download:
        page.locator(".tile a").click()
    file = tmp_path / "image.png"
    download.value.save_as(file)
    other = open_page(any_order.url)
    expect(other.locator("#form")).to_be_visible()
    chosen(other, file)
    expect(other.locator("#best_of")).to_have_value("3")
    expect(other.locator("#judge")).to_have_value("consensus")


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


def test_settings_that_need_many_images_ask_for_fewer_at_a_time(page, open_page, any_order):
    """The server samples 16 images per request: four at a time of the best of five are too many."""
    options(page)
    draw(page, "a blue star", 1, seed=5, best_of=5)
    page.locator(".open").click()
    page.locator("#reuse").click()
    page.locator("#n").fill("4")
    page.locator(".open").click()
    page.locator("#reuse").click()
    expect(page.locator("#n")).to_have_value("3")


def test_the_history_is_not_cleared_while_images_are_drawn(page, any_order):
    any_order.gate.close_after(2)
    page.locator("#draw").click()
    expect(page.locator("#clear")).to_be_disabled()
    any_order.gate.open()
    ready(page, 4)
    expect(page.locator("#clear")).to_be_enabled()


def test_a_history_that_cannot_be_cleared_is_an_error(page):
    draw(page)
    page.evaluate(
        "() => { IDBObjectStore.prototype.clear = () => { throw new DOMException('no'); }; }"
    )
    page.on("dialog", lambda dialog: dialog.accept())
    page.locator("#clear").click()
    expect(page.locator("#alert")).to_contain_text("the browser did not remove the images")
    expect(page.locator(".open")).to_have_count(1)


def test_scores_of_another_image_are_gone_while_those_of_this_one_are_asked_for(page):
    draw(page, "a blue star", 2)
    page.locator(".open").first.click()
    page.locator("[data-mode=tokens]").click()
    expect(page.locator("#scores")).not_to_be_empty()
    page.locator("#viewer-close").click()
    refusal = '{"error": {"message": "too busy"}}'
    page.route(
        "**/v1/score",
        lambda route: route.fulfill(status=429, body=refusal, content_type="application/json"),
    )
    page.locator(".open").last.click()
    page.locator("[data-mode=tokens]").click()
    expect(page.locator("#viewer-alert")).to_contain_text("too busy")
    for name in ("#scores", "#legend-low", "#legend-high", "#code-readout"):
        expect(page.locator(name)).to_be_empty()


def test_a_file_that_is_dropped_on_an_open_image_changes_nothing(page, tmp_path):
    draw(page)
    page.locator(".open").click()
    file = tmp_path / "plain.png"
    file.write_bytes(b"no image")
    dropped(page, file)
    page.locator("#viewer-close").click()
    expect(page.locator("#status")).to_have_text("1 of 1 image is ready.")  # not "Reading ..."
    dropped(page, file)
    expect(page.locator("#alert")).to_contain_text("image.png is no image that the browser can")


def test_a_file_that_is_no_image_is_refused(page, tmp_path):
    file = tmp_path / "plain.png"
    file.write_bytes(b"no image")
    chosen(page, file)
    expect(page.locator("#alert")).to_contain_text("plain.png is no image that the browser can")


def test_an_image_of_the_user_is_shown_with_its_codes_and_can_be_edited(page, any_order, tmp_path):
    """Its middle in the bundle's size."""
    wide = np.zeros((SIZE, 2 * SIZE, 3), np.uint8)
    wide[:, SIZE // 2 : SIZE] = (200, 30, 30)
    wide[:, SIZE : SIZE + SIZE // 2] = (30, 30, 200)
    Image.fromarray(wide).save(tmp_path / "mine.png")
    page.locator("#prompt").fill("a red heart")
    chosen(page, tmp_path / "mine.png")
    ready(page, 1)
    middle = wide[:, SIZE // 2 : -SIZE // 2]
    assert np.array_equal(pixels(page), middle)
    expect(page.locator(".run h3")).to_have_text("from a file: mine.png")
    expected = any_order.pipe.codes_of([Image.fromarray(middle)]).flatten()
    assert shown_codes(page, 1) == flat(expected, 1)
    choose(page, "edit")
    page.locator("#stage-mask").focus()
    page.keyboard.press("Space")
    page.locator("#edit-go").click()
    ready(page, 4, runs=2)
    assert np.array_equal(pixels(page)[CELL:], middle[CELL:])


@pytest.mark.parametrize("when", ["at once", "at the commit"])
def test_a_browser_without_room_still_shows_all_images_and_says_so(page, when):
    page.evaluate(
        """(atOnce) => {
            const plain = IDBObjectStore.prototype.add;
            IDBObjectStore.prototype.add = function (value) {
                if (atOnce) throw new DOMException("no room", "QuotaExceededError");
                const asked = plain.call(this, value);
                asked.addEventListener("success", () => this.transaction.abort());
                return asked;
            };
        }""",
        when == "at once",
    )
    draw(page, "a red heart", 2)
    expect(page.locator("#alert")).to_contain_text("no room for more images")


def test_images_of_another_bundle_stay_in_the_history_and_are_not_shown(page):
    draw(page)
    page.evaluate(
        """() => new Promise((resolve) => {
            const opening = indexedDB.open("minidalle", 1);
            opening.onsuccess = () => {
                const store = opening.result.transaction("images", "readwrite");
                const images = store.objectStore("images");
                const all = images.getAll();
                all.onsuccess = () => images.put({ ...all.result[0], bundle: "other" });
                store.oncomplete = () => resolve();
            };
        })"""
    )
    page.reload()
    expect(page.locator("#empty")).to_be_visible()
    kept = page.evaluate(
        """() => new Promise((resolve) => {
            indexedDB.open("minidalle", 1).onsuccess = ({ target }) => {
                const images = target.result.transaction("images").objectStore("images");
                images.count().onsuccess = (event) => resolve(event.target.result);
            };
        })"""
    )
    assert kept == 1


def test_an_edit_takes_as_many_steps_as_it_needs_where_the_bundle_has_a_number(open_page):
    """The number is for whole images."""
    pipe = tiny_pipeline(any_order=True)
    pipe.defaults = replace(pipe.defaults, num_inference_steps=8)
    with served(pipe) as server:
        page = open_page(server.url)
        draw(page)
        choose(page, "edit")
        page.locator("#stage-mask").focus()
        page.keyboard.press("Space")
        expect(page.locator("#mask-readout")).to_contain_text("1 of 16 codes are resampled.")
        page.locator("#edit-go").click()
        ready(page, 1, runs=2)


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
    ready(page, 1, runs=2)
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
    ready(page, 1, runs=2)
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
    ready(page, 1, runs=2)
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
    ready(page, 2, runs=2)
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


def test_a_mask_stays_where_the_server_draws_something_else(page, any_order):
    draw(page)
    any_order.gate.close_after(3)
    page.locator("#draw").click()
    expect(page.locator(".tile.waiting")).to_have_count(1)
    choose(page, "edit", image=-1)
    page.locator("#stage-mask").click(position={"x": 30, "y": 30})
    marked = page.locator("#mask-readout").inner_text()
    assert not marked.startswith("0 of")
    page.locator("#edit-go").click()
    expect(page.locator("#viewer-alert")).to_contain_text("images are being drawn")
    page.locator("#viewer-close").click()
    any_order.gate.open()
    ready(page, 1)
    choose(page, "edit", image=-1)
    expect(page.locator("#mask-readout")).to_have_text(marked)
    page.locator("#edit-go").click()
    ready(page, 1, runs=3)


def test_a_brush_is_at_most_as_wide_as_its_slider(page):
    draw(page)
    choose(page, "edit")
    page.locator("#brush").fill("1000000")
    page.locator("#stage-mask").click(position={"x": 30, "y": 30})
    expect(page.locator("#mask-readout")).not_to_contain_text("0 of")
    expect(page.locator("#mask-readout")).not_to_contain_text("16 of 16")
