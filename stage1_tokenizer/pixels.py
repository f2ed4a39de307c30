"""Images <-> the model's range. The only file that knows pixel units; knows nothing of networks.

Legend: B batch, C channels, H W pixels. Images are uint8 (B,H,W,C) in 0..255; the model's range
is float (B,C,H,W) in [-1,1]. Of four channels, the last is alpha and the colours are premultiplied
by it; PIL images are straight.
"""

from __future__ import annotations

import logging
import math
import struct
from collections.abc import Sequence
from contextlib import suppress
from io import BytesIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from stage1_tokenizer.caller import model_called_by_user
from stage1_tokenizer.options import STEP
from stage1_tokenizer.transparency import (
    WHITE,
    Colour,
    filtered,
    from_white,
    on_background,
    premultiplied,
    straightened,
)
from stage1_tokenizer.value_range import ValueRange, reduced

_log = logging.getLogger(__name__)
_warned: list[bool] = []
_laid_on_white: list[bool] = []
_BEYOND = 1.5
"""Pixels in [-1,1] may overshoot a little after resizing; these do not."""
LAPLACE_MARGIN = 0.1
"""DALL-E's epsilon: pixels in [0,1] are squeezed into [eps, 1-eps] so that their logit is
finite."""


def to_model_range(images: Tensor) -> Tensor:
    """uint8 (B,H,W,C) -> float (B,C,H,W) in [-1,1], channels-last in memory (as the images
    already are).

    Raises:
        ValueError: the images have another type, so that their range is not known.
    """
    if images.dtype != torch.uint8:
        raise ValueError(
            f"images have type {images.dtype} and must be uint8 in 0..255, of shape (batch, "
            "height, width, channels); scale floats in [0, 1] by (255 * images).round().byte()"
        )
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def check_model_range(pixels: Tensor, *, read: bool = True) -> None:
    """Warns once per process where float pixels of the user are all in [0,1], which is the range of
    other libraries. Our own modules convert pixels themselves, and an image may be as bright.

    Args:
        read: look at the values, for which a GPU is waited for; otherwise at the type alone.

    Raises:
        ValueError: pixels are integers, not finite, or far outside of [-1,1].
    """
    if not pixels.is_floating_point():
        raise ValueError(
            f"pixels have type {pixels.dtype} and must be floats in [-1, 1]; "
            "stage1_tokenizer.to_model_range converts uint8 (batch, height, width, channels)"
        )
    if not read or not pixels.numel():
        return
    low, high = torch.stack(torch.aminmax(pixels.detach())).tolist()
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(
            "pixels have values that are not finite (NaN or infinity); replace them first"
        )
    if low < -_BEYOND or high > _BEYOND:
        hint = "; of 0..255, pass pixels / 127.5 - 1" if low >= 0 and high <= 255 else ""
        raise ValueError(f"pixels are in [{low:g}, {high:g}] and must be in [-1, 1]{hint}")
    # One value alone is a plain image, such as white.
    if 0 <= low < high <= 1 and not _warned and model_called_by_user():
        _warned.append(True)
        _log.warning(
            "pixels are all in [0, 1], and the tokenizer expects [-1, 1]; pass 2 * pixels - 1 if 0 "
            "is black (bright images in [-1, 1] need nothing)"
        )


