"""Bytes per held-out image, compressed without loss: ours against PNG, WebP and JPEG XL.

    python -m benchmarks.compression --config configs/compression.yaml
        [--bundle runs/compression/bundle] [--limit 20] [--prompts] [--out FILE.json]

Ours is the file of `minidalle compress`, header included, and each image is decompressed and
compared. PNG is Pillow's with optimize=True. WebP is lossless, with method 6, quality 100 and exact
colours. JPEG XL is `cjxl -d 0 -e 9` (Debian: apt-get install libjxl-tools), and is left out where
there is none. A ratio is one of sums over all images. Its 95% interval is by the bootstrap over
images.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from benchmarks.timing import machine
from pipeline import TextToImagePipeline
from pipeline.config.load import load_experiment
from pipeline.data.load import load_source
from pipeline.likelihood.compression import CompressedImage, compress, decompress

RESAMPLES = 10_000


def pillow_size(image: Image.Image, format: str, **options: object) -> int:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return len(buffer.getvalue())


def png_size(image: Image.Image) -> int:
    return pillow_size(image, "PNG", optimize=True)


def webp_size(image: Image.Image) -> int:
    return pillow_size(image, "WEBP", lossless=True, method=6, quality=100, exact=True)


def jpeg_xl_size(image: Image.Image) -> int:
    with tempfile.TemporaryDirectory() as folder:
        original = Path(folder, "image.png")
        compressed = Path(folder, "image.jxl")
        image.save(original)
        command = ["cjxl", "-d", "0", "-e", "9", str(original), str(compressed)]
        subprocess.run(command, check=True, capture_output=True)
        return compressed.stat().st_size


def peers() -> dict[str, Callable[[Image.Image], int]]:
    known = {"PNG": png_size, "WebP": webp_size}
    if shutil.which("cjxl"):
        return known | {"JPEG XL": jpeg_xl_size}
    print("JPEG XL is left out: cjxl is not installed (Debian: apt-get install libjxl-tools)")
    return known


def ratio_interval(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """95% interval of sum(ours) / sum(theirs), by the bootstrap over images (Efron 1979)."""
    rows = np.random.default_rng(0).integers(0, len(ours), (RESAMPLES, len(ours)))
    low, high = np.quantile(ours[rows].sum(1) / theirs[rows].sum(1), [0.025, 0.975])
    return float(low), float(high)


def compressed_and_checked(
    pipe: TextToImagePipeline, image: Image.Image, prompt: str
) -> CompressedImage:
    """The image compressed by the bundle.

    Raises:
        AssertionError: another image comes back.
    """
    models = (pipe.tokenizer, pipe.prior, pipe.text)
    in_bf16 = bool(pipe.trained_on.get("codes_in_bf16", False))
    compressed = compress(*models, image, prompt, codes_in_bf16=in_bf16)
    received = decompress(*models, compressed.data).image
    assert np.array_equal(np.asarray(received), np.asarray(image)), "another image came back"
    return compressed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--bundle", type=Path, help="default: that of the configuration's run")
    parser.add_argument("--limit", type=int, help="the first N held-out images (all)")
    parser.add_argument("--prompts", action="store_true", help="compress with captions as prompts")
    parser.add_argument("--out", type=Path, help="writes the numbers as JSON")
    options = parser.parse_args()
    experiment = load_experiment(["--config", options.config])
    pipe = TextToImagePipeline.from_pretrained(options.bundle or experiment.folder / "bundle")
    source = load_source(experiment.data, "held_out", experiment.folder / "data")
    numbers = range(min(len(source), options.limit or len(source)))
    images = [Image.fromarray(image) for image in source.images(numbers)]
    prompts = source.captions(numbers) if options.prompts else [""] * len(images)
    sizes = {
        name: np.array([size(image) for image in images], dtype=float)
        for name, size in peers().items()
    }
    ours = [
        compressed_and_checked(pipe, image, prompt)
        for image, prompt in tqdm(list(zip(images, prompts, strict=True)), "compressing")
    ]
    report(ours, sizes, options.out)


def report(ours: list[CompressedImage], sizes: dict[str, np.ndarray], out: Path | None) -> None:
    """Prints a table; writes the same numbers to `out`.

    Args:
        sizes: bytes of each image by each peer.
    """
    dimensions = ours[0].image.width * ours[0].image.height * 3
    bytes_of_ours = np.array([len(one.data) for one in ours], dtype=float)
    rate = float(np.mean([one.rate_bits for one in ours]))
    distortion = float(np.mean([one.distortion_bits for one in ours]))
    excess = float(np.mean([8 * len(one.data) - one.claimed_bits for one in ours]))
    print(f"{len(ours)} images, every one came back bit for bit; {machine()}")
    print(
        f"ours: {rate:,.0f} bits for codes, {distortion:,.0f} for pixels, {excess:,.0f} for header,"
        " prompt and rounding"
    )
    rows = {}
    for name, size in ({"ours": bytes_of_ours} | sizes).items():
        rows[name] = row = {
            "bytes": float(size.mean()),
            "bits_per_dimension": float(8 * size.mean() / dimensions),
            "ours_to_it": float(bytes_of_ours.sum() / size.sum()),
            "interval": ratio_interval(bytes_of_ours, size),
            "ours_is_smaller": float((bytes_of_ours < size).mean()),
        }
        print(
            "  {name:<8} {bytes:7,.0f} bytes, {bits_per_dimension:.3f} bits per dimension; ours is "
            "{ours_to_it:.3f} of it [{interval[0]:.3f}, {interval[1]:.3f}], and smaller for "
            "{ours_is_smaller:.1%} of the images".format(name=name, **row)
        )
    if out is not None:
        bits = {"rate_bits": rate, "distortion_bits": distortion, "excess_bits": excess}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"images": len(ours), **bits, "sides": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
