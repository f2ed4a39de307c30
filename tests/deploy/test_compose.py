"""deploy/compose.yaml: its schema, who reaches the server, and how it ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipeline.cli.main import COMMANDS
from pipeline.cli.options import parse_options
from pipeline.serving.settings import ServerSettings
from tests.helpers.linters import lint

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "deploy" / "compose.yaml"
SERVER = yaml.safe_load(COMPOSE.read_text())["services"]["server"]
CHECK = ("check-jsonschema", "--builtin-schema", "vendor.compose-spec")


def test_the_linter_finds_nothing():
    assert lint(*CHECK, COMPOSE) == (0, "ok -- validation done\n")


@pytest.mark.parametrize(
    ("old", "new"), [("read_only: true", "readonly: true"), ("      - tokens\n", "      - 1\n")]
)
def test_the_linter_sees_what_is_wrong(tmp_path, old, new):
    text = COMPOSE.read_text()
    assert text.count(old) == 1
    path = tmp_path / "compose.yaml"
    path.write_text(text.replace(old, new))
    status, found = lint(*CHECK, path)
    assert status == 1 and "services.server" in found


def test_this_machine_alone_reaches_the_server():
    assert SERVER["ports"] == ["127.0.0.1:8000:8000"]


def test_tokens_are_a_secret():
    assert SERVER["secrets"] == ["tokens"] and "/run/secrets/tokens" in SERVER["command"]
    assert "environment" not in SERVER


def test_the_server_has_the_options_of_its_command():
    command, *options = SERVER["command"]
    assert parse_options(command, COMMANDS[command], options)["host"] == "0.0.0.0"


def test_running_requests_are_finished_before_the_container_is_killed():
    assert float(SERVER["stop_grace_period"].removesuffix("s")) >= ServerSettings.grace + 10


def test_the_image_is_that_of_the_dockerfile():
    build = SERVER["build"]
    folder = COMPOSE.parent / build["context"]
    assert (folder / build["dockerfile"]).is_file()
    named = (folder / build["dockerfile"]).read_text()
    assert all(f"ARG {name}=" in named for name in build["args"])
