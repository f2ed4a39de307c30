"""Speed of `minidalle doctor` on images of 256x256, and of its search for near duplicates.

    python -m benchmarks.doctor [--images 10000] [--looks 1000000] [--out FILE]

Images are JPEGs of smooth colours with noise, of about 25 KB, in a temporary folder. Everything
that the command does is timed, the HTML report included; the interpreter's start is not.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.cli.main import main
from pipeline.doctor.near_duplicates import alike, groups_of

_SIDE = 256
_NOISE = 15
_WORDS = (
    "red",
    "green",
    "blue",
    "bright",
    "dark",
    "field",
    "sky",
    "house",
    "river",
    "stone",
    "morning",
    "evening",
    "cat",
    "dog",
    "tree",
)


def make_images(folder: Path, count: int) -> float:
    """Writes NAME.jpg and NAME.txt; returns the mean size of an image in KB."""
    random = np.random.default_rng(0)
    written = 0
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(
            (_SIDE, _SIDE), Image.Resampling.BICUBIC
        )
        noisy = np.asarray(coarse, np.float32) + random.normal(0, _NOISE, (_SIDE, _SIDE, 3)).astype(
            np.float32
        )
        path = folder / f"{number:06}.jpg"
        Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(path, quality=85)
        path.with_suffix(".txt").write_text(" ".join(random.choice(_WORDS, 6)))
        written += path.stat().st_size
    return written / count / 1000


def search(looks: int) -> tuple[float, int]:
    """Seconds that the search among random looks takes, and how many of 1,000 changed copies among
    them it finds."""
    random = np.random.default_rng(0)
    values = random.integers(0, 2**64, looks, dtype=np.uint64)
    copies = min(1000, looks // 2)
    flipped = np.uint64(1) << random.integers(0, 64, (4, copies), dtype=np.uint64)
    values[-copies:] = values[:copies] ^ np.bitwise_xor.reduce(flipped)
    start = time.perf_counter()
    labels = alike(values)
    groups_of(labels)
    return time.perf_counter() - start, int((labels[:copies] == labels[-copies:]).sum())


def run(images: int, looks: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "images"
        folder.mkdir()
        size = make_images(folder, images)
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            status = main(
                [
                    "doctor",
                    str(folder),
                    "--out",
                    str(Path(temporary) / "report"),
                    "--output_dir",
                    str(Path(temporary) / "runs"),
                ]
            )
        seconds = time.perf_counter() - start
    assert status == 0, "the benchmark's own images must be fit to train on"
    search_seconds, found = search(looks)
    return {
        "images": images,
        "KB per image": round(size, 1),
        "seconds": round(seconds, 2),
        "images per second": round(images / seconds),
        "looks": looks,
        "seconds of the search": round(search_seconds, 1),
        "of 1,000 changed copies found": found,
    }


if __name__ == "__main__":
    reader = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    reader.add_argument("--images", type=int, default=10_000)
    reader.add_argument("--looks", type=int, default=1_000_000)
    reader.add_argument("--out", type=Path, help="JSON file for the metrics")
    options = reader.parse_args()
    metrics = run(options.images, options.looks)
    print(json.dumps(metrics, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(metrics, indent=1) + "\n")
