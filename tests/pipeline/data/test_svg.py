"""Rendering SVG: pixels, and what is refused before it is rendered."""

from __future__ import annotations

import time

import numpy as np
import pytest

from pipeline.data.builtin.svg import MAX_SHAPES, UnusableSvg, check_svg, render

HEAD = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    'viewBox="0 0 8 8" width="8" height="8">'
)


def svg(body: str) -> str:
    return f"{HEAD}{body}</svg>"


def test_colours_and_transparency_are_kept():
    image = render(svg('<rect width="4" height="8" fill="#ff8000" fill-opacity="0.5"/>'), 16)
    assert image.shape == (16, 16, 4) and image.dtype == np.uint8
    assert image[8, 2].tolist()[3] == 128
    assert np.abs(image[8, 2, :3].astype(int) - (255, 128, 0)).max() <= 1
    assert image[8, 12].tolist()[3] == 0


@pytest.mark.parametrize(("width", "height"), [(4, 8), (8, 4)])
def test_a_drawing_that_is_no_square_is_centred(width, height):
    drawing = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}"><rect width="{width}" height="{height}"/></svg>'
    )
    alpha = render(drawing, 16)[..., 3]
    wide, high = 2 * width, 2 * height
    expected = np.zeros((16, 16), np.uint8)
    expected[(16 - high) // 2 : (16 + high) // 2, (16 - wide) // 2 : (16 + wide) // 2] = 255
    assert np.array_equal(alpha, expected)


@pytest.mark.parametrize(
    "size",
    [
        'viewBox="0 0 1000 1"',
        'width="1" height="100000" viewBox="0 0 1 1"',
        'width="1000%" height="1%" viewBox="0 0 9 9"',
        'width="90in" height="1mm"',
        'width="-4" height="8"',
    ],
)
def test_a_drawing_with_one_very_long_side_is_refused_before_it_is_rendered(size, monkeypatch):
    monkeypatch.setattr("pipeline.data.builtin.svg._drawn", None)
    with pytest.raises(UnusableSvg, match="one side may have at most 20 times the other"):
        render(f'<svg xmlns="http://www.w3.org/2000/svg" {size}/>', 16)


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ("", "it has no size; add a viewBox, or width and height"),
        ('width="8"', "it has no size"),
        ('width="100%" height="100%"', "it has no size"),
        ('viewBox="0 0 1 1 5"', "is not four numbers"),
        ('viewBox="0 0 1 1,"', "is not four numbers"),
    ],
)
def test_a_drawing_without_a_size_is_refused(size, reason):
    """The renderer would take that of what is drawn, which may be as large as memory."""
    body = '<rect width="1000" height="1"/>'
    with pytest.raises(UnusableSvg, match=reason):
        render(f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{body}</svg>', 16)


@pytest.mark.parametrize(
    "size", ['width="wide" height="1"', 'viewBox="0 0 a 1"', 'width="1" height="--1"']
)
def test_a_size_that_is_no_length_is_named(size):
    with pytest.raises(UnusableSvg, match="is no length"):
        render(f'<svg xmlns="http://www.w3.org/2000/svg" {size}/>', 16)


@pytest.mark.parametrize(
    ("size", "width", "height"),
    [
        ('width="2in" height="96" viewBox="0 0 8 8"', 16, 8),
        ('width="100%" height="50%" viewBox="0,0,8,8"', 16, 8),
        ('viewBox="0 0 4 8"', 8, 16),
        ('width="3pc" height="1in" viewBox="0 0 8 8" preserveAspectRatio="none"', 8, 16),
    ],
)
def test_sizes_in_units_and_percents_are_read_as_the_renderer_does(size, width, height):
    rect = '<rect x="-99" y="-99" width="999" height="999"/>'
    alpha = render(f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{rect}</svg>', 16)[..., 3]
    rows, columns = (alpha.max(1) > 0).sum(), (alpha.max(0) > 0).sum()
    assert (columns, rows) == (width, height)


def test_references_within_a_drawing_are_followed():
    image = render(
        svg(
            '<defs><linearGradient id="a"><stop stop-color="#0000ff"/></linearGradient>'
            '<rect id="b" width="8" height="8" fill="url(#a)"/></defs><use xlink:href="#b"/>'
        ),
        8,
    )
    assert image[4, 4].tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ('<image href="/etc/hostname"/>', "<image>"),
        ('<image href="data:image/png;base64,AA"/>', "<image>"),
        ('<use href="file:///etc/passwd#a"/>', "refers to 'file:///etc/passwd#a'"),
        ('<use xlink:href="http://127.0.0.1/a.svg#a"/>', "refers to 'http"),
        ("<script>alert(1)</script>", "<script>"),
        ('<rect onload="alert(1)"/>', "attribute onload would run a script"),
        ('<rect fill="url(http://127.0.0.1/a)"/>', "attribute fill loads an address"),
        ("<rect style=\"fill: url( 'a.svg#b')\"/>", "attribute style loads an address"),
        ("<style>@import 'a.css';</style>", "style loads an address"),
        ("<style>rect { fill: url(file:///a) }</style>", "style loads an address"),
        ("<foreignObject><p/></foreignObject>", "<foreignObject>"),
        ("<text>a</text>", "<text>, which is not rendered; convert it to paths"),
        ('<filter id="f"><feTurbulence numOctaves="100000000"/></filter>', "<feTurbulence>"),
        ('<pattern id="p" width="100000" height="100000"/>', "<pattern>"),
        ('<marker id="m"/>', "<marker>"),
        (f"<style>{'g,' * 6000}g {{}}</style>", "style sheets of more than 10,000 letters"),
    ],
)
def test_what_loads_or_runs_is_refused(body, reason):
    with pytest.raises(UnusableSvg) as caught:
        render(svg(body), 8)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no XML"),
        ("<svg", "no XML"),
        ("<html/>", "begins with <html>"),
        ('<!DOCTYPE svg [<!ENTITY a "b">]><svg/>', "document type"),
        ("<svg>" + "a" * 2**20 + "</svg>", "characters"),
        (svg("<g>" * 101 + "</g>" * 101), "nested more than 100 deep"),
        (svg('<g id="a"><use href="#a"/></g>'), "nested more than 100 deep"),
        ('<svg xmlns="http://www.w3.org/2000/svg" width="0" height="0"/>', "one side may"),
        (svg(""), "it has nothing that can be seen"),
        (svg('<rect width="8" height="8" fill="none"/>'), "it has nothing that can be seen"),
    ],
)
def test_what_is_no_usable_drawing_is_refused(text, reason):
    with pytest.raises(UnusableSvg, match=reason):
        render(text, 8)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("named", "uses"),
    [
        ('id="a%d"', '<use href="#a%d"/>'),
        ('id="a%d"', '<use href="#a%d "/>'),  # which resvg trims
        ('xml:id="a%d"', '<use href="#a%d"/>'),
        ('id="a%d"', '<rect mask="url(#a%d )" width="1" height="1"/>'),
    ],
)
def test_references_add_to_the_depth_of_what_they_name(order, named, uses):
    """Four groups of 90, each of which uses the one before; resvg would overflow its stack."""
    groups = [f'<g {named % 0}><rect width="1" height="1"/></g>']
    for level in range(3):
        inside = "<g>" * 90 + uses % level + "</g>" * 90
        groups.append(f"<g {named % (level + 1)}>{inside}</g>")
    with pytest.raises(UnusableSvg, match="nested more than 100 deep"):
        check_svg(svg("".join(groups[::order])))


