"""deploy/Dockerfile: what a linter finds, what is copied, and who runs it. No image is built."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

from pipeline.cli.main import COMMANDS
from pipeline.cli.options import parse_options
from tests.helpers.linters import lint

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
TEXT = DOCKERFILE.read_text()


def copied() -> list[str]:
    """Files and folders of the repository that reach the image."""
    lines = re.findall(r"(?m)^COPY (?!--from)(.+) \S+$", TEXT)
    return [name for line in lines for name in line.split()]


def test_the_linter_finds_nothing():
    assert lint("hadolint", DOCKERFILE) == (0, "")


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("python:3.11.13-slim-bookworm\n\nRUN", "python\n\nRUN", "DL3006"),
        ("WORKDIR /src", "WORKDIR src", "DL3000"),
        ("RUN useradd", "RUN sudo useradd", "DL3004"),
        ("HEALTHCHECK", "HEALTHCHEK", "unexpected 'H'"),
    ],
)
def test_the_linter_sees_what_is_wrong(tmp_path, old, new, rule):
    assert TEXT.count(old) == 1
    path = tmp_path / "Dockerfile"
    path.write_text(TEXT.replace(old, new))
    status, found = lint("hadolint", path)
    assert status == 1 and rule in found


def test_the_base_has_one_exact_version():
    assert set(re.findall(r"(?m)^FROM (\S+)", TEXT)) == {"python:3.11.13-slim-bookworm"}


def test_it_runs_as_a_user_without_rights_and_checks_its_health():
    final = TEXT.rpartition("\nFROM ")[2]
    assert re.search(r"(?m)^USER [1-9]\d*$", final)
    assert re.search(r"(?m)^HEALTHCHECK .*\\\n.*/healthz", final)
    assert "HF_HUB_OFFLINE=1" in final and "RAY_USAGE_STATS_ENABLED=0" in final


def test_the_server_has_the_options_of_its_command():
    command, *options = json.loads(re.search(r"(?m)^CMD (.+)$", TEXT)[1])  # type: ignore[index]
    assert parse_options(command, COMMANDS[command], options)["host"] == "0.0.0.0"


def test_what_an_installation_needs_is_copied():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.split(".")[0] for name in project["tool"]["setuptools"]["packages"]}
    needed = {*packages, "pyproject.toml", "constraints.txt", project["project"]["readme"]}
    assert needed | set(project["project"]["license-files"]) <= set(copied())
    assert all((ROOT / name).exists() for name in copied())


def test_nothing_else_is_sent_to_the_builder():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*" and rules[-1] == "**/__pycache__"
    assert sorted(rules[1:-1]) == sorted(f"!{name}" for name in copied())
