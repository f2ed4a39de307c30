"""`minidalle compress` and `decompress`: files, messages, and that failures write nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.cli.main import main
from tests.helpers.cli import fails
from tests.helpers.image_files import png_of_16_bits
from tests.helpers.pipelines import tiny_pipeline


def save_bundle(folder: Path, **changes: object) -> Path:
    pipe = tiny_pipeline(likelihood="discretized_logistic", **changes)
    pipe.prior.config.trained_with_caption_dropout = True
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return save_bundle(tmp_path_factory.mktemp("bundles") / "bundle")


@pytest.fixture
def image(tmp_path) -> Path:
    values = np.random.default_rng(0).normal(128, 40, (16, 16, 3)).clip(0, 255)
    path = tmp_path / "image.png"
    Image.fromarray(values.astype(np.uint8)).save(path)
    return path


def run(*arguments: object) -> None:
    assert main([str(a) for a in arguments]) == 0


def test_files_come_back_bit_for_bit_and_the_bits_are_printed(bundle, image, tmp_path, capsys):
    packed = tmp_path / "new" / "image.mdc"
    back = tmp_path / "back.png"
    run("compress", image, "--bundle", bundle, "--out", packed, "--prompt", "a red star")
    size = packed.stat().st_size
    printed = capsys.readouterr().out
    assert f"wrote {packed}: {size} bytes, {8 * size / 768:.3f} bits per dimension" in printed
    assert "claimed: " in printed and "for the codes and" in printed
    run("decompress", packed, "--bundle", bundle, "--out", back)
    printed = capsys.readouterr().out
    assert f"wrote {back}: 16x16 from {size} bytes" in printed and "prompt: a red star" in printed
    with Image.open(back) as received, Image.open(image) as sent:
        assert received.format == "PNG" and received.mode == "RGB"
        assert np.array_equal(np.asarray(received), np.asarray(sent))


def test_an_image_that_would_not_come_back_is_refused(bundle, image, tmp_path, capsys):
    out = tmp_path / "out.mdc"
    grey = tmp_path / "grey.png"
    with Image.open(image) as original:
        original.convert("L").save(grey)
    small = tmp_path / "small.png"
    with Image.open(image) as original:
        original.resize((8, 8)).save(small)
    text = tmp_path / "text.png"
    text.write_text("no image")
    deep = png_of_16_bits(tmp_path / "deep.png")
    for given, *messages in (
        (grey, f"{grey}: the image has mode L and would not come back", "convert"),
        (small, f"{small}: the image is 8x8 and this bundle compresses images of 16x16"),
        (text, f"{text} cannot be read as an image"),
        (deep, f"{deep} has 16 bits per value, and only 8 can be read exactly"),
        (tmp_path / "none.png", "there is no image"),
    ):
        fails(capsys, ["compress", given, "--bundle", bundle, "--out", out], *messages)
    folder = ["compress", image, "--bundle", bundle, "--out", tmp_path]
    fails(capsys, folder, f"{tmp_path} is a folder; name a file in it")
    before = image.read_bytes()
    itself = ["compress", image, "--bundle", bundle, "--out", image.parent / "." / image.name]
    fails(capsys, itself, "is the file to read, and would be overwritten; write to another")
    assert image.read_bytes() == before
    two = ["compress", image, image, "--bundle", bundle, "--out", out]
    fails(capsys, two, "2 images were given; give one", status=2)
    assert not out.exists() and not list(tmp_path.glob(".*"))


def test_a_file_that_cannot_be_decompressed_is_refused(bundle, image, tmp_path, capsys):
    packed = tmp_path / "image.mdc"
    out = tmp_path / "out.png"
    out.write_bytes(b"what was there")
    run("compress", image, "--bundle", bundle, "--out", packed)
    cut = tmp_path / "cut.mdc"
    cut.write_bytes(packed.read_bytes()[:-9])
    other = save_bundle(tmp_path / "other", num_codes=11)
    for file, folder, *messages in (
        (cut, bundle, f"{cut}: it is truncated or damaged; copy it again"),
        (image, bundle, f"{image}: it is no compressed image; `minidalle compress` makes one"),
        (packed, other, f"{packed}: it was compressed with another bundle", "with that one"),
        (tmp_path / "none", bundle, "there is no file"),
        (packed, tmp_path, "holds no pipeline.json"),
    ):
        fails(capsys, ["decompress", file, "--bundle", folder, "--out", out], *messages)
    jpeg = ["decompress", packed, "--bundle", bundle, "--out", tmp_path / "out.jpg"]
    fails(capsys, jpeg, "the image is written as PNG", "name it .png")
    assert out.read_bytes() == b"what was there"
    assert not (tmp_path / "out.jpg").exists() and not list(tmp_path.glob(".*"))
