"""Images as files: what clients upload, and what they get. Knows formats, metadata and
the error of an upload that cannot be read."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipeline.data.readers.images import open_image
from pipeline.serving.errors import ApiError
from pipeline.serving.schemas import Format
from stage1_tokenizer.pixels import has_alpha, to_rgb

_MAX_UPLOAD_PIXELS = 2**24
METADATA = "minidalle"
"""Key of a PNG's text that holds the settings, as JSON."""


def encoded(
    image: Image.Image,
    format: Format,
    background: str | None,
    settings: dict[str, Any] | None,
    quality: int | None = None,
) -> bytes:
    """An image as a file; a PNG has `settings` in its text. Without transparency it lies on white.

    Args:
        quality: 0 to 100, of a JPEG (95 where absent) or WebP (lossless where absent).
    """
    if has_alpha(image) and (background == "opaque" or format == "jpeg"):
        image = to_rgb(image)
    file = io.BytesIO()
    if format == "png":
        text = PngInfo()
        if settings is not None:
            text.add_text(METADATA, json.dumps(settings))
        image.save(file, "PNG", pnginfo=text)
    elif format == "webp":
        image.save(
            file, "WEBP", lossless=quality is None, quality=80 if quality is None else quality
        )
    else:
        image.save(file, "JPEG", quality=95 if quality is None else quality)
    return file.getvalue()


def opened(content: bytes, param: str) -> Image.Image:
    """An uploaded image.

    Args:
        param: the field that it is in, for the message.

    Raises:
        ApiError: it cannot be read.
    """
    try:
        return open_image(content, most=_MAX_UPLOAD_PIXELS)
    except ValueError as error:
        raise ApiError(400, f"{param}: {error}", param=param, code="invalid_image") from error


def as_mask(mask: Image.Image) -> Image.Image:
    """White where pixels are replaced: the transparent ones of a mask that has any transparency,
    otherwise the white ones."""
    if has_alpha(mask):
        alpha = np.asarray(mask.convert("RGBA"))[..., 3]
        if alpha.min() < 255:
            return Image.fromarray(np.where(alpha == 0, 255, 0).astype(np.uint8))
    return mask.convert("L")
