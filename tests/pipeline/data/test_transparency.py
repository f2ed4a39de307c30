"""`data.alpha`: transparency of every kind of file and source is kept premultiplied, or laid on a
colour."""

from __future__ import annotations

import struct
import tarfile
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from pipeline.config.data import DataConfig, MixPart, data_settings
from pipeline.config.experiment import to_dict
from pipeline.data.builtin import emoji
from pipeline.data.builtin.emoji import BITMAP_SIZE, FONT
from pipeline.data.load import load_source, load_sources
from pipeline.data.readers.folder import folder_rows
from pipeline.data.readers.images import crop_of, prepared
from pipeline.data.readers.scan import scan_images
from stage1_tokenizer.transparency import on_background, premultiplied


def config(source: object, **options: object) -> DataConfig:
    values: dict[str, object] = {"image_size": 16, "val_fraction": 0.4, "upscale": True}
    return DataConfig(source=str(source), **(values | options))  # type: ignore[arg-type]


def as_file(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def straight(seed: int = 0, side: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 4), dtype=np.uint8)


def png_of_16_bits(values: np.ndarray, clear: tuple[int, ...] = ()) -> bytes:
    """Grey (H,W,1), colour (H,W,3) or colour with alpha (H,W,4), uint16; `clear` is transparent."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    height, width, channels = values.shape
    kind = {1: 0, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
        + (chunk(b"tRNS", struct.pack(f">{channels}H", *clear)) if clear else b"")
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def kinds() -> dict[str, tuple[bytes, tuple[int, int, int, int]]]:
    """A file of each kind, and the premultiplied pixel at its corner."""
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    deep = np.full((16, 16, 4), (65535, 0, 257 * 10, 257 * 51), np.uint16)
    return {
        "rgba": (as_file(Image.new("RGBA", (16, 16), (255, 0, 100, 51))), (51, 0, 20, 51)),
        "webp": (
            as_file(Image.new("RGBA", (16, 16), (255, 0, 100, 51)), "WEBP", lossless=True),
            (51, 0, 20, 51),
        ),
        "grey": (as_file(Image.new("LA", (16, 16), (200, 51))), (40, 40, 40, 51)),
        "palette": (as_file(palette, transparency=1), (0, 0, 0, 0)),
        "colour": (as_file(Image.new("RGB", (16, 16)), transparency=(0, 0, 0)), (0, 0, 0, 0)),
        "deep": (png_of_16_bits(deep), (51, 0, 2, 51)),
        "deep colour": (png_of_16_bits(deep[..., :3], (65535, 0, 2570)), (0, 0, 0, 0)),
        "deep grey": (png_of_16_bits(deep[..., :1], (65535,)), (0, 0, 0, 0)),
        "deep, another colour": (
            png_of_16_bits(deep[..., :3], (65535, 0, 2571)),
            (255, 0, 10, 255),
        ),
        "opaque": (as_file(Image.new("RGB", (16, 16), (1, 2, 3))), (1, 2, 3, 255)),
        "jpeg": (as_file(Image.new("L", (16, 16), 7), "JPEG"), (7, 7, 7, 255)),
    }


@pytest.mark.parametrize("kind", kinds())
def test_transparency_of_every_kind_of_file_is_kept(kind):
    content, pixel = kinds()[kind]
    image = prepared(content, config("x", alpha="keep"))
    assert image.shape == (16, 16, 4) and tuple(image[3, 3]) == pixel


@pytest.mark.parametrize("alpha", ["white", "#102030"])
@pytest.mark.parametrize("kind", kinds())
def test_transparency_of_every_kind_of_file_is_laid_on_the_colour(kind, alpha):
    content, pixel = kinds()[kind]
    colour = (255, 255, 255) if alpha == "white" else (16, 32, 48)
    image = prepared(content, config("x", alpha=alpha))
    expected = on_background(np.array(pixel, np.uint8), colour)
    assert image.shape == (16, 16, 3)
    assert np.abs(image[3, 3].astype(int) - expected).max() <= 1


@pytest.mark.parametrize("crop", ["centre", "random"])
@pytest.mark.parametrize("side", [16, 40])
def test_colours_stay_within_their_alpha_at_any_crop(crop, side):
    own = config("x", alpha="keep", crop=crop, crop_scale=0.5 if crop == "random" else 1.0)
    image = prepared(as_file(Image.fromarray(straight(0, side))), own)
    for draw in (None, 1, 2, 3):
        part = crop_of(image, own, draw)
        assert part.shape == (16, 16, 4)
        assert (part[..., :3] <= part[..., 3:]).all()


def test_an_image_of_the_wanted_size_is_premultiplied_and_no_more():
    values = straight()
    found = prepared(as_file(Image.fromarray(values)), config("x", alpha="keep"))
    assert np.array_equal(found, premultiplied(values))


@pytest.fixture
def folder(tmp_path) -> Path:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(12):
        image = Image.fromarray(straight(number))
        (image if number % 3 else image.convert("RGB")).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(f"number {number}")
    return images


def test_folders_give_four_channels(folder):
    for source in load_sources(config(folder, alpha="keep")):
        images = source.images(range(len(source)))
        opaque = [int(name.partition(".")[0]) % 3 == 0 for name in source.names(range(len(source)))]
        assert images.shape == (len(source), 16, 16, 4)
        assert [bool((image[..., 3] == 255).all()) for image in images] == opaque


def test_shards_that_are_streamed_give_four_channels(folder, tmp_path):
    with tarfile.open(tmp_path / "shard.tar", "w") as shard:
        for file in sorted(folder.iterdir()):
            shard.add(file, file.name)
    own = config(tmp_path / "shard.tar", alpha="keep", streaming=True, val_fraction=0.3)
    stream, held_out = load_sources(own)
    assert held_out.images(range(len(held_out))).shape[1:] == (16, 16, 4)
    plan = stream.encoding_plan(0, None)
    assert plan["shards"] == 1
    samples = [stream.decode(sample) for sample in stream.samples(0)]  # type: ignore[attr-defined]
    assert samples and all(image.shape == (16, 16, 4) for image in samples)


def test_mixtures_give_four_channels_of_opaque_sources_too(folder):
    parts = [MixPart(source=str(folder)), MixPart(source="shapes")]
    own = DataConfig(mix=parts, image_size=32, upscale=True, val_fraction=0.4, alpha="keep")
    source = load_source(own, "train")
    few = source.images([0, 1, source.starts[1], source.starts[1] + 1])
    assert few.shape == (4, 32, 32, 4)
    assert (few[2:, ..., 3] == 255).all()


@pytest.mark.skipif(not Path(FONT).is_file(), reason="the emoji font is not installed")
def test_emoji_keep_their_transparency():
    """On white they are what they were."""
    face = ImageFont.truetype(FONT, BITMAP_SIZE)
    kept = emoji._draw(face, "\u2764\ufe0f", 32, "keep")
    white = emoji._draw(face, "\u2764\ufe0f", 32, "white")
    assert kept is not None and white is not None
    assert kept[..., 3].min() == 0 and kept[16, 16, 3] == 255
    assert (kept[..., :3] <= kept[..., 3:]).all()
    assert np.abs(on_background(kept).astype(int) - white).mean() < 1


def test_a_scan_finds_images_that_are_not_opaque(folder):
    (folder / "20.png").write_bytes(as_file(Image.new("RGBA", (16, 16), (1, 2, 3, 255))))
    (folder / "20.txt").write_text("opaque with an alpha channel")
    rows = folder_rows(folder, config(folder))
    found = scan_images(rows, 2)
    for row, transparent in enumerate(found.transparent):
        number = int(rows.label(row).partition(".")[0])
        assert transparent == (number < 12 and number % 3 != 0)


def test_settings_of_data_on_white_are_those_that_know_no_alpha(folder):
    on_white = data_settings(to_dict(config(folder)))
    assert "alpha" not in on_white
    assert data_settings(to_dict(config(folder, alpha="keep"))) == on_white | {"alpha": "keep"}
