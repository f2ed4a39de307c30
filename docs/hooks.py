"""What mkdocs needs beyond `mkdocs.yml`: pages from outside docs/, and links as the site has them.

On disk every link is relative to its file, and may lead to a page outside docs/ or to source code.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "benchmarks/README.md": "benchmarks.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security-policy.md",
}
"""Files outside docs/ that are pages of the site."""

LINK = re.compile(r"(!?)\[([^\]\n]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"\s*```")
ITEM = re.compile(r"([-*]|\d+\.) ")
NOTE = re.compile(r"^> \[!NOTE\]\n((?:>.*\n)+)", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages from outside docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Markdown as GitHub reads it to Markdown as Python-Markdown reads it."""
    uri = page.file.src_uri
    sources = {site: source for source, site in PAGES.items()}
    folder = posixpath.dirname(sources.get(uri, f"docs/{uri}"))
    lines: list[str] = []
    in_code = False
    for line in NOTE.sub(admonition, markdown).splitlines():
        in_code ^= bool(FENCE.match(line))
        if not in_code:
            line = LINK.sub(lambda link: site_link(link, folder, posixpath.dirname(uri)), line)
            if starts_block(line, lines[-1] if lines else ""):
                lines.append("")
        lines.append(line)
    return "\n".join(lines)


def site_link(link: re.Match[str], folder: str, site_folder: str) -> str:
    """A link from a file in `folder` as a page in `site_folder` has it. Source code is no page: its
    name stays, with the path as a tooltip."""
    image, label, target, anchor = link.groups(default="")
    path = posixpath.normpath(posixpath.join(folder, target))
    if "://" in target or not (ROOT / path).exists():
        return link[0]
    if path not in PAGES and not path.startswith("docs/"):
        return f'<span title="{path}">{label}</span>'
    site_path = PAGES.get(path, path.removeprefix("docs/"))
    return f"{image}[{label}]({os.path.relpath(site_path, site_folder or '.')}{anchor})"


def admonition(note: re.Match[str]) -> str:
    """A quote that GitHub shows as a boxed note, as Python-Markdown's box."""
    quoted = [line.removeprefix(">").removeprefix(" ") for line in note[1].splitlines()]
    return "\n".join(["!!! note", "", *(f"    {line}" for line in quoted), ""])


def starts_block(line: str, before: str) -> bool:
    """Whether a list or a table begins right after a line of text, where Python-Markdown wants an
    empty line."""
    if not before.strip() or before.startswith(" "):
        return False
    if ITEM.match(line):
        return not ITEM.match(before)
    return line.startswith("|") and not before.startswith("|")
