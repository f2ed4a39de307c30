"""Images with more than 8 bits per value: one range for a whole source, or an error that asks."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config.data import DataConfig, MixPart, data_settings
from pipeline.config.experiment import to_dict
from pipeline.data.load import load_source, load_sources
from pipeline.data.readers.images import decoded, open_8_bit, open_image
from pipeline.doctor.diagnose import diagnose
from tests.helpers.data import config, write_shard

RAMP = np.linspace(0, 1, 24 * 20).reshape(24, 20)
"""Values of one image, as fractions of white."""


def save(folder: Path, values: np.ndarray, count: int = 6, ending: str = "png") -> Path:
    """Images with captions whose brightest value falls from one to the next, to a half."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        dimmed = (values * (1 - number / (2 * count))).astype(values.dtype)
        Image.fromarray(dimmed).save(folder / f"{number}.{ending}")
        (folder / f"{number}.txt").write_text(f"number {number}")
    return folder


def png(values: np.ndarray, colour_type: int) -> bytes:
    """A PNG of 16 bits per value (H,W,C)."""
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour_type, 0, 0, 0)
    parts = (chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(raw)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def brightest(folder: Path, **options: object) -> list[int]:
    """The brightest value of each image, by name."""
    found = {}
    for split in load_sources(config(folder, **options)):
        names = split.names(range(len(split)))
        for name, image in zip(names, split.images(range(len(split))), strict=True):
            found[name] = int(image.max())
    return [found[name] for name in sorted(found)]


@pytest.mark.parametrize(
    ("values", "ending"),
    [
        ((RAMP * 4095).astype(np.uint16), "png"),
        ((RAMP * 65535).astype(np.uint16), "png"),
        (RAMP.astype(np.float32), "tif"),
        ((RAMP * 255).astype(np.float32), "tif"),
        ((RAMP * 4095).astype(np.int32), "tif"),
    ],
)
def test_a_range_without_doubt_is_taken_once_for_the_whole_source(tmp_path, values, ending):
    found = brightest(save(tmp_path / "a", values, ending=ending))
    # The dim ones stay dim: none has a range of its own.
    assert found[0] > 225 and 130 < found[-1] < 160 and found == sorted(found, reverse=True)


@pytest.mark.parametrize(
    ("values", "ending", "asked"),
    [
        ((RAMP * 255).astype(np.uint16), "png", "8bit or 12bit or 16bit"),
        ((RAMP * 1023).astype(np.uint16), "png", "10bit or 12bit"),
        ((RAMP * 16383).astype(np.uint16), "png", "14bit or 16bit"),
        ((RAMP * 5000 - 1000).astype(np.int32), "tif", r"\[low, high\], such as \[-1000, 4000\]"),
        ((RAMP * 9).astype(np.float32), "tif", r"\[low, high\], such as \[0, 9\]"),
        ((RAMP * 3000).astype(np.float32), "tif", r"\[low, high\]"),
    ],
)
def test_a_range_in_doubt_is_asked_for(tmp_path, values, ending, asked):
    folder = save(tmp_path / "a", values, ending=ending)
    with pytest.raises(ValueError, match=f"6 images have more than 8 bits.*value_range: {asked}"):
        load_source(config(folder), "train")
    assert diagnose(config(folder)).fails
    low, high = float(values.min()), float(values.max())
    assert brightest(folder, value_range=[low, high])[0] > 225


def test_a_range_that_makes_images_black_or_white_is_refused(tmp_path):
    folder = save(tmp_path / "a", (RAMP * 1000 + 3000).astype(np.uint16))
    for given, name in (("16bit", "black"), ([0, 1000], "white")):
        with pytest.raises(ValueError, match=f"6 of 6 images .* are nearly {name}"):
            load_source(config(folder, value_range=given), "train")
        assert diagnose(config(folder, value_range=given)).fails


def test_one_bright_outlier_does_not_make_the_others_black(tmp_path):
    folder = save(tmp_path / "a", (RAMP * 3000).astype(np.uint16))
    Image.fromarray((RAMP * 65535).astype(np.uint16)).save(folder / "0.png")
    with pytest.raises(ValueError, match=r"5 of 6 images .* are nearly black"):
        load_source(config(folder), "train")


def test_doctor_says_the_values_and_fails_for_images_of_8_bits_that_are_nearly_black(tmp_path):
    folder = save(tmp_path / "a", (RAMP * 4095).astype(np.uint16))
    found = diagnose(config(folder))
    assert "integers from 0 to 4095" in found.sources[0].values
    assert "0 is shown black and 4095 white" in found.sources[0].values
    masks = diagnose(config(save(tmp_path / "b", (RAMP * 3).astype(np.uint8))))
    assert any("6 of 6 images of 8 bits per value are nearly black" in one.text
               for one in masks.findings if one.level == "fails")  # fmt: skip


@pytest.mark.parametrize(("channels", "colour_type"), [(1, 0), (2, 4), (3, 2), (4, 6)])
def test_both_bytes_of_16_bit_colour_are_read(channels, colour_type):
    values = np.random.default_rng(0).integers(0, 4096, (20, 24, channels)).astype(np.uint16)
    if channels in (2, 4):
        values[..., -1] = 65535
    with decoded(png(values, colour_type), 16, value_range=(0, 4095)) as found:
        shown = np.asarray(found.image).reshape(values.shape)
    colour = values[..., : channels - (channels in (2, 4))]
    assert np.abs(shown[..., : colour.shape[2]] - colour / 4095 * 255).max() <= 0.5
    assert (found.low, found.high, found.depth) == (colour.min(), colour.max(), "integers")


def test_16_bit_colour_of_a_tiff_is_read_whole():
    """Written by hand: Pillow writes no such file."""
    values = np.random.default_rng(1).integers(0, 4096, (20, 24, 3)).astype("<u2")
    entries = [(256, 3, 1, 24), (257, 3, 1, 20), (258, 3, 3, 134), (259, 3, 1, 1), (262, 3, 1, 2),
               (273, 4, 1, 140), (277, 3, 1, 3), (278, 3, 1, 20), (279, 4, 1, values.nbytes),
               (284, 3, 1, 1)]  # fmt: skip
    table = struct.pack("<H", 10) + b"".join(struct.pack("<HHII", *one) for one in entries)
    content = b"II*\0" + struct.pack("<I", 8) + table + b"\0" * 4
    content += struct.pack("<HHH", 16, 16, 16)
    content = content.ljust(140, b"\0") + values.tobytes()
    with decoded(content, 16, value_range=(0, 4095)) as found:
        assert np.abs(np.asarray(found.image) - values / 4095 * 255).max() <= 0.5


def test_values_that_are_not_finite_make_an_image_unreadable(tmp_path):
    folder = save(tmp_path / "a", RAMP.astype(np.float32), ending="tif")
    broken = RAMP.astype(np.float32)
    broken[0, 0] = np.nan
    Image.fromarray(broken).save(folder / "0.tif")
    with pytest.raises(ValueError, match=r"0\.tif: it cannot be read .*not finite"):
        load_source(config(folder), "train")


def test_deep_images_keep_their_orientation():
    image = Image.fromarray((RAMP * 4095).astype(np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif.tobytes())
    with decoded(buffer.getvalue(), 16, value_range=(0, 4095)) as found:
        assert (found.width, found.height) == (24, 20)
        assert found.image.getexif()[0x0112] == 6


def test_a_single_deep_file_is_read_only_where_its_range_is_certain(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray((RAMP * 65535).astype(np.uint16)).save(path)
    assert open_image(path).getextrema() == (0, 255)
    with pytest.raises(ValueError, match=r"a\.png has 16 bits per value, and only 8 can be read"):
        open_8_bit(path)
    Image.fromarray((RAMP * 4095).astype(np.uint16)).save(path)
    with pytest.raises(ValueError, match=r"a\.png has mode I;16 and values from 0 to 4095"):
        open_image(path)


def test_a_stream_asks_for_the_range(tmp_path):
    image = png((RAMP * 4095)[..., None], 0)
    write_shard(
        tmp_path / "a.tar", [(f"{i:03d}", {"png": image, "txt": b"a ramp"}) for i in range(12)]
    )
    streamed = {"streaming": True, "val_fraction": 0.3}
    with pytest.raises(ValueError, match="values of a stream cannot be looked at beforehand"):
        load_sources(config(tmp_path / "a.tar", **streamed))
    assert diagnose(config(tmp_path / "a.tar", **streamed)).fails
    stream, held_out = load_sources(config(tmp_path / "a.tar", **streamed, value_range="12bit"))
    assert held_out.images([0]).max() > 225
    sample = next(stream.samples(0))  # type: ignore[attr-defined]
    assert stream.decode(sample).max() > 225  # type: ignore[attr-defined]


def test_settings_of_the_range_are_checked():
    for wrong in ([1], [3, 3], [0, float("inf")]):
        with pytest.raises(ValueError, match=r"data\.value_range is .*must be two numbers"):
            DataConfig(source="x", value_range=wrong)
    with pytest.raises(ValueError, match=r"data\.max_pixels is 0; it must be at least 1"):
        DataConfig(source="x", max_pixels=0)
    with pytest.raises(ValueError, match="the value_range of y is"):
        MixPart(source="y", value_range=[2.0, 1.0])


def test_defaults_of_newer_settings_change_no_fingerprint():
    plain = to_dict(DataConfig(mix=[MixPart(source="a")]))
    settings = data_settings(plain)
    assert not {"value_range", "max_pixels", "follow_links"} & {*settings, *settings["mix"][0]}
    other = DataConfig(mix=[MixPart(source="a", value_range="12bit")], max_pixels=9)
    settings = data_settings(to_dict(other))
    assert settings["max_pixels"] == 9 and settings["mix"][0]["value_range"] == "12bit"
