"""Shared by all tests: few threads, a fixed seed, no GPU tests without a GPU."""

from __future__ import annotations

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", choices=("cuda", "cpu"), default="cuda", help="where tests marked gpu run"
    )


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
