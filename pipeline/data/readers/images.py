"""One image file -> a square RGB image. Knows formats, sizes and crops; knows no captions."""

from __future__ import annotations

import io
import math
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.config.data import DataConfig

ImageFile = str | Path | BinaryIO
EXTENSIONS = (
    ".png",
    ".jpg",
    ".jpeg",
    ".jfif",
    ".jpe",
    ".webp",
    ".avif",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
)
UNREAD = (
    ".heic",
    ".heif",
    ".jxl",
    ".jp2",
    ".svg",
    ".psd",
    ".ico",
    ".tga",
    ".raw",
    ".dng",
    ".cr2",
    ".nef",
    ".arw",
    ".eps",
    ".pdf",
)
"""Images of kinds that are not read."""
_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "DIB", "GIF", "TIFF")
"""Pillow's names of the formats that are read, whatever a file's name is. EPS and others for which
Pillow starts other programs are not among them."""
LARGEST = 89_478_485
"""Most pixels of an image. A small file can declare so many that they fill the memory."""

# Images that are too large are refused below. Pillow's warnings cannot be caught where several
# threads read.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def open_image(source: ImageFile | bytes, *, at_least: int | None = None) -> Image.Image:
    """A decoded image from a path, a file object or a file's bytes; of several frames the first.

    Args:
        at_least: a sufficient shorter side, in pixels. JPEGs are decoded at a half, a quarter or an
            eighth of their size where that leaves so many.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read; says why.
    """
    return _opened(source, at_least)[0]


def open_8_bit(path: Path) -> Image.Image:
    """A decoded image of no more than 8 bits per value. Of more, Pillow drops half where there are
    colours.

    Raises:
        FileNotFoundError, ValueError: as `open_image`, or it has 16 bits per value.
    """
    image = open_image(path)
    # Which bits the file has is known before it is decoded, and not any more after.
    with header(path) as undecoded:
        if any("16" in str(tile[3]) for tile in getattr(undecoded, "tile", ())):
            raise ValueError(
                f"{path} has 16 bits per value, and only 8 can be read exactly; convert it first"
            )
    return image


def open_for_judging(content: bytes, at_least: int) -> tuple[Image.Image, tuple[int, int]]:
    """An image's file, decoded as small as `at_least` allows (see `open_image`), and its full
    width and height when upright."""
    image, (width, height) = _opened(content, at_least)
    sideways = _orientation(image) in (5, 6, 7, 8)
    return image, (height, width) if sideways else (width, height)


def header(source: ImageFile) -> Image.Image:
    """An undecoded image from a path or a file object. Raises whatever Pillow does."""
    Image.init()  # registers the formats, once
    return Image.open(source, formats=[name for name in _FORMATS if name in Image.OPEN])


def _opened(source: ImageFile | bytes, at_least: int | None) -> tuple[Image.Image, tuple[int, int]]:
    name = "it" if isinstance(source, bytes) else source
    try:
        image = header(io.BytesIO(source) if isinstance(source, bytes) else source)
        size = image.size
        if size[0] * size[1] > LARGEST:
            raise ValueError(
                f"it declares {size[0]}x{size[1]} pixels; at most {LARGEST:,} are read"
            )
        if at_least is not None:
            reduced = at_least / min(size)
            image.draft("RGB", (math.ceil(size[0] * reduced), math.ceil(size[1] * reduced)))
        image.load()
        return image, size
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no image {name}") from None
    except MemoryError:
        raise
    except Exception as error:
        # Pillow's readers raise many kinds for a corrupted file, even struct.error and IndexError.
        why = "it is of no known format" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{name} cannot be read as an image ({why})") from error


def frames(image: Image.Image) -> int:
    """How many frames an image has. Those after the first are not used and may be corrupted."""
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception:
        return 1


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # a corrupted EXIF block; the pixels may be fine
        return 1


def prepared(content: bytes, config: DataConfig) -> np.ndarray:
    """An image's file as RGB uint8 (H,W,3), shrunk to what training needs.

    That is its largest centred square at `image_size`. For random crops it is the whole image, just
    large enough that the smallest crop has `image_size` pixels. Raises what `open_image` does.
    """
    from stage1_tokenizer.pixels import resize_and_crop, to_rgb  # imports torch

    size = config.image_size
    wanted = math.ceil(size / config.crop_scale)
    # Twice the size leaves the antialiasing enough to work on.
    image = to_rgb(open_image(content, at_least=2 * wanted))
    if config.crop == "centre":
        return np.asarray(resize_and_crop(image, size))
    shorter = min(image.size)
    target = max(size, min(shorter, wanted))
    if shorter != target:
        width, height = (max(target, round(side * target / shorter)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0)
    return np.asarray(image)


def square_of(image: np.ndarray, config: DataConfig, draw: int | None) -> np.ndarray:
    """The square of a prepared image: centred, or chosen by `draw` where the configuration varies
    it."""
    if draw is None or not config.varies:
        return centre_square(image, config.image_size)
    return random_square(
        image, config.image_size, crop=config.crop == "random", flip=config.flip, draw=draw
    )


def centre_square(image: np.ndarray, size: int) -> np.ndarray:
    """The largest centred square of (H,W,3) at `size` pixels."""
    height, width = image.shape[:2]
    side = min(height, width)
    return _resized(image, (height - side) // 2, (width - side) // 2, side, size)


def random_square(image: np.ndarray, size: int, *, crop: bool, flip: bool, draw: int) -> np.ndarray:
    """A random square of (H,W,3) at `size` pixels, mirrored or not: a function of `draw`."""
    random = np.random.default_rng(draw)
    height, width = image.shape[:2]
    shorter = min(height, width)
    if crop:
        side = int(random.integers(size, shorter + 1)) if shorter > size else shorter
        top = int(random.integers(0, height - side + 1))
        left = int(random.integers(0, width - side + 1))
        image = _resized(image, top, left, side, size)
    else:
        image = centre_square(image, size)
    return image[:, ::-1] if flip and random.integers(2) else image


def _resized(image: np.ndarray, top: int, left: int, side: int, size: int) -> np.ndarray:
    part = image[top : top + side, left : left + side]
    if side == size:
        return part
    return np.asarray(
        Image.fromarray(np.ascontiguousarray(part)).resize((size, size), Image.Resampling.BICUBIC)
    )


def random_shift(
    images: np.ndarray, rows: list[int], view: int, shift: int, seed: int, flip: bool = False
) -> np.ndarray:
    """Images (B,H,W,3) moved by up to `shift` pixels along each axis, with the border repeated into
    the gap. `flip` mirrors half of them."""
    padded = np.pad(images, ((0, 0), (shift, shift), (shift, shift), (0, 0)), mode="edge")
    height, width = images.shape[1:3]
    moved = np.empty_like(images)
    for i, row in enumerate(rows):
        random = np.random.default_rng([seed, row, view])
        dy, dx = random.integers(0, 2 * shift + 1, size=2)
        moved[i] = padded[i, dy : dy + height, dx : dx + width]
        if flip and random.integers(2):
            moved[i] = moved[i, :, ::-1].copy()
    return moved
