"""Tests of GPU behaviour. They run there by `pytest -m gpu`, and on the CPU, as far as possible,
by `pytest -m gpu --device cpu`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device under test. Tests that ask for it alone run on the CPU too."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def _uncompiled_on_cpu(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU `torch.compile` runs what it traces as it is: there these tests are a dry run,
    and compiling takes minutes."""
    if device.type == "cpu":
        compile = torch.compile
        monkeypatch.setattr(
            torch, "compile", lambda *given, **options: compile(*given, **_eager(options))
        )


def _eager(options: dict[str, Any]) -> dict[str, Any]:
    # The options are Inductor's own.
    return {
        "backend": "eager",
        **{name: value for name, value in options.items() if name != "options"},
    }


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """A CUDA device; on the CPU the test is skipped."""
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")
    torch.cuda.empty_cache()
    return device


@pytest.fixture(autouse=True)
def _exact_fp32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Convolutions in fp32 and not in TF32, which cuDNN takes by default: what is compared here is
    compared in fp32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A failure is printed at once: a run that is killed would otherwise print none."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\n{report.nodeid} {report.when}\n{report.longreprtext[-3000:]}", flush=True)


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> None:
    """A fault of the card would fail every later test of this process: under xdist it ends, and
    another takes its place."""
    fault = call.excinfo is not None and re.search(
        "illegal memory access|device-side assert", str(call.excinfo.value)
    )
    if fault and "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(1)