def test_of_two_elements_of_one_name_both_count():
    """The renderer draws the first."""
    deep = '<g id="a"><rect width="1" height="1"/>' + "<g>" * 60 + "</g>" * 60 + "</g>"
    empty = '<g id="a"/>'
    for pair in (deep + empty, empty + deep):
        with pytest.raises(UnusableSvg, match="nested more than 100 deep"):
            check_svg(svg(pair + "<g>" * 60 + '<use href="#a"/>' + "</g>" * 60))


def test_gradients_of_a_style_sheet_are_drawn():
    gradient = '<linearGradient id="g"><stop stop-color="#00f"/></linearGradient>'
    sheet = '<style>@charset "utf-8"; path.b,.a { fill: url(#g) } .c{fill:red}</style>'
    image = render(svg(f'{sheet}{gradient}<rect class="a" width="8" height="8"/>'), 8)
    assert image[4, 4].tolist() == [0, 0, 255, 255]


def test_all_style_sheets_of_a_drawing_have_one_limit():
    sheet = "<style>" + ".a{fill:red}" * 500 + "</style>"
    check_svg(svg(sheet))
    with pytest.raises(UnusableSvg, match="style sheets of more than 10,000 letters"):
        check_svg(svg(sheet * 2))


def test_attributes_that_only_begin_as_events_do_are_kept():
    check_svg(svg('<g only_selected="false" one-="1"/>'))  # as Inkscape writes
    with pytest.raises(UnusableSvg, match="its attribute onload would run a script"):
        check_svg(svg('<g onload="x()"/>'))


def test_a_drawing_that_the_renderer_makes_too_large_is_refused():
    """It takes no view box whose numbers have units."""
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10px 10px">'
    with pytest.raises(UnusableSvg, match=r"it was drawn at .* pixels; add a viewBox"):
        render(f'{head}<rect width="600" height="1"/></svg>', 64)


def test_a_fault_of_resvg_is_a_drawing_that_cannot_be_rendered():
    broken = svg('<path d="M0 0h5v5z" stroke="red" stroke-width="1e30"/>')
    with pytest.raises(UnusableSvg, match="cannot be rendered by resvg"):
        render(broken, 8)


def test_a_drawing_that_unfolds_without_bound_is_refused_at_once():
    """Ten references to ten references ...: 10^12 shapes."""
    body = '<rect id="g0" width="1" height="1"/>'
    for level in range(12):
        uses = f'<use href="#g{level}"/>' * 10
        body += f'<g id="g{level + 1}">{uses}</g>'
    start = time.process_time()
    with pytest.raises(UnusableSvg, match=f"more than {MAX_SHAPES:,} shapes"):
        check_svg(svg(body))
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    "size",
    [
        'viewBox="0 0 240 100" width="24"',
        'viewBox="0 0 240 100" height="24"',
        'viewBox="0 0 240 100" width="auto" height="24"',
        'viewBox="0 0 240 100" width="" height=""',
    ],
)
def test_a_side_that_is_not_given_follows_from_the_view_box(size):
    space = 'xmlns="http://www.w3.org/2000/svg"'
    drawn = render(f'<svg {space} {size}><rect width="240" height="100"/></svg>', 48)
    assert drawn[..., 3].any(0).sum() == 48 and drawn[..., 3].any(1).sum() == 20
