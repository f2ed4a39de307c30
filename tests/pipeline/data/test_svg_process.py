"""Rendering in processes of their own: pixels, crashes, drawings that take too long."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest

from pipeline.data.builtin import svg_process
from pipeline.data.builtin.svg import UnusableSvg, check_svg, render
from pipeline.data.builtin.svg_process import Renderers, TooSlow


def svg(body: str) -> str:
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8">{body}</svg>'


SQUARE = svg('<rect width="8" height="4" fill="#0a0b0c"/>')


def nested_by_a_style_sheet() -> str:
    """Groups of 80, each drawn through the mask of the one before; resvg overflows its stack."""
    rules = "".join(f".c{i}{{mask:url(#m{i + 1})}}" for i in range(300))
    groups = "".join(
        f'<mask id="m{i}"><rect class="c{i}" width="8" height="8"/></mask>' for i in range(301)
    )
    return svg(f'<style>{rules}</style>{groups}<rect mask="url(#m0)" width="8" height="8"/>')


def masks_that_multiply() -> str:
    """Four shapes per mask, each drawn through the next of 12: 16 million."""
    body = '<mask id="m12"><rect width="8" height="8"/></mask>'
    for i in range(12):
        uses = '<rect mask="inherit" width="8" height="8"/>' * 4
        body += f'<mask id="m{i}"><g mask="url(#m{i + 1})">{uses}</g></mask>'
    return svg(f'{body}<rect mask="url(#m0)" width="8" height="8"/>')


def test_pixels_are_those_of_the_renderer():
    with Renderers(16) as renderers, ThreadPoolExecutor(3) as pool:
        found = list(pool.map(renderers.render, [SQUARE] * 9))
    for image in found:
        assert np.array_equal(image, render(SQUARE, 16)) and image.flags.writeable


def test_a_refusal_has_its_words():
    with Renderers(16) as renderers, pytest.raises(UnusableSvg, match="it begins with <html>"):
        renderers.render("<html/>")


def test_a_drawing_that_crashes_the_renderer_is_left_out_and_others_are_drawn():
    crashing = nested_by_a_style_sheet()
    check_svg(crashing)
    with Renderers(16) as renderers:
        renderers.render(SQUARE)
        with pytest.raises(UnusableSvg, match="it ended the renderer"):
            renderers.render(crashing)
        assert renderers.render(SQUARE).any()


def test_a_drawing_that_takes_too_long_is_left_out_and_others_are_drawn(monkeypatch):
    slow = masks_that_multiply()
    check_svg(slow)
    monkeypatch.setattr(svg_process, "SECONDS", 1.0)
    with Renderers(16) as renderers:
        with pytest.raises(TooSlow, match="it took more than 1 s"):
            renderers.render(slow)
        monkeypatch.undo()
        assert renderers.render(SQUARE).any()


def test_all_processes_end_with_the_context():
    own = psutil.Process()
    before = {one.pid for one in own.children()}
    with Renderers(16) as renderers:
        renderers.render(SQUARE)
        assert {one.pid for one in own.children()} - before
    assert not {one.pid for one in own.children()} - before


def test_a_process_that_was_ended_from_outside_costs_no_drawing():
    with Renderers(16) as renderers:
        for _ in range(2):
            renderers._free.put(renderers._started())
        for one in list(renderers._all):
            one.kill()
            one.wait()
        assert renderers.render(SQUARE).any()


def test_a_crash_leaves_no_process_and_no_pipe():
    with Renderers(16) as renderers:
        with pytest.raises(UnusableSvg):
            renderers.render(nested_by_a_style_sheet())
        assert renderers._all == []


def test_a_renderer_that_cannot_start_is_no_fault_of_the_drawing(tmp_path, monkeypatch):
    (tmp_path / "resvg_py.py").write_text("raise ImportError('made for another machine')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    reason = r"renderer of drawings cannot start \(made for another machine\)"
    with Renderers(16) as renderers, pytest.raises(OSError, match=reason):
        renderers.render(SQUARE)
