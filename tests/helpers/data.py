"""Small data of every layout for the tests."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.config.data import DataConfig, FilterOptions, StreamOptions


def config(source: object, **options: Any) -> DataConfig:
    """Small images; `filter` and `stream` are given as dictionaries."""
    for section, kind in (("filter", FilterOptions), ("stream", StreamOptions)):
        if section in options:
            options[section] = kind(**options[section])
    return DataConfig(**{"source": str(source), "image_size": 16, "val_fraction": 0.3, **options})


def encoded(
    colour: object = (200, 30, 40),
    size: tuple[int, int] = (20, 20),
    form: str = "PNG",
    **options: object,
) -> bytes:
    """A plain image as a file's bytes."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, form, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def photo(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A smooth random image."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> None:
    """A webdataset shard of (key, extension -> content)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for extension, content in members.items():
                entry = tarfile.TarInfo(f"{key}.{extension}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def write_shards(folder: Path, counts: Iterable[int]) -> list[str]:
    """Shards of so many samples each; image and caption say the sample's number. Returns the
    captions in order."""
    number = 0
    captions = []
    for shard, count in enumerate(counts):
        samples = []
        for _ in range(count):
            captions.append(f"number {number}")
            samples.append(
                (
                    f"{number:05d}",
                    {
                        "png": encoded((number // 256, number % 256, 7)),
                        "txt": captions[-1].encode(),
                    },
                )
            )
            number += 1
        write_shard(folder / f"{shard:03d}.tar", samples)
    return captions


def number_of(image: np.ndarray) -> int:
    """The sample's number that `write_shards` painted."""
    return int(image[0, 0, 0]) * 256 + int(image[0, 0, 1])
