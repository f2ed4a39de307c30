"""The work of `minidalle likelihood`: image files to a table, JSON and surprise maps. Knows
folders; computes no likelihood itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline.data.readers.images import open_8_bit
from pipeline.inference.editing import check_image
from pipeline.inference.likelihood import check_mode
from pipeline.inference.pipeline import TextToImagePipeline
from pipeline.likelihood.estimate import Bound, ImageLikelihood, Method
from pipeline.likelihood.surprise import Surprise
from pipeline.runtime.atomic_io import atomic_write_text, check_folder, short_stem, writing_images
from pipeline.runtime.heat_map import beside_heat_maps
from stage1_tokenizer.pixels import image_array

_MEANING: dict[Bound, str] = {
    "description_length": "description length, -log p(image|codes) - log p(codes|caption), no less "
    "than -log p(image|caption)",
    "elbo": "negative ELBO by one sample of the posterior; its mean is no less than "
    "-log p(image|caption)",
    "importance_weighted": "importance-weighted bound of {k} samples of the posterior; its mean is "
    "no less than -log p(image|caption). distortion and rate sum to the negative ELBO",
    "naive": "Monte Carlo by {k} samples of the prior; its mean is no less than "
    "-log p(image|caption), and far above it where few samples explain the image",
}
"""What `nats` are, by the bound."""


def likelihood_report(
    bundle: str | Path,
    files: Sequence[Path],
    prompts: Sequence[str] = (),
    out: Path | None = None,
    *,
    num_samples: int = 1,
    method: Method = "bound",
    seed: int = 0,
    batch_size: int = 64,
    truncate: bool = False,
) -> str:
    """How likely each file's image is: a table. With `out`, also `likelihood.json` and a surprise
    map of each image in that folder.

    The parameters are nine because each is an option of the command line.

    Args:
        prompts: one per file, or one for all; without any, images have no caption.
        out: folder; nothing is written without it.
        num_samples, method, seed, batch_size, truncate: as `TextToImagePipeline.likelihood`.

    Raises:
        ValueError: there is no file, a file is no image of the bundle's size and of 8-bit RGB
            pixels, or what `TextToImagePipeline.likelihood` raises; nothing is written then.
        FileNotFoundError: a file or the bundle is not there.
        NotADirectoryError: `out` is a file.
    """
    if not files:
        raise ValueError("no image was given; give at least one file")
    if out is not None:
        check_folder(out, "surprise maps")
    pipe = TextToImagePipeline.from_pretrained(bundle)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    own = pipe.tokenizer.own_config
    images = []
    for file in files:
        image = open_8_bit(file)
        check_mode(image, own.channels, str(file))
        images.append(check_image(image, own.size, own.channels, str(file)))
    captions = list(prompts or [""])
    captions = captions * len(files) if len(captions) == 1 else captions
    found = pipe.likelihood(
        images,
        captions,
        num_samples=num_samples,
        method=method,
        seed=seed,
        batch_size=batch_size,
        truncate=truncate,
    )
    if out is not None:
        parts = [slice(first, first + batch_size) for first in range(0, len(files), batch_size)]
        maps = [
            one
            for part in parts
            for one in pipe.surprise(images[part], captions[part], seed=seed, truncate=truncate)
        ]
        _write(out, files, captions, images, found, maps, seed)
    return table([str(file) for file in files], found)


def table(names: Sequence[str], found: ImageLikelihood) -> str:
    """A line per image, the mean where there are several, and what `nats` are."""
    columns = {"nats": found.nats, "bits/dim": found.bits_per_dimension}
    if found.distortion is not None and found.rate is not None:
        columns |= {"distortion": found.distortion, "rate": found.rate}
    width = max(map(len, [*names, "mean"]))
    lines = [" ".join([f"{'':{width}}", *(f"{name:>11}" for name in columns)])]
    values = [
        list(row) for row in zip(*(column.tolist() for column in columns.values()), strict=True)
    ]
    rows = list(zip(names, values, strict=True))
    if len(names) > 1:
        rows.append(("mean", [float(column.mean()) for column in columns.values()]))
    for name, row in rows:
        cells = [
            f"{value:>11,.3f}" if column == "bits/dim" else f"{value:>11,.1f}"
            for column, value in zip(columns, row, strict=True)
        ]
        lines.append(" ".join([f"{name:{width}}", *cells]))
    meaning = _MEANING[found.bound].format(k=found.num_samples)
    return "\n".join([*lines, f"nats per image: {meaning}"])


def _write(
    out: Path,
    files: Sequence[Path],
    captions: Sequence[str],
    images: Sequence[Image.Image],
    found: ImageLikelihood,
    maps: Sequence[Surprise],
    seed: int,
) -> None:
    """The JSON and the surprise maps. A parameter per thing that is written."""
    rows: list[dict[str, object]] = []
    with writing_images(out, len(files)) as written:
        for i, file in enumerate(files):
            name = f"{i:05d}-{short_stem(file)}.png"
            written.save(name, surprise_map(image_array(images[i]), maps[i]))
            row: dict[str, object] = {"file": str(file), "prompt": captions[i]}
            row["surprise_map"] = name
            row["nats"] = float(found.nats[i])
            row["bits_per_dimension"] = float(found.bits_per_dimension[i])
            if found.distortion is not None and found.rate is not None:
                row["distortion"] = float(found.distortion[i])
                row["rate"] = float(found.rate[i])
            rows.append(row)
        content = {
            "bound": found.bound,
            "num_samples": found.num_samples,
            "seed": seed,
            "dimensions": found.dimensions,
            "images": rows,
        }
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        atomic_write_text(out / "likelihood.json", text)


def surprise_map(image: np.ndarray, surprise: Surprise) -> Image.Image:
    """An image (H,W,C) beside heat maps of its bits per code, a map per level, and per pixel."""
    names = [f"bits per code, level {i}" for i in range(1, len(surprise.codes) + 1)]
    if len(names) == 1:
        names = ["bits per code"]
    grids = [np.asarray(codes) for codes in surprise.codes]
    maps = list(zip(names, grids, strict=True))
    total = float(sum(codes.sum() for codes in surprise.codes))
    bits = float(surprise.pixels.sum())
    return beside_heat_maps(
        image,
        f"codes {total:,.0f} + pixels {bits:,.0f} bits" if surprise.codes else f"{bits:,.0f} bits",
        [*maps, ("bits per pixel", np.asarray(surprise.pixels))],
    )
