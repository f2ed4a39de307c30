"""What `minidalle compress` and `decompress` do: an image file to a compressed file and back. Knows
files; the bits are made in pipeline/likelihood."""

from __future__ import annotations

from pathlib import Path

from pipeline.data.readers.images import open_8_bit
from pipeline.inference.pipeline import TextToImagePipeline
from pipeline.likelihood import compression
from pipeline.likelihood.compression import CompressedImage
from pipeline.runtime.atomic_io import atomic_write, atomic_write_png


def compress(bundle: str | Path, image: Path, out: Path, *, prompt: str = "") -> CompressedImage:
    """Compresses an image without loss by the models of a bundle, and writes it to `out`.

    Args:
        image: RGB of 8 bits, of the bundle's size; or RGBA, where its tokenizer has four channels.
        prompt: what the image shows; it may save bits, and costs its own bytes.

    Raises:
        ValueError: `out` is the image itself; the image cannot be read or would not come back as it
            is; or what `pipeline.likelihood.compression.compress` raises; nothing is written then.
        FileNotFoundError: there is no such image or bundle.
        IsADirectoryError: `out` is a folder.
    """
    if out.is_dir():
        raise IsADirectoryError(f"{out} is a folder; name a file in it for the compressed image")
    _refuse_overwriting(image, out)
    original = open_8_bit(image)
    pipe = TextToImagePipeline.from_pretrained(bundle)
    in_bf16 = bool(pipe.trained_on.get("codes_in_bf16", False))
    try:
        compressed = compression.compress(
            pipe.tokenizer, pipe.prior, pipe.text, original, prompt, codes_in_bf16=in_bf16
        )
    except ValueError as error:
        raise ValueError(f"{image}: {error}") from error
    with atomic_write(out) as beside:
        beside.write_bytes(compressed.data)
    return compressed


def decompress(bundle: str | Path, file: Path, out: Path) -> CompressedImage:
    """Writes the image that `compress` made a file of, as PNG.

    Raises:
        ValueError: `out` has another suffix than .png or is the file itself, or what
            `pipeline.likelihood.compression.decompress` raises; nothing is written then.
        FileNotFoundError: there is no such file or bundle.
    """
    if out.suffix.lower() != ".png":
        raise ValueError(f"the image is written as PNG, and {out} has another suffix; name it .png")
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no file {file}; give one that `minidalle compress` wrote"
        )
    _refuse_overwriting(file, out)
    pipe = TextToImagePipeline.from_pretrained(bundle)
    try:
        compressed = compression.decompress(
            pipe.tokenizer, pipe.prior, pipe.text, file.read_bytes()
        )
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    atomic_write_png(out, compressed.image)
    return compressed


def _refuse_overwriting(file: Path, out: Path) -> None:
    """Raises ValueError where the result would take the place of what it is made from."""
    if out.resolve() == file.resolve():
        raise ValueError(f"{out} is the file to read, and would be overwritten; write to another")
