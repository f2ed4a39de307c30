"""Bits per dimension of held-out images against those of each image."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.evaluation.evaluate import Report
from pipeline.evaluation.likelihood import likelihood_metrics
from pipeline.evaluation.mean import Mean
from pipeline.inference.likelihood import model_of
from pipeline.likelihood.estimate import image_likelihood
from tests.helpers.pipelines import CAPTIONS, tiny_pipeline

COUNT = 67


def source(levels=256) -> SimpleNamespace:
    """Random images of these values, whose captions repeat."""
    values = np.random.default_rng(0).choice(levels, (COUNT, 16, 16, 3)).astype(np.uint8)
    return SimpleNamespace(
        images=lambda rows: values[list(rows)],
        captions=lambda rows: [CAPTIONS[row % len(CAPTIONS)] for row in rows],
    )


def test_bits_are_the_sum_of_distortion_and_rate_and_those_of_each_image():
    pipe = tiny_pipeline(likelihood="discretized_logistic")
    images = source()
    found = likelihood_metrics(pipe, images, COUNT)
    ids = pipe.text.encode(images.captions(range(COUNT)))
    pixels = torch.from_numpy(images.images(range(COUNT)))
    each = image_likelihood(model_of(pipe), ids, pixels)
    assert found["bits_per_dimension"].count == COUNT
    expected = Mean.of(each.bits_per_dimension.tolist())
    assert found["bits_per_dimension"].value == pytest.approx(expected.value, rel=1e-6)
    assert found["bits_per_dimension"].interval == pytest.approx(expected.interval, rel=1e-5)
    bits = 16 * 16 * 3 * math.log(2)
    for name, nats in (("distortion", each.distortion), ("rate", each.rate)):
        mean = found[f"{name}_bits_per_dimension"].value
        assert mean == pytest.approx(float(nats.mean()) / bits, rel=1e-5)


def test_images_without_a_probability_have_no_bits():
    pipe = tiny_pipeline(likelihood="bernoulli")
    assert likelihood_metrics(pipe, source(), COUNT) == {}
    assert set(likelihood_metrics(pipe, source([0, 255]), COUNT)) == {
        "bits_per_dimension",
        "distortion_bits_per_dimension",
        "rate_bits_per_dimension",
    }


def test_one_image_has_no_interval():
    pipe = tiny_pipeline()
    report = Report()
    report.add(likelihood_metrics(pipe, source(), 1))
    assert len(report.metrics) == 3 and report.estimates == {}


def test_the_table_has_bits_with_their_interval():
    report = Report()
    report.add({"rate_bits_per_dimension": Mean(0.0123, 0.01, 100)})
    line = "  rate_bits_per_dimension  0.012  95% interval 0.010 to 0.014, of 100"
    assert report.table() == line
