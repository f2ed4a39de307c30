"""One image file -> an image of the wanted size and channels. Knows formats, sizes and crops; knows
no captions."""

from __future__ import annotations

import io
import logging
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

import numpy as np
from PIL import Image, ImageOps, JpegImagePlugin, UnidentifiedImageError

from pipeline.config.data import MAX_PIXELS, DataConfig, background
from pipeline.data.readers.deep import Depth, deep_values, depth_of, extremes, mode_of, shown
from pipeline.data.readers.files import MAX_IMAGE_BYTES, TooLarge, read_file
from pipeline.data.readers.memory import BYTES_PER_PIXEL, DECODING
from pipeline.runtime.log import on_main_process

if TYPE_CHECKING:
    from stage1_tokenizer.value_range import ValueRange

_log = logging.getLogger(__name__)
_log.addFilter(on_main_process)
_laid_on_background: list[bool] = []
"""Whether this process has said that transparency is laid on a background."""

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
_ORIENTATION = 0x0112
"""The EXIF tag that says how to turn an image."""
_SIDEWAYS = (5, 6, 7, 8)
"""Orientations that turn it by a quarter."""


@dataclass(frozen=True)
class Decoded:
    """An image of a file.

    Attributes:
        image: with at most 8 bits per value, perhaps reduced, as it lies in the file.
        width, height: of the file's image, upright, in pixels.
        shrinks: whether it can be decoded at a part of its size (see `pixels_decoded`).
        mode: Pillow's, with `;16` for 16-bit colour.
        animated: whether there are several frames.
        depth: of the file's values.
        low, high: the smallest and largest value of more than 8 bits; 0 and 255 otherwise.
    """

    image: Image.Image
    width: int
    height: int
    shrinks: bool
    mode: str
    animated: bool
    depth: Depth
    low: float
    high: float


def open_image(
    source: ImageFile | bytes, *, at_least: int | None = None, most: int = MAX_PIXELS
) -> Image.Image:
    """A decoded image from a path, a file object or a file's bytes; of several frames the first.

    Args:
        at_least: a sufficient shorter side, in pixels. JPEGs are decoded at a half, a quarter or an
            eighth of their size where that leaves so many.
        most: pixels of an image.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or has more than 8 bits per value whose range is in doubt;
            says why.
    """
    name = "it" if isinstance(source, bytes) else str(source)
    try:
        content = source if isinstance(source, bytes) else _content(source)
        image = _undecoded(content)
        size = image.size
        _check_size(image, at_least, most, "scale it down first")
        return _decoded(content, image, size, None).image
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no image {name}; give the path of a file") from None
    except ValueError as error:
        text = str(error)
        raise ValueError(name + text[2:] if text.startswith("it ") else text) from error


def open_8_bit(path: Path) -> Image.Image:
    """A decoded image of no more than 8 bits per value.

    Raises:
        FileNotFoundError, ValueError: as `open_image`, or it has more bits per value.
    """
    try:
        image: Image.Image | None = _undecoded(_content(path))
    except (OSError, ValueError):
        image = None  # `open_image` says what is wrong
    if image is not None and depth_of(image) != "8bit":
        bits = "16" if "16" in mode_of(image) else "more than 8"
        raise ValueError(
            f"{path} has {bits} bits per value, and only 8 can be read exactly; convert it first"
        )
    return open_image(path)


