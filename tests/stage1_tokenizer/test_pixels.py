"""Round trips between PIL, uint8 and the model's range; images of any mode."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from stage1_tokenizer import resize_and_crop, to_model_range, to_rgb, to_uint8
from stage1_tokenizer.pixels import (
    LAPLACE_MARGIN,
    from_laplace_logits,
    from_pil,
    to_laplace_logits,
    to_pil,
)


def test_every_byte_survives_the_round_trip():
    images = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 16, 16, 3)
    assert torch.equal(to_uint8(to_model_range(images)), images)


def test_the_range_is_minus_one_to_one_and_memory_stays_channels_last():
    pixels = to_model_range(
        torch.tensor([0, 255, 51], dtype=torch.uint8).expand(2, 4, 5, 3).contiguous()
    )
    assert pixels.shape == (2, 3, 4, 5) and pixels.dtype == torch.float32
    torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor([-1.0, 1.0, -0.6]))
    assert pixels.is_contiguous(memory_format=torch.channels_last)


def test_out_of_range_values_are_clipped_not_wrapped():
    assert to_uint8(torch.tensor([-3.0, 3.0]).reshape(1, 1, 1, 2)).flatten().tolist() == [0, 255]


def test_pil_round_trip():
    images = torch.randint(
        0, 256, (3, 8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    assert torch.equal(from_pil(to_pil(images)), images)


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 100, (100, 100, 100)),
        ("LA", (0, 0), (255, 255, 255)),
        ("LA", (0, 255), (0, 0, 0)),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 51), (255, 204, 204)),
        ("CMYK", (0, 0, 0, 0), (255, 255, 255)),
        ("I;16", 257 * 100, (100, 100, 100)),
        ("F", 100.0, (100, 100, 100)),
    ],
)
def test_any_mode_becomes_rgb_with_transparency_on_white(mode, value, expected):
    image = to_rgb(Image.new(mode, (4, 4), value))
    assert image.mode == "RGB" and image.getpixel((1, 1)) == expected


def test_a_palette_with_a_transparent_colour_is_composited():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    assert to_rgb(image).getpixel((0, 0)) == (10, 20, 30)
    image.info["transparency"] = 1
    assert to_rgb(image).getpixel((0, 0)) == (255, 255, 255)


def test_a_photograph_is_turned_upright():
    image = Image.fromarray(np.array([[[9, 9, 9], [200, 200, 200]]], dtype=np.uint8))
    image.getexif()[0x0112] = 6  # turn a quarter to the right to see it upright
    upright = to_rgb(image)
    assert upright.size == (1, 2) and upright.getpixel((0, 0)) == (9, 9, 9)


def sideways(width: int, height: int) -> Image.Image:
    """A photograph that is this large as it lies and the other way round upright."""
    image = Image.new("RGB", (width, height), (9, 9, 9))
    image.getexif()[0x0112] = 6
    return image


def test_sizes_are_those_of_upright_images():
    assert from_pil([sideways(8, 4), Image.new("RGB", (4, 8))]).shape == (2, 8, 4, 3)
    with pytest.raises(ValueError, match="given were 4x8 and 8x4"):
        from_pil([sideways(8, 4), Image.new("RGB", (8, 4))])
    photo = Image.radial_gradient("L").resize((80, 40))
    photo.getexif()[0x0112] = 6
    cropped = resize_and_crop(photo, (16, 24))
    assert torch.equal(from_pil([cropped]), from_pil([resize_and_crop(to_rgb(photo), (16, 24))]))


def test_an_image_with_a_damaged_exif_block_is_read_as_it_is(tmp_path):
    Image.new("RGB", (4, 4), (9, 8, 7)).save(tmp_path / "a.png", exif=b"garbage!")
    with Image.open(tmp_path / "a.png") as image:
        assert to_rgb(image).getpixel((0, 0)) == (9, 8, 7)


def test_crop_is_centred_and_resizing_antialiased():
    wide = np.zeros((32, 96, 3), dtype=np.uint8)
    # A fine chessboard, between black sides
    wide[:, 32:64] = np.indices((32, 32)).sum(0)[..., None] % 2 * 255
    image = np.asarray(resize_and_crop(Image.fromarray(wide), 8))
    assert image.shape == (8, 8, 3)
    assert abs(image[2:-2, 2:-2].astype(int) - 127).max() < 12  # without antialiasing: 0 or 255


def test_images_of_several_sizes_or_none_are_refused_with_what_to_do():
    with pytest.raises(
        ValueError, match=r"one size are needed and given were 8x8 and 20x10; use .*resize_and_crop"
    ):
        from_pil([Image.new("RGB", (8, 8)), Image.new("RGB", (20, 10))])
    with pytest.raises(ValueError, match="given were none"):
        from_pil([])


def test_laplace_logits_are_inverse_and_finite_at_both_ends():
    pixels = torch.linspace(-1, 1, 101)
    logits = to_laplace_logits(pixels)
    assert logits.isfinite().all()
    torch.testing.assert_close(
        logits[[0, -1]].sigmoid(), torch.tensor([LAPLACE_MARGIN, 1 - LAPLACE_MARGIN])
    )
    torch.testing.assert_close(from_laplace_logits(logits), pixels, atol=1e-5, rtol=0)
