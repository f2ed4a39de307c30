"""Growth of memory with the number of rows, while codes are written, opened and read, and while
captions are learned.

    python -m benchmarks.memory [--rows 1000000] [--folder DIR]

Rows of 64 codes and captions of eight words pass through the functions that encoding and training
use. One row in four has a second caption. Random numbers stand in for codes. Growth is the peak
above the start of the part, of two sizes: anonymous memory, and resident memory. The second also
counts pages of mapped files, which the system may drop at any time. Each part runs on 10,000 rows
first, so that imports and other one-time costs are counted there.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import psutil

from benchmarks.timing import machine
from pipeline.config.load import load_values
from pipeline.data.codes.dataset import (
    FORMAT,
    CodesDataset,
    mark_shard_done,
    planned_files,
    recorded_shard,
    write_manifest,
)
from pipeline.data.codes.shards import EncodedRows, write_shard
from pipeline.data.sampler import BatchSampler
from pipeline.runtime.distributed import make_accelerator
from pipeline.stages.captions import text_tokenizer

CODES = 64
NUM_CODES = 1024
BATCH = 64
WORDS = [
    f"{first}{second}{third}"
    for first in "bdfgklmnprst"
    for second in "aeiou"
    for third in ("n", "rk", "st", "lm")
]
SMALL = 10_000
MIB = 2**20


class Growth:
    """Watches this process's memory from a thread of its own."""

    def __enter__(self) -> Growth:
        self._process = psutil.Process()
        self._stop = Event()
        self._start = self._most = self._now()
        self._thread = Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.own, self.resident = (
            (most - start) / MIB for most, start in zip(self._most, self._start, strict=True)
        )

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self._most = tuple(map(max, self._most, self._now()))

    def _now(self) -> tuple[int, ...]:
        memory = self._process.memory_info()
        return memory.rss - memory.shared, memory.rss


def write(folder: Path, rows: int, each: int) -> None:
    """A whole codes folder of as many training rows, by the functions that encoding writes with."""
    levels = [{"grid": [8, 8], "num_codes": NUM_CODES}]
    plan: dict[str, Any] = {
        "format": FORMAT,
        "tokenizer": "none",
        "levels": levels,
        "sources": {"train": "none", "held_out": "none"},
        "augmentations_per_image": 1,
        "bf16": False,
        "images_per_shard": each,
        "parts": {"train": [{"first": 0, "rows": rows}], "held_out": [{"first": 0, "rows": 1000}]},
        "weights": [1.0],
        "settings": {"data": {}},
    }
    folder.mkdir(parents=True)
    files = planned_files(plan)
    for of_split in files.values():
        for name, unit in of_split.items():
            mark_shard_done(
                folder, write_shard(folder / name, blocks(unit.rows), codes=CODES, kind="uint16")
            )
    known = {
        split: [shard for name in of_split if (shard := recorded_shard(folder, name))]
        for split, of_split in files.items()
    }
    write_manifest(folder, plan, known)


def blocks(rows: range) -> Iterator[EncodedRows]:
    for first in range(rows.start, rows.stop, 128):
        part = range(first, min(first + 128, rows.stop))
        random = np.random.default_rng(first)
        words = random.integers(0, len(WORDS), (len(part), 2, 8))
        captions = [
            [" ".join(WORDS[word] for word in one) for one in two][: 2 if i % 4 == 0 else 1]
            for i, two in enumerate(words)
        ]
        names = [f"{i}.png" for i in part]
        yield EncodedRows(random.integers(0, NUM_CODES, (len(part), CODES)), captions, part, names)


def read(codes: CodesDataset) -> None:
    """Two shuffled passes, as training reads them."""
    order = BatchSampler(len(codes), BATCH, seed=0)
    random = np.random.default_rng(0)
    for step in range(2 * len(codes) // BATCH):
        rows = order.rows(step).tolist()
        codes.codes(rows)
        codes.captions(rows, random.random(len(rows)).tolist())


def batch_times(codes: CodesDataset, batches: int = 2000) -> np.ndarray:
    """Milliseconds of each of some random batches, codes and captions."""
    random = np.random.default_rng(1)
    times = []
    for _ in range(batches):
        rows = random.integers(0, len(codes), BATCH).tolist()
        start = time.perf_counter()
        codes.codes(rows)
        codes.captions(rows)
        times.append(1000 * (time.perf_counter() - start))
    return np.array(times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of codes (1,000,000)")
    parser.add_argument(
        "--folder",
        type=Path,
        help="where to write them for the time of the run (a temporary folder)",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        scratch = Path(name)
        settings = {
            "name": "memory",
            "output_dir": name,
            "data": {"source": "emoji"},
            "text": {"max_length": 48},
            "trackers": [],
        }
        experiment = load_values(settings, [])
        accelerator = make_accelerator(experiment.folder, [], experiment.process_timeout)
        opened: dict[int, dict[str, CodesDataset]] = {}

        def open_all(rows: int) -> None:
            opened[rows] = {
                split: CodesDataset(scratch / str(rows), split) for split in ("train", "held_out")
            }

        parts: dict[str, Callable[[int], object]] = {
            "writing": lambda rows: write(scratch / str(rows), rows, 10_000),
            "opening, with verification": open_all,
            "reading two shuffled passes, batches of 64": lambda rows: read(opened[rows]["train"]),
            "learning the captions, and their lengths": lambda rows: text_tokenizer(
                experiment, opened[rows], accelerator
            ),
        }
        print(
            f"{machine()}\n| what | rows | own memory grew by, MiB | resident memory, MiB | rows/s "
            "|\n|---|---|---|---|---|"
        )
        for what, part in parts.items():
            for rows in (SMALL, options.rows):
                start = time.perf_counter()
                with Growth() as growth:
                    part(rows)
                rate = rows / (time.perf_counter() - start) * (2 if "two" in what else 1)
                print(
                    f"| {what} | {rows:,} | {growth.own:.0f} | {growth.resident:.0f} | {rate:,.0f} "
                    "|",
                    flush=True,
                )
        size = sum(path.stat().st_size for path in (scratch / str(options.rows)).iterdir())
        times = batch_times(opened[options.rows]["train"])
        print(
            f"{size / MIB:.0f} MiB in files; a batch of {BATCH} random rows: median "
            f"{np.median(times):.2f} ms, 99% within "
            f"{np.quantile(times, 0.99):.2f} ms"
        )


if __name__ == "__main__":
    main()
