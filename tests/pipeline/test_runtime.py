"""When training computes in bf16 and when it compiles."""

from __future__ import annotations

import torch

from pipeline import runtime
from pipeline.config import TrainConfig
from pipeline.runtime import compiles, uses_bf16

CPU = torch.device("cpu")


def test_precision_is_asked_for_or_what_the_processor_computes_natively(monkeypatch):
    assert uses_bf16("bf16", CPU) and not uses_bf16("fp32", CPU)
    for capabilities, expected in (({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx2": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda c=capabilities: c)
        assert uses_bf16("auto", CPU) is expected


def test_compiling_is_asked_for_or_worth_it(monkeypatch):
    assert compiles(TrainConfig(compile="on", steps=1), CPU) and not compiles(TrainConfig(compile="off", steps=10**6), CPU)
    monkeypatch.setattr(runtime, "_can_compile", lambda: True)
    assert compiles(TrainConfig(steps=10_000), CPU) and not compiles(TrainConfig(steps=10), CPU)
    monkeypatch.setattr(runtime, "_can_compile", lambda: False)
    assert not compiles(TrainConfig(steps=10_000), CPU)


def test_a_tracker_that_is_not_installed_is_named(tiny_yaml, capsys, monkeypatch):
    from pipeline.cli import main

    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    assert main(["train-tokenizer", "--config", str(tiny_yaml), "--trackers", '["wandb"]']) == 1
    assert "trackers ['wandb'] are not installed" in capsys.readouterr().err
