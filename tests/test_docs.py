"""README and docs: links, commands and settings exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.cli.main import COMMANDS, HELP
from pipeline.config.experiment import Experiment
from tests.helpers.experiments import settings

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


@EVERY_PAGE
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), (
            f"{page.name} links to {target}"
        )


@EVERY_PAGE
def test_commands_exist(page):
    for command in re.findall(r"minidalle ([a-z][a-z-]*)\b", page.read_text()):
        assert command in COMMANDS, f"{page.name} names the command {command}"


def test_help_lists_every_command():
    assert all(re.search(rf"^  {command} ", HELP, re.MULTILINE) for command in COMMANDS)


@EVERY_PAGE
def test_named_settings_exist(page):
    """Options with a dot, as in --prior.train.steps."""
    known = settings(Experiment)
    for option in re.findall(r"--([a-z_]+\.[a-z_.]+)", page.read_text()):
        assert option.rstrip(".") in known, f"{page.name} gives --{option}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100
