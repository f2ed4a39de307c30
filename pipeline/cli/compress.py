"""The commands of lossless compression: compress, decompress. Compute nothing themselves."""

from __future__ import annotations

from pathlib import Path

import pipeline
from pipeline.cli.log import print_rank0
from pipeline.cli.options import UsageError


def compress_command(image: tuple[Path, ...], *, bundle: str, out: Path, prompt: str = "") -> None:
    """Compresses an image without loss: its codes by the prior, its pixels by the decoder.

    Args:
        image: an image of 8 bits, of the bundle's size and channels
        bundle: folder of a bundle, or user/name of the Hub, best with a tokenizer of likelihood
            discretized_logistic
        out: file for the compressed image
        prompt: what the image shows; it is stored, and makes the codes cheaper
    """
    compressed = pipeline.compress(bundle, _only(image, "image"), out, prompt=prompt)
    print_rank0(
        f"wrote {out}: {len(compressed.data):,} bytes, {compressed.bits_per_dimension:.3f} bits "
        f"per dimension\n"
        f"claimed: {compressed.claimed_bits:,.0f} bits, {compressed.rate_bits:,.0f} for the codes "
        f"and {compressed.distortion_bits:,.0f} for the pixels; coded in {compressed.coded_bits:,}"
    )


def decompress_command(file: tuple[Path, ...], *, bundle: str, out: Path) -> None:
    """Writes the image of a compressed file.

    Args:
        file: what `minidalle compress` wrote
        bundle: the bundle that it was compressed with
        out: file for the image, a PNG
    """
    compressed = pipeline.decompress(bundle, _only(file, "file"), out)
    image = compressed.image
    print_rank0(
        f"wrote {out}: {image.width}x{image.height} from {len(compressed.data):,} bytes, "
        f"{compressed.bits_per_dimension:.3f} bits per dimension; claimed: "
        f"{compressed.claimed_bits:,.0f} bits"
        f"{f'; prompt: {compressed.prompt}' if compressed.prompt else ''}"
    )


def _only(paths: tuple[Path, ...], what: str) -> Path:
    if len(paths) != 1:
        raise UsageError(f"{len(paths)} {what}s were given; give one")
    return paths[0]
