"""Ranges of images given to the Python API: PIL images of more than 8 bits, and tensors."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from stage1_tokenizer import TokenizerConfig, TokenizerModule, pixels, to_model_range, to_rgb
from stage1_tokenizer.value_range import possible_ranges, to_8_bits

RAMP = np.linspace(0, 1, 256).reshape(16, 16)


@pytest.fixture(scope="module")
def tokenizer() -> TokenizerModule:
    torch.manual_seed(0)
    config = TokenizerConfig(image_size=16, num_codes=16, width=16, downsample_factor=4)
    return TokenizerModule(config).eval()


@pytest.mark.parametrize("high", [255, 1023, 4095, 16383, 65535])
def test_all_values_of_a_range_are_scaled_evenly(high):
    shown = to_8_bits(np.arange(high + 1), (0, high))
    counts = np.bincount(shown, minlength=256)
    assert shown[0] == 0 and shown[-1] == 255 and np.ptp(counts[1:-1]) <= 1
    assert (np.diff(shown.astype(int)) >= 0).all()


def test_values_beyond_a_range_are_clipped():
    assert to_8_bits(np.array([-5.0, 0.0, 5.0, 10.0, 99.0]), (0, 10)).tolist() == [
        0,
        0,
        128,
        255,
        255,
    ]


def test_a_range_is_possible_only_where_values_reach_it():
    assert possible_ranges(0, 4095, floats=False) == ["12bit"]
    assert possible_ranges(0, 700, floats=False) == ["10bit", "12bit"]
    assert possible_ranges(-1, 4095, floats=False) == []
    assert possible_ranges(0, 70000, floats=False) == []
    assert possible_ranges(0, 1, floats=True) == ["[0, 1]"]
    assert possible_ranges(0, 0.01, floats=True) == []


@pytest.mark.parametrize(
    ("values", "value_range"),
    [
        ((RAMP * 4095).astype(np.uint16), (0, 4095)),
        (RAMP.astype(np.float32), (0, 1)),
        ((RAMP * 2000 - 1000).astype(np.int32), (-1000, 1000)),
    ],
)
def test_pil_images_of_a_doubtful_range_need_one(tokenizer, values, value_range):
    image = Image.fromarray(values)
    with pytest.raises(ValueError, match=r"which of them is white .*to_rgb\(image, value_range="):
        to_rgb(image)
    with pytest.raises(ValueError, match="which of them is white"):
        tokenizer.to_codes([image])
    expected = Image.fromarray((RAMP * 255).round().astype(np.uint8)).convert("RGB")
    shown = np.asarray(to_rgb(image, value_range)).astype(int)
    assert np.abs(shown - np.asarray(expected)).max() <= 1
    assert tokenizer.to_codes([image], value_range).shape == (1, 4, 4)


def test_pil_images_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        to_rgb(Image.new("F", (4, 4), float("nan")), (0, 1))
    with pytest.raises(ValueError, match="the value range is"):
        to_rgb(Image.new("F", (4, 4), 1.0), (1, 1))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "must be floats in"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.int64), "must be floats in"),
        (torch.full((1, 3, 16, 16), float("nan")), "not finite"),
        (torch.full((1, 3, 16, 16), float("inf")), "not finite"),
        (torch.rand(1, 3, 16, 16) * 255, r"must be in \[-1, 1\]; of 0\.\.255, pass pixels / 127"),
        (torch.randn(1, 3, 16, 16) * 5, r"must be in \[-1, 1\]"),
        (torch.zeros(1, 16, 16, 3), r"permute\(0, 3, 1, 2\) puts channels first"),
        (torch.zeros(1, 1, 16, 16), r"must be \(batch, 3, height, width\)"),
    ],
)
def test_pixels_of_another_range_or_form_are_refused(tokenizer, given, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(given)


def test_pixels_of_other_libraries_are_warned_of_once(tokenizer, caplog, monkeypatch):
    monkeypatch.setattr(pixels, "_warned", [])
    random = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.WARNING):
        tokenizer.encode(2 * random - 1)
        tokenizer.encode(torch.ones(1, 3, 16, 16))  # white
        assert not caplog.records
        tokenizer.encode(random)
        tokenizer.encode(random)
    (record,) = caplog.records
    assert "pass 2 * pixels - 1" in record.getMessage()


def test_bright_images_that_we_convert_are_not_warned_of(tokenizer, caplog, monkeypatch):
    monkeypatch.setattr(pixels, "_warned", [])
    bright = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    part = torch.cat([bright, bright - 1], dim=3)  # tiles of it are all in [0, 1]
    with caplog.at_level(logging.WARNING):
        # As a module of ours would call it
        exec("tokenizer.encode(bright)", {"__name__": "pipeline.x"} | locals())
        tokenizer.reconstruct(part, tile=16)
        assert not caplog.records
        tokenizer.reconstruct(bright, tile=16)
    (record,) = caplog.records
    assert "pass 2 * pixels - 1" in record.getMessage()


def test_only_uint8_images_are_put_in_the_models_range():
    with pytest.raises(ValueError, match="must be uint8"):
        to_model_range(torch.rand(1, 4, 4, 3))
