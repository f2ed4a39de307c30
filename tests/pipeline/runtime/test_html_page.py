"""Pages from templates: what is escaped, and images within the page."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from jinja2 import UndefinedError
from PIL import Image

from pipeline.runtime.html_page import data_uri, render


def test_values_are_escaped_and_macros_are_not(tmp_path):
    template = tmp_path / "page.html"
    template.write_text("{% macro bold(text) %}<b>{{ text }}</b>{% endmacro %}\n{{ bold(name) }}")
    assert render(template, name="<i>&'\"").strip() == "<b>&lt;i&gt;&amp;&#39;&#34;</b>"


def test_a_name_that_is_not_given_is_an_error(tmp_path):
    template = tmp_path / "page.html"
    template.write_text("{{ name }}")
    with pytest.raises(UndefinedError, match="'name' is undefined"):
        render(template)


@pytest.mark.parametrize(("options", "form"), [({}, "PNG"), ({"quality": 85}, "JPEG")])
def test_an_image_within_the_page_is_the_image(options, form):
    image = Image.new("RGB", (8, 4), (10, 200, 30))
    head, content = data_uri(image, **options).split(",")
    assert head == f"data:image/{form.lower()};base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as read:
        assert read.format == form and read.size == (8, 4)
        assert np.abs(np.asarray(read).astype(int) - np.asarray(image)).max() <= 3