def dequantized(pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Pixels of 8-bit images in the model's range, spread evenly over the step of 2/255 around
    each value."""
    noise = torch.rand(
        pixels.shape, generator=generator, device="cpu" if generator else pixels.device
    ).to(pixels.device)
    return pixels + (noise - 0.5) * STEP


def to_values(pixels: Tensor) -> Tensor:
    """Pixels of 8-bit images in the model's range -> int64 values in 0..255, of the same shape."""
    return ((pixels + 1) * 127.5).round().clamp(0, 255).long()


def values_to_model_range(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers in 0..255 -> the model's range, in the same shape."""
    return values.to(dtype) / 127.5 - 1


def step_edges(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Integers in 0..255 -> the edges of each one's step in the model's range, half a step of 2/255
    to either side."""
    centre = values_to_model_range(values, dtype)
    return centre - STEP / 2, centre + STEP / 2


def to_uint8(pixels: Tensor) -> Tensor:
    """float (B,C,H,W) -> uint8 (B,H,W,C), rounded and clamped to 0..255; premultiplied colours to
    at most their alpha."""
    values = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    if values.shape[1] == 4:
        values = torch.cat([values[:, :3].minimum(values[:, 3:]), values[:, 3:]], dim=1)
    return values.permute(0, 2, 3, 1)


def without_haze(pixels: Tensor) -> Tensor:
    """float (B,4,H,W) in the model's range, premultiplied -> the same with an alpha of at most
    8/255 as 0 and of at least 247/255 as 1; other channels as they are. Networks are never quite
    transparent, and programs that drop alpha show such pixels in odd colours."""
    if pixels.shape[1] != 4:
        return pixels
    alpha = pixels[:, 3:]
    edge = 8.5 / 127.5  # between two values of 8 bits
    alpha = alpha.masked_fill(alpha > 1 - edge, 1.0).masked_fill(alpha < edge - 1, -1.0)
    return torch.cat([pixels[:, :3].minimum(alpha), alpha], dim=1)


def laid_on_white(pixels: Tensor) -> Tensor:
    """float (B,4,H,W) in the model's range, premultiplied -> (B,3,H,W) on white; other channels as
    they are."""
    return pixels if pixels.shape[1] != 4 else pixels[:, :3] - pixels[:, 3:] + 1


def has_alpha(image: Image.Image) -> bool:
    """Whether a PIL image has room for transparency."""
    return image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info


def is_transparent(image: Image.Image) -> bool:
    """Whether some pixel of a PIL image is not opaque."""
    if not has_alpha(image):
        return False
    straight = image if image.mode == "RGBA" else image.convert("RGBA")
    return bool(np.asarray(straight.getchannel("A")).min() < 255)


def to_rgb(
    image: Image.Image, value_range: ValueRange | None = None, background: Colour = WHITE
) -> Image.Image:
    """Any PIL image as RGB: turned upright by its EXIF, more than 8 bits per value scaled to 8,
    transparency on a background. An upright RGB image is returned itself and not copied.

    Args:
        value_range: the values shown black and white, where there are more than 8 bits. Without it,
            integers beyond 14 bits are taken as 16-bit, and floats in 0..255 as they are.

    Raises:
        ValueError: the range of more than 8 bits is in doubt, or values are not finite.
    """
    image = _upright_8_bit(image, value_range)
    if has_alpha(image):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def to_rgba(image: Image.Image, value_range: ValueRange | None = None) -> Image.Image:
    """Any PIL image as straight RGBA, as `to_rgb` otherwise. Images without transparency are
    opaque."""
    return _upright_8_bit(image, value_range).convert("RGBA")


def to_filterable(image: Image.Image) -> Image.Image:
    """Any PIL image as premultiplied RGBA, which Pillow filters channel by channel;
    `transparency.filtered` gives the array."""
    return to_rgba(image).convert("RGBa")


def to_channels(
    image: Image.Image, channels: int, value_range: ValueRange | None = None
) -> Image.Image:
    """Any PIL image as a tokenizer of so many channels takes it: RGBA for four, otherwise RGB. Says
    once per process where transparency is laid on white. Raises as `to_rgb`."""
    if channels == 4:
        return to_rgba(image, value_range)
    if not _laid_on_white and is_transparent(image):
        _laid_on_white.append(True)
        _log.warning(
            "an image has transparency and the tokenizer has %d channels: it is laid on white; set "
            "tokenizer.model.channels=4 and data.alpha=keep to train one that keeps it",
            channels,
        )
    return to_rgb(image, value_range)


def _upright_8_bit(image: Image.Image, value_range: ValueRange | None) -> Image.Image:
    # Pillow fails in many ways on a corrupted EXIF block, while the pixels may be whole: such an
    # image stays as it is.
    with suppress(SyntaxError, struct.error, ValueError, TypeError, KeyError):
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
    return reduced(image, value_range)


def resize_and_crop(
    image: Image.Image, size: int | tuple[int, int], channels: int = 3
) -> Image.Image:
    """The largest centred part of an image that has the shape of `size` (a square's side, or width
    and height), at that size, with antialiasing; upright, and in RGB, or in RGBA for 4
    channels."""
    wanted = (size, size) if isinstance(size, int) else size
    if channels != 4:
        return ImageOps.fit(to_rgb(image), wanted, Image.Resampling.BICUBIC)
    part = ImageOps.fit(to_filterable(image), wanted, Image.Resampling.BICUBIC)
    return Image.fromarray(straightened(filtered(part)))


def from_pil(
    images: Sequence[Image.Image], value_range: ValueRange | None = None, channels: int = 3
) -> Tensor:
    """Images of any mode and one size -> uint8 (B,H,W,3), or with 4 channels (B,H,W,4);
    `value_range` as in `to_rgb`.

    Raises:
        ValueError: there is no image, or they differ in size; none is resized unasked. Or the
            range of more than 8 bits is in doubt.
    """
    images = [
        to_channels(image, channels, value_range) for image in images
    ]  # which turns some upright: sizes count after it
    sizes = sorted({image.size for image in images})
    if len(sizes) != 1:
        given = " and ".join(f"{width}x{height}" for width, height in sizes[:2]) or "none"
        raise ValueError(
            f"images of one size are needed and given were {given}; use "
            "stage1_tokenizer.resize_and_crop(image, size) first"
        )
    return torch.from_numpy(np.stack([image_array(image) for image in images]))


def to_pil(images: Tensor) -> list[Image.Image]:
    """uint8 (B,H,W,3) or (B,H,W,4) -> PIL images in RGB or straight RGBA. `from_pil` gives the same
    values again."""
    return [pil_image(image) for image in images.cpu().numpy()]


def pil_image(image: np.ndarray) -> Image.Image:
    """As `to_pil`, of one image uint8 (H,W,3) or (H,W,4)."""
    return Image.fromarray(straightened(image) if image.shape[-1] == 4 else image)


def image_array(image: Image.Image) -> np.ndarray:
    """A PIL image in RGB or straight RGBA -> uint8 (H,W,3) or (H,W,4)."""
    values = np.asarray(image)
    return premultiplied(values) if image.mode == "RGBA" else values


def through_jpeg(images: Tensor, quality: int) -> Tensor:
    """uint8 (B,H,W,C) -> the same images after JPEG of a quality of 1 to 100, with Pillow's
    defaults for the rest. JPEG has no transparency: images of four channels are laid on white, and
    alpha is kept beside."""
    values = images.cpu().numpy()
    stored = []
    for image in on_background(values):
        buffer = BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=quality)
        stored.append(Image.open(buffer))
    after = from_pil(stored)
    return (
        torch.from_numpy(from_white(after.numpy(), values[..., 3:]))
        if images.shape[3] == 4
        else after
    )


def to_squeezed_unit(pixels: Tensor) -> Tensor:
    """Model range -> [eps, 1-eps], DALL-E's range."""
    return (1 - 2 * LAPLACE_MARGIN) * (pixels + 1) / 2 + LAPLACE_MARGIN


def to_laplace_logits(pixels: Tensor) -> Tensor:
    """Model range -> logits of the squeezed unit range (DALL-E, 2021, appendix A.3)."""
    return torch.logit(to_squeezed_unit(pixels))


def from_laplace_logits(logits: Tensor) -> Tensor:
    """The inverse of `to_laplace_logits`."""
    return 2 * (torch.sigmoid(logits) - LAPLACE_MARGIN) / (1 - 2 * LAPLACE_MARGIN) - 1
