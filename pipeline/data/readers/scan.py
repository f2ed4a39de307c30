"""Opens every image of a source once, in parallel: its size, a hash of its file, and what is wrong
with it. Trains nothing.

The result is kept in a file, so that a source is scanned once and not at every start.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from tqdm import tqdm

from pipeline.config.data import MAX_PIXELS, DataConfig
from pipeline.data.readers.base import Rows, SkipCounter, content_fingerprint
from pipeline.data.readers.files import TooLarge
from pipeline.data.readers.images import decoded, enough, pixels_decoded
from pipeline.data.worker_info import SINGLE_PROCESS, WorkerInfo
from pipeline.runtime.atomic_io import atomic_write
from pipeline.runtime.log import shows_progress

UNREADABLE = "unreadable images left out"
_TOO_LARGE = "too large: "
"""Begins the problem of an image with more than `data.max_pixels`."""
_TEXTS = ("mode", "depth", "problem")
"""Columns of the result's file that are texts."""
_CHUNK = 32
_SLOW = 2000
"""Fewest images for which a progress bar is shown and the result is kept."""
_DECODED = 64
"""Shorter side, in pixels, at which images are decoded to be hashed."""
_Line = tuple[int, int, bool, int, int, str, str, bool, float, float, str]
"""An entry of each column of `ScanResult`."""
_FORM = 3
"""Version of the result's file."""


@dataclass(frozen=True)
class ScanResult:
    """What was found of each image, one entry per row.

    Attributes:
        width, height: int32 (N), in pixels, upright; 0 where the image cannot be read.
        shrinks: bool (N), whether it can be decoded at a part of its size.
        digest: uint64 (N), a hash of the file.
        look: uint64 (N), `perceptual_hash` of the image.
        mode: (N), Pillow's mode of the file: RGB, L, CMYK, ...; with `, animated` where there are
            several frames.
        depth: (N), `8bit`, `integers` of more bits, or `floats`; '' where it cannot be read.
        transparent: bool (N), whether some pixel is not opaque.
        low, high: float64 (N), the smallest and largest value in the file; of 8 bits per value,
            after transparency was put on white. 0 where it cannot be read.
        problem: (N), what is wrong with the image, or ''.
    """

    width: np.ndarray
    height: np.ndarray
    shrinks: np.ndarray
    digest: np.ndarray
    look: np.ndarray
    mode: list[str]
    depth: list[str]
    transparent: np.ndarray
    low: np.ndarray
    high: np.ndarray
    problem: list[str]


