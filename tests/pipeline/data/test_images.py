"""From a file to a square: formats, sizes, crops, refusals; and the settings of a map source."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.config.builtin import ShapesOptions
from pipeline.config.data import DataConfig, FilterOptions, StreamOptions
from pipeline.data import map_source
from pipeline.data.load import load_source, load_sources
from pipeline.data.readers.images import (
    centre_crop,
    decoded,
    open_image,
    pixels_decoded,
    prepared,
    random_crop,
)
from stage1_tokenizer import resize_and_crop
from tests.helpers.data import config, encoded, photo


def as_file(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2)))


def test_jpegs_decoded_small_look_as_if_decoded_whole():
    for seed in range(4):
        content = as_file(photo(seed, (300, 260)), "JPEG", quality=90)
        whole = np.asarray(resize_and_crop(open_image(content), 32))
        assert open_image(content, at_least=64).size < (300, 260)
        assert (
            psnr(
                whole,
                centre_crop(prepared(content, DataConfig(source="x", image_size=32)), (32, 32)),
            )
            > 40
        )


def test_no_other_program_is_started_for_an_image(tmp_path):
    """Pillow hands EPS to Ghostscript, which runs what the file says."""
    Image.new("RGB", (20, 20)).save(tmp_path / "a.eps", "EPS")
    with pytest.raises(ValueError, match="it is of no known format"):
        open_image((tmp_path / "a.eps").rename(tmp_path / "a.png"))


def test_an_image_is_judged_by_its_full_size_when_upright():
    content = as_file(photo(0, (640, 320)), "JPEG")
    with decoded(content, 40) as found:
        assert (found.width, found.height) == (640, 320)
        assert found.image.size < (640, 320)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    with decoded(as_file(photo(0, (640, 320)), "JPEG", exif=exif.tobytes()), 40) as found:
        assert (found.width, found.height) == (320, 640)


@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    at_least=st.integers(1, 300),
    form=st.sampled_from(["JPEG", "PNG"]),
)
@settings(max_examples=200, deadline=None)
def test_pixels_decoded_are_known_beforehand(width, height, at_least, form):
    content = encoded((9, 9, 9), (width, height), form)
    with decoded(content, at_least) as found:
        pixels = pixels_decoded(found.width, found.height, found.shrinks, at_least)
        assert pixels == found.image.width * found.image.height


@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    scale=st.sampled_from([1.0, 0.7, 0.3]),
    draw=st.integers(0, 2**62),
    flip=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_aspect_ratio_gives_a_square(width, height, scale, draw, flip):
    image = prepared(
        as_file(photo(1, (width, height)), "PNG"), config("x", crop="random", crop_scale=scale)
    )
    assert min(image.shape[:2]) >= 16
    for part in (
        centre_crop(image, (16, 16)),
        random_crop(image, (16, 16), crop=True, flip=flip, draw=draw),
    ):
        assert part.shape == (16, 16, 3)
    again = random_crop(image, (16, 16), crop=True, flip=flip, draw=draw)
    assert np.array_equal(part, again)


def test_random_crops_cover_the_image_and_half_are_flipped():
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None], (16, 64, 3))
    lefts = {
        int(random_crop(ramp, (16, 16), crop=True, flip=False, draw=d)[0, 0, 0]) for d in range(600)
    }
    assert lefts == set(range(49))
    flipped = [
        bool(
            np.diff(
                random_crop(ramp, (16, 16), crop=False, flip=True, draw=d)[0, :2, 0].astype(int)
            )[0]
            < 0
        )
        for d in range(400)
    ]
    assert 160 < sum(flipped) < 240
    large = np.broadcast_to(np.arange(40, dtype=np.uint8)[None, :, None], (40, 40, 3))
    spans = [
        np.ptp(random_crop(large, (20, 20), crop=True, flip=False, draw=d).astype(int))
        for d in range(300)
    ]
    assert min(spans) < 22 and max(spans) > 36  # squares of half the side and of all of it


def bomb() -> bytes:
    """A small PNG that declares 10,000 x 10,000 pixels."""
    header = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", len(header))
        + chunk
        + struct.pack(">I", zlib.crc32(chunk))
        + b"\0\0\0\0IDAT"
        + b"\0" * 4
    )


def test_decompression_bombs_animations_and_odd_modes_are_handled(tmp_path):
    """A bomb is refused by what it claims; of an animation the first frame is seen; every mode
    becomes RGB."""
    with warnings.catch_warnings():
        # As outside of tests, where Pillow's warning would not stop it
        warnings.simplefilter("ignore")
        with pytest.raises(
            ValueError,
            match=r"10000x10000 pixels, and at most 64,000,000 are decoded; scale it down",
        ):
            open_image(bomb())
    (tmp_path / "bomb.png").write_bytes(bomb())
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "animated.gif", save_all=True, append_images=frames[1:])
    Image.new("I;16", (20, 20), 65535).save(tmp_path / "deep.png")
    Image.new("CMYK", (20, 20), (0, 0, 0, 0)).save(tmp_path / "print.jpg")
    Image.new("RGBA", (20, 20), (1, 2, 3, 0)).save(tmp_path / "clear.png")
    for file in list(tmp_path.iterdir()):
        file.with_suffix(".txt").write_text(file.stem)
    found = {}
    for split in load_sources(config(tmp_path, filter={"max_corrupt_fraction": 0.5})):
        if len(split):
            found |= dict(
                zip(
                    split.captions(range(len(split))),
                    split.images(range(len(split)))[:, 5, 5].tolist(),
                    strict=True,
                )
            )
    white = [255, 255, 255]
    assert found == {"animated": [255, 0, 0], "deep": white, "print": white, "clear": white}
    # Too large is a limit of ours, and no damage.
    assert split.problems == [
        "1 images of more than 64,000,000 pixels left out (data.max_pixels): bomb.png",
        "1 images have more than 8 bits per value (integers from 65535 to 65535); 0 is shown black "
        "and 65535 white (data.value_range)",
    ]


def images_of(folder, sizes: dict[str, tuple[int, int]]) -> None:
    for number, (name, size) in enumerate(sizes.items()):
        photo(number, size).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(name)


def kept(folder, **options: object) -> set[str]:
    return {
        c
        for split in load_sources(config(folder, **options))
        for c in split.captions(range(len(split)))
    }


def test_size_and_shape_filters_skip_and_count(tmp_path):
    images_of(
        tmp_path,
        {
            "tiny": (12, 12),
            "small": (20, 20),
            "good": (40, 50),
            "wide": (120, 30),
            "large": (200, 190),
        },
    )
    assert kept(tmp_path) == {"small", "good", "wide", "large"}
    assert kept(tmp_path, filter={"min_size": 25}) == {"good", "wide", "large"} and kept(
        tmp_path, filter={"min_size": 35}
    ) == {"good", "large"}
    assert kept(tmp_path, filter={"max_size": 100, "max_aspect": 2}) == {"small", "good"}
    assert kept(tmp_path, upscale=True, filter={"max_aspect": 3}) == {
        "tiny",
        "small",
        "good",
        "large",
    }
    problems = load_source(
        config(tmp_path, filter={"min_size": 25, "max_size": 150, "max_aspect": 2}), "train"
    ).problems
    assert problems == [
        "2 images smaller than 25 pixels left out: small.png, tiny.png",
        "1 images larger than 150 pixels left out: large.png",
        "1 images more than 2 times as long as wide left out: wide.png",
    ]


def test_augmentation_seeds_vary_images_only_if_configured(tmp_path):
    images_of(tmp_path, {f"p{i}": (60, 24) for i in range(4)})
    plain = load_source(config(tmp_path), "train")
    rows = list(range(len(plain)))
    assert np.array_equal(plain.images(rows), plain.images(rows, [1] * len(rows)))
    varied = load_source(config(tmp_path, crop="random", crop_scale=0.8, flip=True), "train")
    one, two = varied.images(rows, [1] * len(rows)), varied.images(rows, [2] * len(rows))
    assert not np.array_equal(one, two) and np.array_equal(
        one, varied.images(rows, [1] * len(rows))
    )
    assert psnr(varied.images(rows), plain.images(rows)) > 30


def test_images_that_fit_the_cache_are_decoded_once(tmp_path, monkeypatch):
    images_of(tmp_path, {f"p{i}": (20, 20) for i in range(12)})
    decoded: list[int] = []
    monkeypatch.setattr(
        map_source,
        "prepared",
        lambda *given, **options: decoded.append(1) or prepared(*given, **options),
    )
    for memory, times in ((1.0, 1), (0.0, 2), (2 * 16 * 16 * 3 / 2**30, None)):
        decoded.clear()
        source = load_source(config(tmp_path, cache_gb=memory), "train")
        first, second = source.images(range(len(source))), source.images(range(len(source)))
        assert np.array_equal(first, second)
        assert len(decoded) == (times * len(source) if times else 2 * len(source) - 2)


def test_an_image_that_vanishes_while_training_is_named(tmp_path):
    images_of(tmp_path, {"a": (20, 20), "b": (20, 20), "c": (20, 20)})
    source = load_source(config(tmp_path, cache_gb=0.0), "train")
    for file in tmp_path.glob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"\.png of .* could be read before and cannot now .*put it back as it was"
    ):
        source.images(range(len(source)))


def test_all_invalid_settings_are_named():
    with pytest.raises(ValueError) as error:
        DataConfig(
            source="x",
            filter=FilterOptions(
                min_size=8, max_size=4, max_aspect=0.5, min_caption=5, max_caption=2
            ),
            stream=StreamOptions(shuffle_buffer=0),
            shapes=ShapesOptions(num_scenes=0, grid_cells=5),
            crop_scale=0.5,
            cache_gb=-1,
            workers=0,
        )
    for part in (
        "filter.min_size is 8, below",
        "filter.max_size is 4",
        "filter.max_aspect is 0.5",
        "filter.max_caption is 2",
        "crop_scale is 0.5",
        "cache_gb is -1",
        "workers is 0",
        "stream.shuffle_buffer is 0",
        "shapes.num_scenes is 0",
        "shapes.grid_cells is 5",
    ):
        assert f"data.{part}" in str(error.value)
    for options, message in (
        ({"source": "shapes", "flip": True}, "captions of the shapes say what is left and right"),
        ({"source": "emoji", "crop": "random"}, "shapes, emoji and icons fill their images"),
        ({"source": "emoji", "streaming": True}, "emoji are drawn here"),
        (
            {"source": "a", "mix": [mapped_part()]},
            "data.source is a and data.mix has 1 parts; give one of the two",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            DataConfig(**options)  # type: ignore[arg-type]


def mapped_part():
    from pipeline.config.data import MixPart

    return MixPart(source="b")


def test_images_of_few_bytes_are_read():
    assert resize_and_crop(open_image(encoded(size=(16, 16))), 16).size == (16, 16)


@pytest.mark.parametrize(("alpha", "said"), [("white", 1), ("keep", 0)])
def test_training_says_once_that_transparency_is_laid_on_a_background(
    monkeypatch, caplog, alpha, said
):
    monkeypatch.setattr("pipeline.data.readers.images._laid_on_background", [])
    caplog.set_level("INFO")
    own = DataConfig(source="images", image_size=16, alpha=alpha)
    for mode, colour in (("RGB", "red"), ("RGBA", (9, 9, 9, 0)), ("RGBA", (9, 9, 9, 0))):
        file = io.BytesIO()
        Image.new(mode, (8, 8), colour).save(file, "PNG")
        prepared(file.getvalue(), own)
    assert caplog.text.count("some images have transparency, which is laid on white") == said
