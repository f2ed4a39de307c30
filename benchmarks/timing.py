"""Interleaved timing: each side in turn, medians, ratios. Knows no models."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch


def interleave(
    sides: dict[str, Callable[[], object]], *, rounds: int, warm_up: int = 1
) -> dict[str, float]:
    """Median seconds per call of each side; a round calls every side once, so that slow spells hit
    all alike."""
    for call in sides.values():
        for _ in range(warm_up):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def machine() -> str:
    """Processor, cores and what it computes in bf16."""
    model = platform.processor() or platform.machine()
    try:
        lines = subprocess.run(
            ["lscpu"], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        model = next(
            (line.split(":", 1)[1].strip() for line in lines if line.startswith("Model name")),
            model,
        )
    except (OSError, subprocess.CalledProcessError):
        pass
    known = torch.cpu.get_capabilities()
    kind = (
        "AMX" if known.get("amx_bf16") else "AVX512-BF16" if known.get("avx512_bf16") else "no bf16"
    )
    return f"{model}, {torch.get_num_threads()} threads, {kind}, torch {torch.__version__}"


def report(
    name: str, unit: str, rates: dict[str, float], extra: dict[str, float] | None = None
) -> None:
    """Prints rates and our ratio to each peer; `--out FILE` writes them as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    options, _ = parser.parse_known_args()
    ours = rates["ours"]
    ratios = {peer: ours / rate for peer, rate in rates.items() if peer != "ours"}
    print(f"{name} ({unit}), {machine()}")
    for side, rate in rates.items():
        print(
            f"  {side:<24} {rate:12,.1f}"
            + (f"   ours is {ratios[side]:.2f}x" if side in ratios else "")
        )
    for key, value in (extra or {}).items():
        print(f"  {key:<24} {value:12.2f}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        known = json.loads(options.out.read_text()) if options.out.exists() else {}
        known[name] = {
            "unit": unit,
            "machine": machine(),
            "rates": rates,
            "ratios": ratios,
            **(extra or {}),
        }
        options.out.write_text(json.dumps(known, indent=2) + "\n")
