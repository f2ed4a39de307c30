"""One picture file -> a square RGB picture. Knows formats and sizes; knows no captions."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class TooSmall(ValueError):
    """A picture is smaller than asked for."""


def open_picture(source: Any) -> Image.Image:
    """A decoded picture from a path or file object.

    Raises:
        ValueError: it cannot be read; says why.
    """
    try:
        with warnings.catch_warnings():
            # A picture of absurd size is refused rather than warned about.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(source)
            image.load()
            return image
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no picture {source}") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError,
            Image.DecompressionBombWarning) as error:  # fmt: skip
        raise ValueError(f"{source} cannot be read as a picture ({error})") from error


def square(image: Image.Image, size: int, *, upscale: bool = False, name: str = "the picture") -> Image.Image:
    """Any picture as RGB, its largest centred square at `size` pixels.

    Raises:
        TooSmall: it is smaller than `size` and `upscale` is off.
    """
    from stage1_tokenizer.pixels import resize_and_crop, to_rgb

    if min(image.size) < size and not upscale:
        raise TooSmall(f"{name} is {image.width}x{image.height} and must be at least {size}x{size}; enlarge it, or set data.upscale=true")
    return resize_and_crop(to_rgb(image), size)


def read_picture(path: Path, size: int, *, upscale: bool = False) -> Image.Image:
    """A picture file as RGB at `size` pixels; see `open_picture` and `square` for what is raised."""
    return square(open_picture(path), size, upscale=upscale, name=str(path))
