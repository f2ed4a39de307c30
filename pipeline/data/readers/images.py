"""One image file -> an RGB image of the wanted size. Knows formats, sizes and crops; knows no
captions."""

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
    return image, (height, width) if _is_sideways(image) else (width, height)


def upright_size(content: bytes) -> tuple[int, int]:
    """Width and height of an image's file when upright, without decoding it. Raises whatever Pillow
    does."""
    image = header(io.BytesIO(content))
    # Where a PNG's EXIF comes after its pixels, these would have to be decoded first.
    known = image.format != "PNG" or "exif" in image.info
    return image.size[::-1] if known and _is_sideways(image) else image.size


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


def _is_sideways(image: Image.Image) -> bool:
    """Whether EXIF turns it by a quarter."""
    try:
        return int(image.getexif().get(0x0112, 1)) in (5, 6, 7, 8)
    except Exception:  # a corrupted EXIF block; the pixels may be fine
        return False


def prepared(content: bytes, config: DataConfig) -> np.ndarray:
    """An image's file as RGB uint8 (H,W,3), shrunk to what training needs.

    That is its largest centred part of the shape of `image_size`, at that size. For random crops it
    is the whole image, just large enough that the smallest crop has `image_size` pixels. Raises
    what `open_image` does.
    """
    from stage1_tokenizer.pixels import resize_and_crop, to_rgb  # imports torch

    rows, columns = config.size
    # Twice the size leaves the antialiasing enough to work on.
    enough = 2 * math.ceil(max(config.size) / config.crop_scale)
    image = to_rgb(open_image(content, at_least=enough))
    if config.crop == "centre":
        return np.asarray(resize_and_crop(image, (columns, rows)))
    # The side that limits the size of a crop, and what it must be.
    width, height = image.size
    own, goal = (height, rows) if height * columns <= width * rows else (width, columns)
    target = max(goal, min(own, math.ceil(goal / config.crop_scale)))
    if own != target:
        wide = max(columns, round(width * target / own))
        high = max(rows, round(height * target / own))
        image = image.resize((wide, high), Image.Resampling.BICUBIC, reducing_gap=2.0)
    return np.asarray(image)


def crop_of(image: np.ndarray, config: DataConfig, draw: int | None) -> np.ndarray:
    """The part of a prepared image that is seen: centred, or chosen by `draw` where the
    configuration varies it."""
    if draw is None or not config.varies:
        return centre_crop(image, config.size)
    return random_crop(
        image, config.size, crop=config.crop == "random", flip=config.flip, draw=draw
    )


def centre_crop(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The largest centred part of (H,W,3) that has the shape of `size` (height, width), at that
    size."""
    height, width = image.shape[:2]
    part = _largest_part(height, width, size)
    return _resized(image, (height - part[0]) // 2, (width - part[1]) // 2, part, size)


def random_crop(
    image: np.ndarray, size: tuple[int, int], *, crop: bool, flip: bool, draw: int
) -> np.ndarray:
    """A random part of (H,W,3) that has the shape of `size` (height, width), at that size, mirrored
    or not: a function of `draw`."""
    random = np.random.default_rng(draw)
    height, width = image.shape[:2]
    if crop:
        high, wide = _largest_part(height, width, size)
        if high > size[0]:
            high = int(random.integers(size[0], high + 1))
            wide = min(wide, round(high * size[1] / size[0]))
        top = int(random.integers(0, height - high + 1))
        left = int(random.integers(0, width - wide + 1))
        image = _resized(image, top, left, (high, wide), size)
    else:
        image = centre_crop(image, size)
    return image[:, ::-1] if flip and random.integers(2) else image


def _largest_part(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the largest part of an image that has the shape of `size`."""
    if height * size[1] <= width * size[0]:
        return height, min(width, max(round(height * size[1] / size[0]), 1))
    return min(height, max(round(width * size[0] / size[1]), 1)), width


def _resized(
    image: np.ndarray, top: int, left: int, part: tuple[int, int], size: tuple[int, int]
) -> np.ndarray:
    """A part of an image, of a height and a width, at another height and width."""
    pixels = image[top : top + part[0], left : left + part[1]]
    if part == size:
        return pixels
    return np.asarray(
        Image.fromarray(np.ascontiguousarray(pixels)).resize(size[::-1], Image.Resampling.BICUBIC)
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
