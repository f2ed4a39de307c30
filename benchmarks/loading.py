"""Images per second that `data.workers` threads load, shrink and crop for training; and the
fraction of its time that a training waits for them.

    python -m benchmarks.loading [--images 4000] [--workers 2] [--steps 300]

JPEGs of 256x256 (about 28 KB, smooth with some noise) are written to a temporary folder and read at
64x64, without a cache (`data.cache_gb` 0): as files of a folder, from webdataset shards row by row,
and as a stream of the shards. Then the tokenizer of configs/emoji.yaml is trained on the folder,
and `fit` measures its wait.
"""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.config.data import DataConfig
from pipeline.data.load import load_sources
from pipeline.data.streaming.feed import batch_loader

BATCH = 64
SHARD = 500


def jpeg(number: int, side: int = 256) -> bytes:
    """A smooth image with noise, as a file."""
    random = np.random.default_rng(number)
    smooth = Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    noisy = np.asarray(smooth).astype(np.int16) + random.normal(0, 8, (side, side, 1)).astype(
        np.int16
    )
    buffer = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write(folder: Path, count: int) -> None:
    (folder / "images").mkdir()
    (folder / "shards").mkdir()
    for first in range(0, count, SHARD):
        with tarfile.open(folder / "shards" / f"{first // SHARD:05d}.tar", "w") as tar:
            for number in range(first, min(first + SHARD, count)):
                content = jpeg(number)
                text = f"image number {number}".encode()
                (folder / "images" / f"{number:06d}.jpg").write_bytes(content)
                (folder / "images" / f"{number:06d}.txt").write_bytes(text)
                for suffix, data in (("jpg", content), ("txt", text)):
                    entry = tarfile.TarInfo(f"{number:06d}.{suffix}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))


def rate(source: Path, workers: int, *, streaming: bool) -> tuple[float, float]:
    """Images per second while every image is opened once, and while batches are loaded; the first
    is 0 for a stream."""
    start = time.perf_counter()
    train, _ = load_sources(
        DataConfig(source=str(source), workers=workers, cache_gb=0.0, streaming=streaming)
    )
    opened = 0.0 if streaming else (len(train) / 0.95) / (time.perf_counter() - start)
    feed = batch_loader(train, BATCH, 0, 0, 1)
    feed.images(0)
    steps = 0
    start = time.perf_counter()
    while time.perf_counter() - start < 5:
        steps += 1
        feed.images(steps)
    return opened, steps * BATCH / (time.perf_counter() - start)


def waited(folder: Path, steps: int, workers: int) -> str:
    """What a training on the folder says at its end."""
    command = [
        sys.executable,
        "-m",
        "pipeline.cli",
        "train-tokenizer",
        "--config",
        "configs/emoji.yaml",
        "--name",
        "loading",
        "--output_dir",
        str(folder / "runs"),
        "--data.source",
        str(folder / "images"),
        "--data.cache_gb",
        "0",
        "--data.workers",
        str(workers),
        "--tokenizer.train.steps",
        str(steps),
        "--tokenizer.train.compile",
        "on",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    found = re.search(r"tokenizer: (.*waiting for data)", done.stdout + done.stderr)
    return found.group(1) if found else (done.stdout + done.stderr)[-500:]


def main() -> None:
    reader = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    reader.add_argument("--images", type=int, default=4000)
    reader.add_argument("--workers", type=int, default=2)
    reader.add_argument("--steps", type=int, default=300, help="of the training; 0 trains none")
    options = reader.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, options.images)
        # What is imported and read for the first time
        load_sources(DataConfig(source=str(folder / "images"), val_fraction=0.9))
        print("| source | opened, images/s | loaded at 64x64, images/s |\n|---|---|---|")
        for label, source, streaming in (
            ("folder", "images", False),
            ("shards", "shards", False),
            ("stream of shards", "shards", True),
        ):
            opened, loaded = rate(folder / source, options.workers, streaming=streaming)
            print(
                f"| {label} | {f'{opened:,.0f}' if opened else '-'} | {loaded:,.0f} |", flush=True
            )
        if options.steps:
            print(f"training: {waited(folder, options.steps, options.workers)}")


if __name__ == "__main__":
    main()
