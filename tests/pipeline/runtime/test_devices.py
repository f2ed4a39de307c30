"""When training computes in bf16, when it compiles, and reuse of freed memory."""

from __future__ import annotations

import ctypes
import math
import subprocess
import sys

import pytest
import torch

from pipeline.config.train import TrainConfig
from pipeline.runtime import devices
from pipeline.runtime.devices import (
    free_in_container,
    free_memory,
    should_compile,
    tune_malloc,
    uses_bf16,
)

CPU = torch.device("cpu")
GIB = 2**30


@pytest.mark.parametrize(
    ("limit", "used", "stat", "expected"),
    [
        (f"{2 * GIB}\n", f"{GIB}\n", f"anon 5\ninactive_file {GIB // 4}\n", 1.25 * GIB),
        (f"{GIB}\n", f"{2 * GIB}\n", "", 0),
        ("max\n", f"{GIB}\n", "", math.inf),
        (f"{GIB}\n", "?", "", math.inf),
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_a_container_s_limit_is_read(tmp_path, version, limit, used, stat, expected):
    folder = tmp_path if version == 2 else tmp_path / "memory"
    folder.mkdir(exist_ok=True)
    names = ("max", "current") if version == 2 else ("limit_in_bytes", "usage_in_bytes")
    for name, text in zip((*names, "stat"), (limit, used, stat), strict=True):
        (folder / f"memory.{name}").write_text(text)
    assert free_in_container(tmp_path) == expected


def test_free_memory_is_at_most_what_the_container_has(tmp_path, monkeypatch):
    assert free_in_container(tmp_path) == math.inf  # no container
    monkeypatch.setattr(devices, "free_in_container", lambda: 1000)
    assert free_memory(CPU) == 1000


def test_auto_precision_is_bf16_where_native(monkeypatch):
    assert uses_bf16("bf16", CPU) and not uses_bf16("fp32", CPU)
    for capabilities, expected in (
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"avx2": True}, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda c=capabilities: c)
        assert uses_bf16("auto", CPU) is expected


def test_compiling_is_requested_or_worth_its_time(monkeypatch):
    monkeypatch.setattr(devices, "has_cpp_compiler", lambda: True)
    assert should_compile(TrainConfig(compile="on", steps=1), CPU) and not should_compile(
        TrainConfig(compile="off", steps=10**6), CPU
    )
    assert should_compile(TrainConfig(steps=10_000), CPU) and not should_compile(
        TrainConfig(steps=10), CPU
    )
    monkeypatch.setattr(devices, "has_cpp_compiler", lambda: False)
    assert not should_compile(TrainConfig(steps=10_000), CPU)
    with pytest.raises(
        ValueError,
        match=r"train.compile is on, and there is no C\+\+ compiler with Python's headers here; "
        r"install them",
    ):
        should_compile(TrainConfig(compile="on"), CPU)


def test_a_tracker_that_is_not_installed_is_named(tiny_yaml, capsys, monkeypatch):
    from pipeline.cli.main import main

    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    assert main(["train-tokenizer", "--config", str(tiny_yaml), "--trackers", '["wandb"]']) == 1
    assert "trackers ['wandb'] are not installed" in capsys.readouterr().err


FAULTS = """
import resource, torch
from pipeline.runtime.devices import tune_malloc
if {keeps}: assert tune_malloc()
def faults():
    torch.ones(12_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
faults()
before = faults()
for _ in range(5): after = faults()
print(after - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library")
def test_freed_memory_is_reused_by_the_process():
    """48 MB five times over are 60,000 pages: asked for each time by default, and here once more at
    most."""
    counts = []
    for keeps in (False, True):
        done = subprocess.run(
            [sys.executable, "-c", FAULTS.format(keeps=keeps)],
            capture_output=True,
            text=True,
            check=True,
        )
        counts.append(int(done.stdout))
    assert counts[0] > 50_000 and counts[1] < 15_000


def test_malloc_tuning_without_glibc_does_nothing(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert tune_malloc() is False