@contextmanager
def decoded(
    content: bytes,
    at_least: int,
    most: int = MAX_PIXELS,
    value_range: ValueRange | Literal["own"] | None = None,
) -> Iterator[Decoded]:
    """An image's file, decoded as small as `at_least` allows (see `open_image`). While the block
    runs, its memory counts against that of all threads (`memory.DECODING`).

    Args:
        most: pixels of an image.
        value_range: the values of more than 8 bits that become black and white; `own` takes the
            image's smallest and largest. None where there is no doubt.

    Raises:
        TooLarge: it has more pixels.
        ValueError: it cannot be read; says why.
    """
    image = _undecoded(content)
    size = image.size
    pixels = _check_size(image, at_least, most)
    with DECODING.taken(pixels * BYTES_PER_PIXEL):
        yield _decoded(content, image, size, value_range)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an image when upright; it may be undecoded."""
    # Where a PNG's EXIF comes after its pixels, these would have to be decoded first. The size of a
    # TIFF is upright before it is decoded.
    known = image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info)
    return image.size[::-1] if known and _orientation(image) in _SIDEWAYS else image.size


def header(file: BinaryIO) -> Image.Image:
    """An undecoded image from a file object. Raises whatever Pillow does.

    Not by `Image.open`, which refuses images of many pixels before it is known at which size they
    are decoded.
    """
    Image.init()  # registers the formats, once
    prefix = file.read(16)
    for name in _FORMATS:
        factory, accept = Image.OPEN.get(name, (None, None))
        if factory is None or (accept is not None and accept(prefix) is not True):
            continue
        file.seek(0)
        with suppress(SyntaxError, IndexError, TypeError, struct.error):  # as `Image.open` does
            return factory(file, "")
    raise UnidentifiedImageError("it is of no known format")


def _content(source: ImageFile) -> bytes:
    if isinstance(source, str | Path):
        return read_file(source, MAX_IMAGE_BYTES)
    return source.read()


def _undecoded(content: bytes) -> Image.Image:
    try:
        return header(io.BytesIO(content))
    except Exception as error:
        raise _unreadable(error) from error


def _unreadable(error: Exception) -> Exception:
    """How to report an error of Pillow's readers. They raise many kinds for a corrupted file,
    even struct.error and IndexError."""
    if isinstance(error, MemoryError | TooLarge):
        return error
    why = "it is of no known format" if isinstance(error, UnidentifiedImageError) else error
    return ValueError(f"it cannot be read as an image ({why})")


def shrinks(image: Image.Image) -> bool:
    """Whether an image that is not yet decoded can be decoded at a part of its size."""
    # Progressive JPEGs are kept whole while they are decoded.
    return isinstance(image, JpegImagePlugin.JpegImageFile) and not image.info.get("progressive")


def pixels_decoded(
    width: int | np.ndarray, height: int | np.ndarray, shrinks: bool | np.ndarray, at_least: int
) -> np.ndarray:
    """Pixels of images of these sizes when they are decoded as small as `at_least` allows, as in
    `decoded`: those that shrink, at a half, a quarter or an eighth of their sides."""
    sides = np.maximum(np.array([width, height], np.int64), 1)
    # As Pillow chooses for the size that `_check_size` gives to `draft`
    scale = (sides // np.ceil(sides * (at_least / sides.min(0)))).min(0)
    part = np.where(shrinks, np.select([scale >= 8, scale >= 4, scale >= 2], [8, 4, 2], 1), 1)
    return np.ceil(sides / part).prod(0)


def enough(config: DataConfig) -> int:
    """Shorter side, in pixels, at which training decodes an image: twice what it needs leaves the
    antialiasing enough to work on."""
    return 2 * math.ceil(max(config.size) / config.crop_scale)


def _check_size(
    image: Image.Image, at_least: int | None, most: int, remedy: str = "raise data.max_pixels"
) -> int:
    """Prepares an image to be decoded as small as `at_least` allows; returns its pixels then.
    Raises TooLarge where they are more than `most`."""
    width, height = image.size
    pixels = width * height
    if at_least is not None:
        reduced = at_least / min(width, height)
        image.draft("RGB", (math.ceil(width * reduced), math.ceil(height * reduced)))
        pixels = int(pixels_decoded(width, height, shrinks(image), at_least))
    if pixels > most:
        raise TooLarge(
            f"it has {width}x{height} pixels, and at most {most:,} are decoded; {remedy}"
        )
    return pixels


def _decoded(
    content: bytes,
    image: Image.Image,
    size: tuple[int, int],
    value_range: ValueRange | Literal["own"] | None,
) -> Decoded:
    """Decodes an image that is opened. `size` is that of the file."""
    width, height = size
    shrunk = shrinks(image)
    depth = depth_of(image)
    mode = mode_of(image)
    animated = is_animated(image)
    low, high = 0.0, 255.0
    try:
        if depth == "8bit":
            image.load()
        else:
            values = deep_values(image, lambda: _undecoded(content))
            low, high = extremes(values)
    except Exception as error:
        raise _unreadable(error) from error
    orientation = _orientation(image)
    if depth != "8bit":
        image.close()  # its values have been copied
        if value_range == "own":
            value_range = (low, max(high, low + 1e-6))
        image = shown(values, value_range or _certain_range(low, high, depth, mode))
        if orientation != 1:
            exif = Image.Exif()
            exif[_ORIENTATION] = orientation
            image.info["exif"] = exif.tobytes()
    if orientation in _SIDEWAYS:
        width, height = height, width
    return Decoded(image, width, height, shrunk, mode, animated, depth, low, high)


def _certain_range(low: float, high: float, depth: Depth, mode: str) -> ValueRange:
    """The range of one image's values that its type leaves no doubt of."""
    from stage1_tokenizer.value_range import NAMED_RANGES, possible_ranges  # imports torch

    ranges = possible_ranges(low, high, floats=depth == "floats")
    if ranges not in (["16bit"], ["8bit"]):
        raise ValueError(
            f"it has mode {mode} and values from {low:g} to {high:g}, and which of them is white "
            "is not known; convert it to 8 bits first, or set data.value_range for training"
        )
    return NAMED_RANGES[ranges[0]]


