"""The parts of `benchmarks.gpu_kit`, each a process of its own:

    python -m benchmarks.gpu_parts sampling --device cuda --out sampling.json

A metric is printed and written to the JSON file the moment it is known. On the CPU every part runs
at a tiny size.

Operations of a training step are 6 for each parameter that a token is multiplied by and 12 for each
pair of places that attention sees, feature and block (causal: half of the pairs). The card's bf16
rate is that of a product of two 8192 x 8192 matrices, its copy rate that of copying 2 GiB from
device to device, bytes read and written both counted.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_kit import ROOT, missing_packages, remedy, write_json
from benchmarks.timing import interleave

_PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "tokenizers",
    "datasets",
    "safetensors",
    "einops",
    "numpy",
    "pyarrow",
    "peft",
    "triton",
)


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    width: int
    depth: int
    heads: int
    side: int
    """Codes along each axis of an image."""
    codes: int
    text: int
    words: int
    batches: tuple[int, ...]
    """Images drawn at a time; the first is measured in every way."""
    train_batch: int
    product: int
    copied: int
    """Bytes."""
    image: int
    """Pixels along each axis of the tokenizer's images."""
    tokenizer_batch: int
    rounds: int


FULL = Sizes(768, 12, 12, 24, 16384, 120, 512, (8, 1, 64), 32, 8192, 2**31, 256, 32, 3)
"""The prior has 111M parameters, LlamaGen-B's size."""
TINY = Sizes(64, 2, 2, 4, 64, 8, 64, (2, 1, 4), 4, 256, 2**22, 32, 4, 1)