def file_digest(content: bytes) -> int:
    """64 bits by which copies of an image's file are found."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def scan_images(
    rows: Rows,
    workers: int,
    folder: Path | None = None,
    share: WorkerInfo = SINGLE_PROCESS,
    max_pixels: int = MAX_PIXELS,
) -> ScanResult:
    """Reads every image, or returns the result of an earlier call that `folder` keeps while the
    files are the same.

    Args:
        workers: threads.
        folder: keeps the result.
        share: this process's part of the work; all processes must call.
        max_pixels: of an image as it is decoded here, small; larger ones are not.
    """
    # Not by its name alone: one folder may be two parts of a mixture.
    source = content_fingerprint([rows.name, *rows.columns])
    content = content_fingerprint([_FORM, rows.stamp, len(rows), max_pixels])
    kept = folder / f"examined-{source}-{content}.arrow" if folder else None
    if folder is not None and kept is not None and not kept.is_file():
        # The same files under another name: they were moved.
        kept = next(folder.glob(f"examined-*-{content}.arrow"), kept)
    found = _read(kept) if kept is not None else None
    if all(share.gather(found is not None)):
        assert found is not None
        return found
    mine = np.array_split(np.arange(len(rows)), share.count)[share.index]
    chunks = [mine[first : first + _CHUNK] for first in range(0, len(mine), _CHUNK)]
    lines: list[_Line] = []
    # A second's work needs no progress bar.
    bar = tqdm(
        total=len(mine),
        desc="reading images",
        disable=len(mine) < _SLOW or share.index > 0 or not shows_progress(),
        mininterval=1.0,
        leave=False,
    )
    with bar, ThreadPoolExecutor(workers, thread_name_prefix="examine") as pool:
        for part in pool.map(
            lambda chunk: [_examined(rows, int(row), max_pixels) for row in chunk], chunks
        ):
            lines += part
            bar.update(len(part))
    lines = [line for of_process in share.gather(lines) for line in of_process]
    result = _from_lines(lines)
    if kept is not None and share.index == 0 and len(rows) >= _SLOW:
        _write(kept, result)
        for old in kept.parent.glob(f"examined-{source}-*.arrow"):
            if old != kept:  # of the source as it was
                with suppress(OSError):
                    old.unlink()
    return result


def usable(rows: Rows, found: ScanResult, config: DataConfig, tally: SkipCounter) -> np.ndarray:
    """Whether each row is usable (N): it can be read and passes the size filters. The others are
    counted.

    Images count as too large by the pixels at which training decodes them, at any `image_size`.

    Raises:
        ValueError: a larger fraction than `data.filter.max_corrupt_fraction` cannot be read.
    """
    large = np.array([problem.startswith(_TOO_LARGE) for problem in found.problem], bool)
    bad = np.array([bool(problem) for problem in found.problem], bool) & ~large
    pixels = pixels_decoded(found.width, found.height, found.shrinks, enough(config))
    large |= pixels > config.max_pixels
    of_size = [
        (reason, ~bad & ~large & which)
        for reason, which in unwanted_sizes(found.width, found.height, config)
    ]
    reasons = [(UNREADABLE, bad), (too_large(config.max_pixels), large), *of_size]
    for reason, rows_of in reasons:
        for row in np.flatnonzero(rows_of):
            tally.add(reason, rows.label(int(row)))
    if bad.sum() > config.filter.max_corrupt_fraction * max(len(rows), 1):
        first = int(np.flatnonzero(bad)[0])
        raise ValueError(
            f"{int(bad.sum())} of {len(rows)} images in {rows.name} cannot be read "
            f"({tally.first(UNREADABLE)}: {found.problem[first]}); "
            "repair them, or raise data.filter.max_corrupt_fraction (now "
            f"{config.filter.max_corrupt_fraction})"
        )
    return ~np.any([rows_of for _, rows_of in reasons], axis=0)


def too_large(most: int) -> str:
    """The reason to skip images with more than so many pixels."""
    return f"images of more than {most:,} pixels left out (data.max_pixels)"


def unwanted_sizes(
    width: int | np.ndarray, height: int | np.ndarray, config: DataConfig
) -> list[tuple[str, np.ndarray]]:
    """Reasons to skip images, and whether each applies to an image of this size, or to images of
    these sizes (N)."""
    shorter = np.minimum(width, height)
    longer = np.maximum(width, height)
    wanted = config.filter
    least = config.least_size
    rows, columns = config.size
    hint = " (data.upscale=true keeps them)" if wanted.min_size is None else ""
    reasons = [(f"images smaller than {least} pixels left out{hint}", shorter < least)]
    if rows != columns and not config.upscale:
        reasons.append(
            (
                f"images that do not cover {columns}x{rows} pixels (width x height) left out "
                "(data.upscale=true keeps them)",
                (shorter >= least) & ((width < columns) | (height < rows)),
            )
        )
    if wanted.max_size is not None:
        reasons.append(
            (f"images larger than {wanted.max_size} pixels left out", longer > wanted.max_size)
        )
    if wanted.max_aspect is not None:
        reasons.append(
            (
                f"images more than {wanted.max_aspect:g} times as long as wide left out",
                longer > wanted.max_aspect * shorter,
            )
        )
    return reasons


def perceptual_hash(image: Image.Image) -> int:
    """64 bits that stay nearly the same when an image is scaled, recompressed or brightened; 0 for
    a plain surface.

    Signs of the lowest frequencies (pHash: Zauner 2010, "Implementation and benchmarking of
    perceptual image hash functions"): 48 of lightness against their median, and 8 of each of two
    colour differences, so that a red and a blue heart differ. Frequencies that JPEG would change
    count as 0.
    """
    small = (
        (image if image.mode == "RGB" else image.convert("RGB"))
        .resize((32, 32), Image.Resampling.BICUBIC, reducing_gap=2.0)
        .convert("YCbCr")
    )
    channels = np.asarray(small, np.float32).transpose(2, 0, 1)
    lightness, *colours = _COSINES @ channels @ _COSINES.T
    values = lightness[:7, :7].flatten()[1:]  # without the mean, the brightness
    values[np.abs(values) < _FAINT] = 0
    of_colour = np.stack(colours)[:, *_LOWEST]
    of_colour[:, 0] -= 128  # the mean of a grey image
    if not values.any() and (np.abs(of_colour[:, 1:]) < 2 * _FAINT).all():
        return 0
    bits = np.concatenate([values > np.median(values), of_colour.flatten() > 2 * _FAINT])
    return int(np.packbits(bits).view(np.uint64)[0])


def _cosines() -> np.ndarray:
    waves = np.arange(8)[:, None]
    places = np.arange(32)[None]
    cosines = np.cos(np.pi * (2 * places + 1) * waves / 64)
    # Amplitudes, in grey levels
    return (cosines / (cosines**2).sum(1, keepdims=True)).astype(np.float32)


_COSINES = _cosines()
_LOWEST = (np.array([0, 0, 1, 1, 0, 2, 1, 2]), np.array([0, 1, 0, 1, 2, 0, 2, 1]))
_FAINT = 0.5


def _examined(rows: Rows, row: int, max_pixels: int) -> _Line:
    from stage1_tokenizer.pixels import is_transparent, to_rgb  # imports torch

    digest = 0
    try:
        content = rows.image(row)
        digest = file_digest(content)
        with decoded(content, _DECODED, max_pixels, "own") as found:
            mode = found.mode + (", animated" if found.animated else "")
            transparent = is_transparent(found.image)
            image = to_rgb(found.image)
            low, high = found.low, found.high
            if found.depth == "8bit":
                bands = np.array(image.getextrema())
                low = float(bands.min())
                high = float(bands.max())
            look = perceptual_hash(image)
            size = (found.width, found.height, found.shrinks)
            return *size, digest, look, mode, found.depth, transparent, low, high, ""
    except (OSError, ValueError) as error:
        problem = " ".join(str(error).split())[:200] or type(error).__name__
        if isinstance(error, TooLarge):
            problem = f"{_TOO_LARGE}{problem}"
        return 0, 0, False, digest, 0, "", "", False, 0.0, 0.0, problem


def _from_lines(lines: Sequence[_Line]) -> ScanResult:
    width, height, shrinks, digest, look, mode, depth, transparent, low, high, problem = (
        zip(*lines, strict=True) if lines else ((),) * 11
    )
    return ScanResult(
        np.array(width, np.int32),
        np.array(height, np.int32),
        np.array(shrinks, bool),
        np.array(digest, np.uint64),
        np.array(look, np.uint64),
        list(mode),
        list(depth),
        np.array(transparent, bool),
        np.array(low, np.float64),
        np.array(high, np.float64),
        list(problem),
    )


def _read(path: Path) -> ScanResult | None:
    try:
        with pa.memory_map(str(path)) as file:
            table = pa.ipc.open_file(file).read_all()
    except (OSError, pa.ArrowInvalid):  # missing or truncated: images are scanned again
        return None
    columns = table.column_names
    texts = {name: table[name].to_pylist() for name in columns if name in _TEXTS}
    numbers = {name: table[name].to_numpy() for name in columns if name not in _TEXTS}
    return ScanResult(**numbers, **texts)


def _write(path: Path, found: ScanResult) -> None:
    table = pa.table(vars(found))
    with (
        atomic_write(path) as beside,
        pa.OSFile(str(beside), "wb") as file,
        pa.ipc.new_file(file, table.schema) as writer,
    ):
        writer.write_table(table)