def say_background(colour: str) -> None:
    """Says, once per process, that transparency is laid on a colour."""
    if not _laid_on_background:
        _laid_on_background.append(True)
        _log.info(
            "some images have transparency, which is laid on %s; data.alpha=keep and "
            "tokenizer.model.channels=4 keep it",
            colour,
        )


def is_animated(image: Image.Image) -> bool:
    """Whether an image has several frames. Those after the first are not used and may be
    corrupted."""
    try:
        # Not `n_frames`, which reads all of them.
        return bool(getattr(image, "is_animated", False))
    except Exception:
        return False


def _orientation(image: Image.Image) -> int:
    """How EXIF says to turn it; 1 is upright."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a corrupted EXIF block; the pixels may be fine
        return 1


def prepared(content: bytes, config: DataConfig) -> np.ndarray:
    """An image's file as uint8 (H,W,C), shrunk to what training needs, transparency as `data.alpha`
    says.

    That is its largest centred part of the shape of `image_size`, at that size. For random crops it
    is the whole image, just large enough that the smallest crop has `image_size` pixels. Raises
    what `open_image` does.
    """
    # Imports torch
    from stage1_tokenizer.pixels import is_transparent, to_filterable, to_rgb
    from stage1_tokenizer.transparency import filtered

    rows, columns = config.size
    colour = background(config.alpha)
    with decoded(content, enough(config), config.max_pixels, config.values) as found:
        image = found.image
        if colour is not None and not _laid_on_background and is_transparent(image):
            say_background(config.alpha)
        image = to_filterable(image) if colour is None else to_rgb(image, background=colour)
        if config.crop == "centre":
            return filtered(ImageOps.fit(image, (columns, rows), Image.Resampling.BICUBIC))
        # The side that limits the size of a crop, and what it must be.
        width, height = image.size
        own, goal = (height, rows) if height * columns <= width * rows else (width, columns)
        target = max(goal, min(own, math.ceil(goal / config.crop_scale)))
        if own != target:
            wide = max(columns, round(width * target / own))
            high = max(rows, round(height * target / own))
            image = image.resize((wide, high), Image.Resampling.BICUBIC, reducing_gap=2.0)
        return filtered(image)


def crop_of(image: np.ndarray, config: DataConfig, draw: int | None) -> np.ndarray:
    """The part of a prepared image that is seen: centred, or chosen by `draw` where the
    configuration varies it."""
    if draw is None or not config.varies:
        return centre_crop(image, config.size)
    return random_crop(
        image, config.size, crop=config.crop == "random", flip=config.flip, draw=draw
    )


def centre_crop(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The largest centred part of (H,W,C) that has the shape of `size` (height, width), at that
    size."""
    height, width = image.shape[:2]
    part = _largest_part(height, width, size)
    return _resized(image, (height - part[0]) // 2, (width - part[1]) // 2, part, size)


def random_crop(
    image: np.ndarray, size: tuple[int, int], *, crop: bool, flip: bool, draw: int
) -> np.ndarray:
    """A random part of (H,W,C) that has the shape of `size` (height, width), at that size, mirrored
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
    from stage1_tokenizer.transparency import as_filterable, filtered  # imports torch

    return filtered(as_filterable(pixels).resize(size[::-1], Image.Resampling.BICUBIC))


def random_shift(
    images: np.ndarray, rows: list[int], view: int, shift: int, seed: int, flip: bool = False
) -> np.ndarray:
    """Images (B,H,W,C) moved by up to `shift` pixels along each axis, with the border repeated into
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