class Metrics:
    """What a part has found, in a file that is complete at any time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._values: dict[str, Any] = {}

    def put(self, name: str, value: Any) -> None:
        self._values[name] = value
        print(f"{name}: {value}", flush=True)
        write_json(self._path, {"metrics": self._values})


def environment(metrics: Metrics, device: torch.device, sizes: Sizes) -> None:
    """Card, driver, versions, and what of the project's requirements is missing."""
    metrics.put("python", platform.python_version())
    for name in _PACKAGES:
        try:
            metrics.put(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            metrics.put(name, "not installed")
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        metrics.put("card", card.name)
        metrics.put("cards", torch.cuda.device_count())
        metrics.put("multiprocessors", card.multi_processor_count)
        metrics.put("driver", _driver())
        metrics.put("CUDA of torch", torch.version.cuda)
        metrics.put("cuDNN", torch.backends.cudnn.version())
        metrics.put("GPU memory, GiB", round(card.total_memory / 2**30, 1))
        metrics.put("free GPU memory, GiB", round(torch.cuda.mem_get_info(device)[0] / 2**30, 1))
    missing = missing_packages(ROOT / "pyproject.toml", os.environ.get("PYTHONPATH", ""))
    metrics.put("missing requirements", ", ".join(missing) or "none")
    if missing:
        sys.exit(remedy(missing))


def _driver() -> str:
    try:
        ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return (
            subprocess.run(ask, capture_output=True, text=True, check=True)
            .stdout.split("\n")[0]
            .strip()
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def tests(metrics: Metrics, device: torch.device, sizes: Sizes) -> None:
    """`pytest -m gpu`: each result as it comes."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "--device",
        device.type,
        "-v",
        "--no-header",
        "-p",
        "no:cacheprovider",
    ]
    # A warning that a library gives on this card alone is no failure of ours; those that tests ask
    # for are asked for still.
    command += ["-W", "default", "--tb=short"]
    if device.type == "cuda" and importlib.util.find_spec("xdist"):
        command += ["-n", "4"]
    if importlib.util.find_spec("pytest_timeout"):  # a test that hangs costs itself alone
        command += ["--timeout", "90", "--timeout-method", "thread"]
    # Workers share the cores: each compiles and computes with its part of them.
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "4",
        "TORCHINDUCTOR_COMPILE_THREADS": "4",
        "NCCL_SOCKET_IFNAME": "lo",
    }
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures = list[str]()
    with subprocess.Popen(
        [*command, "tests/gpu"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if (
                found := re.search(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", line)
                if "::" in line and not line.startswith(("FAILED", "ERROR"))
                else None
            ):
                kind = {"PASSED": "passed", "SKIPPED": "skipped"}.get(found[1], "failed")
                counts[kind] += 1
                if kind == "failed":
                    failures.append(re.search(r"\S+::\S+", line)[0].removeprefix("tests/gpu/"))  # type: ignore[index]
                    metrics.put("which failed", ", ".join(failures))
                metrics.put(kind, counts[kind])
    if process.returncode:
        sys.exit(f"pytest ended with status {process.returncode}")


def sampling(metrics: Metrics, device: torch.device, sizes: Sizes) -> None:
    """Guided images per second, plain, compiled and captured, and a step against the time in which
    its bytes are read once."""
    from stage2_prior import SamplingOptions, sample, table

    prior = random_prior(sizes).to(device, torch.bfloat16).eval()
    metrics.put("parameters, millions", sum(p.numel() for p in prior.parameters()) / 1e6)
    metrics.put("codes per image", prior.stream.image_length)
    rate = copy_rate(sizes, device)
    metrics.put("copy rate, GB/s", rate / 1e9)
    how = SamplingOptions(guidance_scale=2.0)
    text = torch.randint(
        3, sizes.words, (max(sizes.batches), sizes.text), generator=torch.Generator().manual_seed(0)
    )

    def drawn(batch: int, *, compiled: bool) -> torch.Tensor:
        return sample(prior, text[:batch], range(batch), how, compiled=compiled).codes

    def measured(name: str, batch: int, *, compiled: bool, rounds: int) -> float:
        start = time.perf_counter()
        drawn(batch, compiled=compiled)
        if compiled:
            metrics.put(f"first call, batch {batch}, {name}, s", time.perf_counter() - start)
        taken = seconds(lambda: drawn(batch, compiled=compiled), device, rounds=rounds, warm_up=0)
        metrics.put(f"images/s, batch {batch}, {name}", batch / taken)
        return taken

    first = sizes.batches[0]
    start = time.perf_counter()
    plain_codes = drawn(first, compiled=False)
    finish(device)
    metrics.put(
        f"images/s, batch {first}, plain, its first call", first / (time.perf_counter() - start)
    )
    if device.type == "cuda":
        with uncaptured(table):
            measured("compiled", first, compiled=True, rounds=2)
    way = "captured" if device.type == "cuda" else "compiled"
    for batch in sizes.batches:
        taken = measured(way, batch, compiled=True, rounds=sizes.rounds)
        step = taken / prior.stream.image_length
        floor = step_bytes(prior, batch, guided=True) / rate
        metrics.put(f"ms per step, batch {batch}, {way}", 1000 * step)
        metrics.put(f"times the floor of {1000 * floor:.3f} ms, batch {batch}", step / floor)
    codes = drawn(first, compiled=True)
    metrics.put(
        f"share of codes equal, {way} and plain (bf16)",
        float((codes == plain_codes).float().mean()),
    )
    alone = sample(prior, text[:1], range(1), how, compiled=True).codes
    metrics.put(
        "share of codes equal, alone and in a batch (bf16)",
        float((alone[0] == codes[0]).float().mean()),
    )
    if device.type == "cuda":
        metrics.put("peak GPU memory, GiB", torch.cuda.max_memory_allocated(device) / 2**30)


@contextmanager
def uncaptured(table: Any):
    """Compiled steps without a CUDA graph."""
    held = table.capture_cuda_graph
    table.capture_cuda_graph = lambda step, device: step
    try:
        yield
    finally:
        table.capture_cuda_graph = held


def training(metrics: Metrics, device: torch.device, sizes: Sizes) -> None:
    """Tokens per second of the prior as a share of the card's bf16 rate; images per second of a
    tokenizer with 16 pixels per code."""
    rate = product_rate(sizes, device)
    metrics.put("bf16 rate of a product, TFLOP/s", rate / 1e12)
    prior = random_prior(sizes).to(device).train()
    step, tokens = prior_step(prior, sizes, device)
    start = time.perf_counter()
    step()
    finish(device)
    metrics.put("first step of the prior, s", time.perf_counter() - start)
    taken = seconds(step, device, rounds=5 * sizes.rounds, warm_up=2)
    metrics.put("tokens/s", tokens / taken)
    metrics.put(
        "share of the bf16 rate", operations(prior, tokens, sizes.train_batch) / taken / rate
    )
    if device.type == "cuda":
        metrics.put(
            "peak GPU memory of the prior, GiB", torch.cuda.max_memory_allocated(device) / 2**30
        )
        torch.cuda.reset_peak_memory_stats(device)
    del prior, step
    for name in ("patch", "vqgan"):
        step = tokenizer_step(name, sizes, device)
        step()
        taken = seconds(step, device, rounds=3 * sizes.rounds, warm_up=2)
        metrics.put(
            f"tokenizer images/s, {name}, {sizes.image}x{sizes.image}, f16",
            sizes.tokenizer_batch / taken,
        )
        del step
    if device.type == "cuda":
        metrics.put(
            "peak GPU memory of the tokenizers, GiB",
            torch.cuda.max_memory_allocated(device) / 2**30,
        )


def main_job(metrics: Metrics, device: torch.device, sizes: Sizes) -> None:
    """`minidalle run` and `evaluate` of configs/shapes.yaml, as a user starts them."""
    with tempfile.TemporaryDirectory() as folder:
        given = ["--config", "configs/shapes.yaml", "--output_dir", folder]
        judged: list[str] = []
        if device.type == "cpu":
            given += [
                f"--{stage}.train.{name}={value}"
                for stage in ("tokenizer", "prior")
                for name, value in _TINY_TRAINING.items()
            ]
            given += ["--encode.max_images=200", "--encode.max_val_images=20"]
            judged = ["--max-images", "10"]
        start = time.perf_counter()
        minidalle("run", *given)
        metrics.put("run, s", time.perf_counter() - start)
        run = Path(folder) / "shapes"
        start = time.perf_counter()
        minidalle("evaluate", "--bundle", str(run / "bundle"), *given, *judged)
        metrics.put("evaluate, s", time.perf_counter() - start)
        found = json.loads((run / "evaluation.json").read_text())
        metrics.put("captions judged", found["settings"]["images"])
        for name, ours in (
            ("prompt accuracy", "prompt_accuracy"),
            ("prompt accuracy, new pairs", "prompt_accuracy_new_pairs"),
            ("PSNR, dB", "psnr"),
            ("nats per code", "nats_per_code"),
        ):
            metrics.put(name, found[ours])


_TINY_TRAINING = {"steps": 4, "batch_size": 4, "eval_every": 4, "save_every": 4, "warmup_steps": 1}


def minidalle(*arguments: str) -> None:
    """Runs a command; its output is shown.

    Raises:
        SystemExit: it failed.
    """
    if status := subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *arguments], cwd=ROOT, check=False
    ).returncode:
        sys.exit(f"minidalle {arguments[0]} ended with status {status}")


def profile(metrics: Metrics, device: torch.device, sizes: Sizes) -> None:
    """The 20 kernels that take longest in sampling and in a training step, to profile.txt next to
    the metrics."""
    from torch.autograd import DeviceType
    from torch.autograd.profiler_util import EventList
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recorded

    from stage2_prior import SamplingOptions, sample

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    prior = random_prior(sizes).to(device, torch.bfloat16).eval()
    text = torch.randint(3, sizes.words, (sizes.batches[0], sizes.text))
    how = SamplingOptions(guidance_scale=2.0)

    def drawn() -> None:
        sample(prior, text, range(len(text)), how, compiled=device.type == "cuda")

    report = metrics._path.with_name("profile.txt")
    report.write_text("")
    for name, call in (("sampling", drawn), ("training", None)):
        if call is None:
            del prior
            call, _ = prior_step(random_prior(sizes).to(device).train(), sizes, device)
        call()
        call()
        finish(device)
        with recorded(activities=kinds, acc_events=True) as found:
            call()
            finish(device)
        averages = found.key_averages()
        if device.type == "cuda":
            # kernels alone: operations carry the time of their kernels, annotations that of all
            # between them
            kernels = [
                event
                for event in averages
                if event.device_type == DeviceType.CUDA and not event.is_user_annotation
            ]
            averages = EventList(kernels, use_device="cuda")
        events = sorted(
            averages, key=lambda event: -getattr(event, order.replace("cuda", "device"))
        )
        total = sum(getattr(event, order.replace("cuda", "device")) for event in events)
        with report.open("a") as file:
            rows = averages.table(sort_by=order, row_limit=20, max_name_column_width=80)
            file.write(f"{name}\n{rows}\n")
        share = getattr(events[0], order.replace("cuda", "device")) / max(total, 1)
        metrics.put(
            f"first kernel of {name}",
            f"{events[0].key[:60]} ({share:.0%} of {total / 1000:.1f} ms)",
        )


def random_prior(sizes: Sizes):
    """A prior whose logits are random and not level, as those of a new one are."""
    from stage2_prior import Level, PriorConfig, PriorModule, StreamConfig

    torch.manual_seed(0)
    level = Level(grid=(sizes.side, sizes.side), num_codes=sizes.codes)
    stream = StreamConfig(text_vocab_size=sizes.words, text_length=sizes.text, levels=(level,))
    prior = PriorModule(
        PriorConfig(width=sizes.width, depth=sizes.depth, heads=sizes.heads), stream
    )
    prior.config.trained_with_caption_dropout = True
    with torch.no_grad():
        for parameter in prior.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return prior


def prior_step(prior, sizes: Sizes, device: torch.device) -> tuple[Callable[[], None], int]:
    """A compiled step of AdamW in bf16 autocast, and the tokens that it sees."""
    from stage2_prior import PriorObjective, PriorObjectiveConfig

    text = torch.randint(3, sizes.words, (sizes.train_batch, sizes.text), device=device)
    codes = torch.randint(
        0, sizes.codes, (sizes.train_batch, prior.stream.image_length), device=device
    )
    objective = PriorObjective(prior, PriorObjectiveConfig())
    if device.type == "cuda":
        objective.compile()
    return optimized(
        objective, {"text_ids": text, "codes": codes}, prior, device
    ), sizes.train_batch * (prior.stream.length - 1)


def tokenizer_step(architecture: str, sizes: Sizes, device: torch.device) -> Callable[[], None]:
    """A step of a VQ tokenizer, a code for 16 x 16 pixels: our default network, compiled, or
    VQ-GAN's, whose compiling takes minutes."""
    from stage1_tokenizer import (
        ObjectiveConfig,
        TokenizerConfig,
        TokenizerModule,
        TokenizerObjective,
        VqganOptions,
    )

    full = sizes.image == FULL.image
    if architecture == "vqgan":
        network: dict[str, Any] = {
            "vqgan": VqganOptions(channels=128 if full else 32, multipliers=(1, 1, 2, 2, 4))
        }
    else:
        network = {"width": 512 if full else 32}
    config = TokenizerConfig(
        image_size=sizes.image,
        downsample_factor=16,
        num_codes=sizes.codes,
        code_dim=8,
        architecture=architecture,
        **network,
    )
    tokenizer = TokenizerModule(config).to(device, memory_format=torch.channels_last).train()
    objective = TokenizerObjective(tokenizer, ObjectiveConfig())
    batch = torch.randint(
        256, (sizes.tokenizer_batch, sizes.image, sizes.image, 3), dtype=torch.uint8, device=device
    )
    if device.type == "cuda" and architecture != "vqgan":
        tokenizer.compile_networks()
    return optimized(objective, batch, tokenizer, device)


def optimized(
    objective, batch: Any, network: torch.nn.Module, device: torch.device
) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            value = next(iter(objective.losses(batch, 1))).value
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def operations(prior, tokens: int, batch: int) -> float:
    """Of one training step, forward and backward; each head sees its own kind of token."""
    stream = prior.stream
    config = prior.model_config
    inside = sum(p.numel() for p in prior.blocks.parameters()) * tokens
    heads = batch * (
        prior.text_head.weight.numel() * (stream.text_length - 1)
        + prior.image_head.own.numel() * stream.image_length
    )
    return (
        6 * (inside + heads)
        + 12 * batch * (stream.length - 1) ** 2 / 2 * config.width * config.depth
    )


def step_bytes(prior, batch: int, *, guided: bool) -> int:
    """Bytes that a step of sampling must read: the blocks, the image head and the whole cache, each
    once."""
    config = prior.model_config
    size = prior.text_head.weight.element_size()
    weights = (
        sum(p.numel() for p in prior.blocks.parameters()) + prior.stream.num_codes * config.width
    )
    cache = (
        2
        * config.depth
        * prior.kv_heads
        * (config.width // config.heads)
        * (prior.stream.length - 1)
        * batch
        * (2 if guided else 1)
    )
    return (weights + cache) * size


def product_rate(sizes: Sizes, device: torch.device) -> float:
    """Operations per second of a product of two square bf16 matrices of random numbers."""
    left, right = (
        torch.randn(sizes.product, sizes.product, device=device, dtype=torch.bfloat16)
        for _ in range(2)
    )
    return 2 * sizes.product**3 / seconds(lambda: left @ right, device, rounds=10, warm_up=3)


def copy_rate(sizes: Sizes, device: torch.device) -> float:
    """Bytes read and written per second by a copy on the device."""
    source = torch.empty(sizes.copied, dtype=torch.uint8, device=device).random_(0, 256)
    target = torch.empty_like(source)
    return 2 * sizes.copied / seconds(lambda: target.copy_(source), device, rounds=10, warm_up=3)


def seconds(
    call: Callable[[], object], device: torch.device, *, rounds: int, warm_up: int
) -> float:
    """Median seconds of a call, until the device is done with it."""

    def finished() -> None:
        call()
        finish(device)

    finish(device)
    return interleave({"call": finished}, rounds=rounds, warm_up=warm_up)["call"]


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


PARTS = {
    part.__name__: part for part in (environment, tests, sampling, training, main_job, profile)
}


def main() -> None:
    parser = argparse.ArgumentParser(description="One part of benchmarks.gpu_kit.")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the metrics")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cpu":
        # Compiling takes a minute, and nothing is measured at this size
        torch.compiler.set_stance("force_eager")
    PARTS[options.part](Metrics(options.out), device, FULL if device.type == "cuda" else TINY)


if __name__ == "__main__":
    main()
