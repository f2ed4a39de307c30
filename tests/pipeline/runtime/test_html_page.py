"""Pages from templates: what is escaped, and images within the page."""

from __future__ import annotations

import base64
import io
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from jinja2 import UndefinedError
from PIL import Image

from pipeline.runtime.html_page import CONTENT_SECURITY_POLICY, data_uri, render

ROOT = Path(__file__).parents[3] / "pipeline"
PAGES = [ROOT / "doctor" / "html_report.html", ROOT / "evaluation" / "codebook_report.html"]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
HOSTILE = (
    "<img src=x onerror=\"document.title='RAN'\">",
    "\"><script>document.title='RAN'</script>",
    "</title><script>document.title='RAN'</script>",
    "javascript:document.title='RAN'",
    "<svg onload=\"document.title='RAN'\">",
    "' onmouseover='document.title=1' x='",
)


def page_of(tmp_path, template: str, name: str) -> Path:
    (tmp_path / "template.html").write_text(template)
    page = tmp_path / "page.html"
    page.write_text(render(tmp_path / "template.html", name=name), encoding="utf-8")
    return page


def loaded(page: Path, profile: Path) -> str:
    """The page as Chromium has it once everything on it ran."""
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={profile}", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_values_are_escaped_and_macros_are_not(tmp_path):
    template = tmp_path / "page.html"
    template.write_text("{% macro bold(text) %}<b>{{ text }}</b>{% endmacro %}\n{{ bold(name) }}")
    assert render(template, name="<i>&'\"").strip() == "<b>&lt;i&gt;&amp;&#39;&#34;</b>"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_pages_allow_no_script(page):
    text = page.read_text()
    assert 'Content-Security-Policy" content="{{ content_security_policy }}"' in text
    assert "<script" not in text and "|safe" not in text.replace(" ", "")
    assert CONTENT_SECURITY_POLICY.startswith("default-src 'none'; img-src data:;")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_text(tmp_path, name):
    page = page_of(tmp_path, "<title>{{ name }}</title><p title='{{ name }}'>{{ name }}", name)
    tags: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append(  # type: ignore[method-assign]
        f"{tag} {' '.join(key for key, _ in attributes)}".strip()
    )
    parser.feed(page.read_text())
    assert tags == ["title", "p title"]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_nothing_of_hostile_names_runs_in_a_browser(tmp_path):
    meta = '<meta http-equiv="Content-Security-Policy" content="{{ content_security_policy }}">'
    head = "<!doctype html><title>quiet</title>"
    body = "".join(f"<p>{name}</p>" for name in HOSTILE)
    (tmp_path / "raw.html").write_text(head + body)
    assert "<title>RAN" in loaded(tmp_path / "raw.html", tmp_path / "a")  # the names do run as such
    policy = page_of(tmp_path, head + meta + body, "")
    assert "<title>quiet" in loaded(policy, tmp_path / "b")  # the policy alone stops them
    escaped = page_of(tmp_path, head + "<p>{{ name }}</p>", " ".join(HOSTILE))
    assert "<title>quiet" in loaded(escaped, tmp_path / "c")  # and so does escaping alone


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
