"""Bits per code and per pixel: they are those of the bound."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.inference.likelihood import model_of
from pipeline.likelihood.estimate import image_likelihood
from pipeline.likelihood.model import LatentModel
from pipeline.likelihood.surprise import surprise
from tests.helpers.pipelines import CAPTIONS, tiny_pipeline
from tests.helpers.tokenizers import KINDS, tiny_tokenizer


@pytest.fixture
def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 16, 16, 3), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("likelihood", ["discretized_logistic", "calibrated_l2"])
@pytest.mark.parametrize(
    ("kind", "any_order"), [("vq", False), ("vq", True), ("hierarchical", False)]
)
def test_the_bits_of_codes_and_pixels_sum_to_the_description_length(
    kind, any_order, likelihood, images
):
    pipe = tiny_pipeline(any_order=any_order, likelihood=likelihood, **KINDS[kind])
    ids = pipe.text.encode(CAPTIONS[:2])
    found = image_likelihood(model_of(pipe), ids, images)
    maps = surprise(model_of(pipe), ids, images)
    side = pipe.tokenizer.likelihood.side_nats
    assert len(maps) == 2
    for row, own in enumerate(maps):
        assert [tuple(part.shape) for part in own.codes] == [
            level.grid for level in pipe.tokenizer.layout
        ]
        assert own.pixels.shape == (16, 16)
        rate = float(sum(part.sum() for part in own.codes)) * math.log(2)
        assert rate == pytest.approx(float(found.rate[row]), rel=1e-5)
        nats = float(own.pixels.sum()) * math.log(2) + side
        assert nats == pytest.approx(float(found.distortion[row]), rel=1e-9)


def test_latents_have_bits_of_pixels_alone_and_those_of_the_first_sample(images):
    model = LatentModel(tiny_tokenizer(quantizer="gaussian"))
    ids = torch.zeros(2, 0, dtype=torch.long)
    found = image_likelihood(model, ids, images, seed=3)
    for own, distortion in zip(surprise(model, ids, images, seed=3), found.distortion, strict=True):
        assert own.codes == []
        assert float(own.pixels.sum()) * math.log(2) == pytest.approx(float(distortion))
