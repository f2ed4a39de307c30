"""Images of any height and width: settings, crops and which images are too small."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.config.data import DataConfig, data_settings
from pipeline.data.load import load_sources
from pipeline.data.readers.images import centre_crop, crop_of, prepared, random_crop
from tests.helpers.data import config, encoded, write_shard


def ramps(height: int, width: int) -> np.ndarray:
    """An image whose red is its row and whose green is its column, in pixels."""
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return np.stack([rows, columns, np.zeros_like(rows)], axis=2).astype(np.uint8)


def as_png(image: np.ndarray) -> bytes:
    from io import BytesIO

    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("given", [[32, 32], (32, 32), 32])
def test_a_square_given_as_two_numbers_is_one_number(given):
    square = DataConfig(source="x", image_size=given)
    assert square.image_size == 32 and square.size == (32, 32)
    assert data_settings(asdict(square)) == data_settings(
        asdict(DataConfig(source="x", image_size=32))
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": [64]}, r"data.image_size is \[64\]; it must be one number, or \[height, w"),
        ({"image_size": [64, 64, 3]}, r"data.image_size is \[64, 64, 3\]; it must be one number"),
        ({"image_size": [64, 8]}, r"data.image_size is \[64, 8\]; it must be at least 16"),
        (
            {"image_size": [64, 96], "source": "shapes"},
            r"\[64, 96\], and shapes, emoji and icons are",
        ),
        ({"image_size": [64, 96], "source": "emoji"}, "drawn as squares alone; give one number"),
        (
            {"image_size": [64, 96], "filter": {"min_size": 48}},
            r"min_size is 48, below data.image_size \[64, 96\]",
        ),
        (
            {"image_size": [64, 96], "filter": {"max_size": 80}},
            "max_size is 80 and images of at least 96 are wanted",
        ),
    ],
)
def test_sizes_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        config(**{"source": "folder"} | options)


def test_the_centred_crop_is_the_largest_of_the_shape():
    image = ramps(100, 200)  # of which 100x150 have the shape of 64x96, from column 25 on
    crop = centre_crop(image, (64, 96))
    assert crop.shape == (64, 96, 3)
    assert np.abs(crop[0, :, 1].astype(float) - (25 + (np.arange(96) + 0.5) * 150 / 96)).max() < 2
    tall = centre_crop(image, (96, 64))
    assert tall.shape == (96, 64, 3) and abs(float(tall[50, 32, 1]) - 100) < 2
    assert np.array_equal(
        prepared(as_png(image), config("x", image_size=[100, 150])), image[:, 25:175]
    )


@pytest.mark.parametrize("size", [(16, 24), (40, 16), (16, 16)])
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    scale=st.sampled_from([1.0, 0.7, 0.3]),
    draw=st.integers(0, 2**62),
    flip=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_any_aspect_ratio_gives_the_size_asked_for(size, width, height, scale, draw, flip):
    varied = config("x", image_size=size, crop="random", crop_scale=scale, flip=flip)
    image = prepared(encoded(size=(width, height)), varied)
    assert image.shape[0] >= size[0] and image.shape[1] >= size[1]
    for chosen in (None, draw):
        assert crop_of(image, varied, chosen).shape == (*size, 3)


def test_random_crops_keep_the_shape_and_reach_every_side():
    image = ramps(60, 200)
    tops = set()
    lefts = set()
    for draw in range(400):
        crop = random_crop(image, (20, 30), crop=True, flip=False, draw=draw).astype(float)
        high = np.ptp(crop[:, 0, 0])
        assert abs(np.ptp(crop[0, :, 1]) / 29 - high / 19) < 0.15  # neither stretched nor squeezed
        tops.add(int(crop[0, 0, 0]))
        lefts.add(int(crop[0, 0, 1]))
    assert min(tops) <= 1 and max(tops) >= 38 and min(lefts) <= 3 and max(lefts) >= 160


def test_images_that_do_not_cover_the_size_are_left_out(tmp_path):
    for number, size in enumerate([(48, 32)] * 12 + [(40, 40), (32, 48), (47, 90), (100, 31)]):
        Image.new("RGB", size, (number, 0, 0)).save(tmp_path / f"{number:02}.png")
        (tmp_path / f"{number:02}.txt").write_text("an image")
    train, held_out = load_sources(config(tmp_path, image_size=[32, 48]))
    assert len(train) + len(held_out) == 12 and train.images([0, 1]).shape == (2, 32, 48, 3)
    assert sorted(line[:60] for line in train.problems) == [
        "1 images smaller than 32 pixels left out (data.upscale=true ",
        "3 images that do not cover 48x32 pixels (width x height) lef",
    ]
    train, held_out = load_sources(config(tmp_path, image_size=[32, 48], upscale=True))
    assert len(train) + len(held_out) == 16


def test_streamed_images_are_judged_upright(tmp_path):
    """A photo that lies on its side covers a tall rectangle, though its pixels are stored wide."""
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = encoded(size=(48, 32), form="JPEG", exif=exif.tobytes())
    plain = encoded(size=(48, 32), form="JPEG")
    samples = [(f"{n:03}", {"jpg": (wide, plain)[n % 2], "txt": b"x"}) for n in range(40)]
    write_shard(tmp_path / "0.tar", samples)
    options = config(tmp_path / "0.tar", image_size=[48, 32], streaming=True)
    stream, held_out = load_sources(options)
    names = [sample.name for sample in stream.first(40)]
    assert names == [f"{n:03}" for n in range(0, 40, 2)]
    assert held_out.images([0]).shape == (1, 48, 32, 3)
