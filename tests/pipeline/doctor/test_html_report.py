"""The doctor's page of hostile names and captions: they are text, and nothing runs."""

from __future__ import annotations

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pipeline.cli.main import main
from pipeline.runtime.html_page import CONTENT_SECURITY_POLICY
from tests.helpers.data import photo

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
RUNS = "document.title='RAN'"
NAMES = (
    f'<img src=x onerror="{RUNS}">',
    f"<svg onload={RUNS}>",
    f'"><script>{RUNS}<!--',
    f"' onmouseover='{RUNS}' x='",
    f"javascript:{RUNS}",
)
CAPTIONS = (*NAMES, f"</pre></title><script>{RUNS}</script>")


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """Of a folder whose own name is hostile; it has copies, unreadable and uncaptioned images."""
    folder = tmp_path_factory.mktemp("data") / NAMES[0]
    folder.mkdir()
    for i in range(12):
        name = f"{i:02}{NAMES[i % len(NAMES)]}"
        photo(max(i, 1)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(CAPTIONS[i % len(CAPTIONS)])
        if i < len(NAMES):
            (folder / f"broken{name}.png").write_bytes(b"broken")
            (folder / f"broken{name}.txt").write_text("nothing")
            photo(40 + i).save(folder / f"uncaptioned{name}.png")
    out = tmp_path_factory.mktemp("doctor") / "out"
    main(["doctor", str(folder), "--out", str(out)])
    return out / "index.html"


class Tags(HTMLParser):
    """The tags of a page with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_hostile_names_and_captions_are_text(page):
    text = page.read_text(encoding="utf-8")
    assert "onerror=" in text and "&lt;script&gt;" in text  # they are there
    tags = Tags()
    tags.feed(text)
    assert not {"script", "svg", "iframe", "a"} & {tag for tag, _ in tags.found}
    assert not [name for _, attributes in tags.found for name in attributes if name[:2] == "on"]
    sources = [attributes["src"] or "" for tag, attributes in tags.found if tag == "img"]
    assert sources and all(source.startswith("data:image/") for source in sources)


def test_the_page_has_a_content_security_policy(page):
    tags = Tags()
    tags.feed(page.read_text(encoding="utf-8"))
    policies = [
        attributes["content"]
        for tag, attributes in tags.found
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policies == [CONTENT_SECURITY_POLICY]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_nothing_runs_in_a_browser(page, tmp_path):
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path}", page.as_uri()]
    seen = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "<title>doctor: " in seen and "<title>RAN" not in seen
