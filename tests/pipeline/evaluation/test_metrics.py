"""Metrics of a tokenizer and a prior against what is computed image by image."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.evaluation.metrics import BATCH, autocast, prior_metrics, sampled, tokenizer_metrics
from stage1_tokenizer import count_codes, distinct_codes, to_model_range
from stage1_tokenizer.metrics import psnr, ssim
from stage2_prior import code_log_likelihood
from tests.helpers.pipelines import CAPTIONS, tiny_pipeline

COUNT = BATCH + 3


class Noise:
    """Random images, whose captions repeat."""

    def images(self, rows):
        return np.stack(
            [
                np.random.default_rng(row).integers(0, 256, (16, 16, 3), dtype=np.uint8)
                for row in rows
            ]
        )

    def captions(self, rows):
        return [CAPTIONS[row % len(CAPTIONS)] for row in rows]


def codes_of(pipe, count: int) -> torch.Tensor:
    images = Noise().images(range(count))
    return torch.cat([pipe.tokenizer.encode(to_model_range(torch.from_numpy(images)))])


def test_tokenizer_metrics_are_those_of_each_image_and_of_all_codes():
    pipe = tiny_pipeline()
    found = tokenizer_metrics(pipe, Noise(), COUNT)
    assert np.array_equal(found.real, Noise().images(range(COUNT)))
    codes = codes_of(pipe, COUNT)
    drawn = np.stack([np.asarray(image) for image in pipe.tokenizer.to_images(codes)])
    assert np.abs(found.drawn.astype(int) - drawn).max() <= 1
    each = [psnr(a, b) for a, b in zip(found.real, found.drawn, strict=True)]
    assert found.metrics["psnr"] == pytest.approx(np.mean(each))
    assert found.metrics["ssim"] == pytest.approx(ssim(found.real, found.drawn))
    counts = torch.bincount(codes.flatten(), minlength=12)
    p = counts[counts > 0] / counts.sum()
    assert found.metrics["codebook_usage"] == pytest.approx(float((counts > 0).float().mean()))
    assert found.metrics["codebook_perplexity"] == pytest.approx(
        float((-(p * p.log()).sum()).exp()), rel=1e-5
    )


def test_equal_images_have_a_psnr_of_99_in_the_mean(monkeypatch):
    pipe = tiny_pipeline()
    source = Noise()
    fixed = source.images([5])
    monkeypatch.setattr(source, "images", lambda rows: fixed.repeat(len(rows), 0))
    image = Image.fromarray(fixed[0])
    monkeypatch.setattr(pipe.tokenizer, "to_images", lambda codes: [image] * len(codes))
    assert tokenizer_metrics(pipe, source, 3).metrics["psnr"] == 99.0


def test_several_levels_have_their_own_usage():
    found = tokenizer_metrics(tiny_pipeline(quantizer="residual"), Noise(), 4).metrics
    assert {"codebook_usage", "codebook_usage_level_1", "codebook_usage_level_2"} <= set(found)


@pytest.mark.parametrize("quantizer", ["vq", "residual"])
def test_agreement_is_that_of_images_saved_as_png_and_as_jpeg(tmp_path, quantizer):
    pipe = tiny_pipeline(quantizer=quantizer)
    found = tokenizer_metrics(pipe, Noise(), COUNT)
    codes = codes_of(pipe, COUNT)
    images = [Image.fromarray(image) for image in found.drawn]
    for name, suffix, options in (
        ("reencode_agreement", "png", {}),
        ("reencode_agreement_jpeg95", "jpg", {"quality": 95}),
    ):
        saved = []
        for number, image in enumerate(images):
            image.save(tmp_path / f"{number}.{suffix}", **options)
            saved.append(Image.open(tmp_path / f"{number}.{suffix}"))
        kept = pipe.tokenizer.to_codes(saved) == codes
        assert 0 < found.metrics[name] < 1
        assert found.metrics[name] == pytest.approx(float(kept.float().mean()), abs=0.01)
    counts = count_codes(codes, pipe.tokenizer.layout)
    for level, number in distinct_codes(pipe.tokenizer, counts).items():
        assert found.metrics[f"distinct_codes{level}"] == number
        assert f"reencode_agreement_jpeg95{level}" in found.metrics


def test_nats_per_code_are_the_mean_negative_log_likelihood():
    pipe = tiny_pipeline()
    found = prior_metrics(pipe, Noise(), COUNT)
    ids = pipe.text.encode(Noise().captions(range(COUNT)), truncate=True)
    expected = -code_log_likelihood(pipe.prior, ids, codes_of(pipe, COUNT).flatten(1)).mean()
    assert found["nats_per_code"] == pytest.approx(float(expected), rel=1e-5)
    assert set(found) == {"nats_per_code", "nats_per_text_token"}
    assert not pipe.prior.training


def test_a_prior_with_a_text_encoder_has_nats_per_code_alone():
    assert set(prior_metrics(tiny_pipeline(text_depth=1), Noise(), 8)) == {"nats_per_code"}


def test_orders_are_those_of_the_training_and_repeat():
    pipe = tiny_pipeline(any_order=True)
    random = prior_metrics(pipe, Noise(), 8)
    assert prior_metrics(pipe, Noise(), 8) == random
    pipe.prior.config.trained_order = "raster"
    assert prior_metrics(pipe, Noise(), 8)["nats_per_code"] != random["nats_per_code"]


def test_a_prior_that_captions_has_nats_per_caption_token():
    pipe = tiny_pipeline()
    pipe.prior.config.trained_image_first = True
    assert prior_metrics(pipe, Noise(), 4)["nats_per_caption_token"] > 0


def test_sampled_is_one_image_per_prompt_of_seed_0():
    pipe = tiny_pipeline()
    drawn = sampled(pipe, CAPTIONS)
    expected = pipe(CAPTIONS, seed=0).images
    assert drawn.shape == (4, 16, 16, 3) and drawn.dtype == np.uint8
    assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(drawn, expected, strict=True))


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_the_precision_is_that_of_the_experiment(precision, dtype):
    pipe = SimpleNamespace(tokenizer=SimpleNamespace(device=torch.device("cpu")))
    with autocast(pipe, precision):  # type: ignore[arg-type]
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
