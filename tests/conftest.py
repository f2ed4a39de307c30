"""Shared by all tests: few threads, a fixed seed, no GPU tests without a GPU."""

from __future__ import annotations

import os

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", choices=("cuda", "cpu"), default="cuda", help="where tests marked gpu run"
    )


def pytest_configure(config: pytest.Config) -> None:
    # Servers of the tests listen at the loopback, which no proxy reaches.
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = "127.0.0.1,localhost"


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
