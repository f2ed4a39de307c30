"""Likelihoods that the pipeline reports: of given images, and of those that it samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.cli.main import main
from stage1_tokenizer import to_rgb
from stage2_prior import code_log_likelihood
from stage2_prior.order import kept_first, seeded_orders
from stage2_prior.scoring import NUM_SCORED_ORDERS
from tests.helpers.cli import fails
from tests.helpers.pipelines import CAPTIONS, tiny_pipeline

LENGTH = 16


def scoring_pipe(order: str = "random", caption_dropout: bool = True):
    pipe = tiny_pipeline(any_order=order != "raster")
    pipe.prior.config.trained_order = order
    pipe.prior.config.trained_with_caption_dropout = caption_dropout
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return scoring_pipe()


@pytest.fixture
def images() -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


def by_hand(pipe, images, prompts, order):
    """log p of the images' codes given the prompts and given none, in one order (N,)."""
    codes = pipe.tokenizer.to_codes(images).flatten(1)
    orders = order.expand(len(codes), -1)
    captions = (pipe.text.encode(prompts), pipe.prior.stream.null_caption(len(codes)))
    return [code_log_likelihood(pipe.prior, ids, codes, orders).sum(1) for ids in captions]


def test_a_prior_trained_on_random_orders_scores_by_the_mean_over_seeded_orders(pipe, images):
    scores = pipe.score(images, CAPTIONS)
    orders = seeded_orders(range(NUM_SCORED_ORDERS), LENGTH)
    given, null = torch.stack(
        [torch.stack(by_hand(pipe, images, CAPTIONS, order)) for order in orders]
    ).mean(0)
    torch.testing.assert_close(scores.log_likelihood, given)
    torch.testing.assert_close(scores.pmi, given - null)
    raster, _ = by_hand(pipe, images, CAPTIONS, torch.arange(LENGTH))
    assert not torch.allclose(scores.log_likelihood, raster, atol=0.01)


@pytest.mark.parametrize("order", ["raster", "annealed"])
def test_a_prior_trained_towards_raster_order_scores_in_it(images, order):
    pipe = scoring_pipe(order)
    scores = pipe.score(images, CAPTIONS)
    given, null = by_hand(pipe, images, CAPTIONS, torch.arange(LENGTH))
    torch.testing.assert_close(scores.log_likelihood, given)
    torch.testing.assert_close(scores.pmi, given - null)


def test_a_score_depends_on_neither_the_batch_nor_the_other_images(pipe, images):
    together = pipe.score(images, CAPTIONS)
    for batch_size in (1, 3):
        apart = pipe.score(images, CAPTIONS, batch_size=batch_size)
        torch.testing.assert_close(apart.log_likelihood, together.log_likelihood)
        torch.testing.assert_close(apart.pmi, together.pmi)
    alone = pipe.score(images[2], CAPTIONS[2])
    torch.testing.assert_close(alone.log_likelihood[0], together.log_likelihood[2])


@pytest.mark.parametrize("order", ["raster", "annealed"])
def test_sampling_reports_the_score_of_its_codes_whatever_guidance_and_temperature(
    images, order, monkeypatch
):
    pipe = scoring_pipe(order)
    drawn = pipe(CAPTIONS, guidance_scale=2.0, temperature=0.5, top_k=6)
    monkeypatch.setattr(pipe.tokenizer, "to_codes", lambda images: drawn.codes)
    torch.testing.assert_close(pipe.score(images, CAPTIONS).log_likelihood, drawn.log_likelihood)


@pytest.mark.parametrize("steps", [1, 3, None])
def test_log_likelihood_is_exact_in_the_order_sampled_with_any_number_of_steps(pipe, steps):
    out = pipe(CAPTIONS, num_inference_steps=steps, guidance_scale=2.0, temperature=0.5)
    ids = pipe.text.encode(CAPTIONS)
    orders = seeded_orders(out.seeds, LENGTH)
    given = code_log_likelihood(pipe.prior, ids, out.codes.flatten(1), orders).sum(1)
    torch.testing.assert_close(out.log_likelihood, given)


@pytest.mark.parametrize("steps", [1, 3, None])
def test_log_likelihood_of_a_completion_is_that_of_the_resampled_codes(pipe, images, steps):
    known = torch.arange(LENGTH) % 3 == 0
    out = pipe.complete(images[0], known, "a red star", num_images=3, num_inference_steps=steps)
    ids = pipe.text.encode(["a red star"] * 3)
    orders = kept_first(seeded_orders(out.seeds, LENGTH), known)
    log_p = code_log_likelihood(pipe.prior, ids, out.codes.flatten(1), orders)
    torch.testing.assert_close(out.log_likelihood, log_p[:, ~known].sum(1))


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "LA"])
def test_an_image_of_another_mode_is_scored_as_training_would_read_it(pipe, images, mode):
    image = images[0].convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(np.tile(np.arange(0, 256, 16, dtype=np.uint8), (16, 1))))
    read = pipe.score(to_rgb(image), "a red star").log_likelihood
    assert torch.equal(pipe.score(image, "a red star").log_likelihood, read)
    # Transparency is put on white and not left out.
    opaque = pipe.score(image.convert("RGB"), "a red star").log_likelihood
    assert torch.equal(opaque, read) == (mode not in ("RGBA", "LA"))


def test_an_empty_prompt_scores_without_a_caption(pipe, images):
    scores = pipe.score(images[:2], ["", "a red star"])
    orders = seeded_orders(range(NUM_SCORED_ORDERS), LENGTH)
    nulls = [by_hand(pipe, images[:1], [""], order)[1] for order in orders]
    torch.testing.assert_close(scores.log_likelihood[:1], torch.stack(nulls).mean(0))
    assert scores.pmi[0].abs() < 1e-5 < scores.pmi[1].abs()
    with pytest.raises(ValueError, match="an empty prompt needs a prior trained with caption drop"):
        scoring_pipe(caption_dropout=False).score(images[0], " ")


def test_a_prior_without_caption_dropout_scores_without_pmi(images):
    scores = scoring_pipe(caption_dropout=False).score(images, CAPTIONS)
    assert scores.log_likelihood.isfinite().all() and scores.pmi is None


def test_images_and_prompts_that_cannot_be_scored_are_named(pipe, images):
    long = "word " * 30
    small = images[0].resize((16, 12))
    for given, message in (
        (([], []), "^no image was given; give at least one, with a prompt for each$"),
        ((images, CAPTIONS[:3]), "^there are 4 images and 3 prompts; give one prompt per image$"),
        ((images, "a red star"), "^there are 4 images and 1 prompts; give one prompt per image$"),
        ((images[0], CAPTIONS), "^there are 1 images and 4 prompts; give one prompt per image$"),
        ((small, "x"), "^the image is 16x12 and this prior draws 16x16; crop or resize it first"),
        (([images[0], small], ["x", "x"]), "^image 1 is 16x12 and this prior draws 16x16"),
        ((images[0], long), "^the caption 'word word .*' needs 1[0-9]+ tokens and there are 24"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            pipe.score(*given)
        assert "\n" not in str(error.value)
    for batch_size in (0, -1):
        with pytest.raises(ValueError, match=f"batch_size is {batch_size}; it must be at least 1"):
            pipe.score(images, CAPTIONS, batch_size=batch_size)
    cut = pipe.score(images[0], long, truncate=True).log_likelihood
    same = pipe.score(images[0], "word " * 29, truncate=True).log_likelihood
    torch.testing.assert_close(cut, same)


def test_best_of_a_prior_that_cannot_be_scored_is_refused_before_sampling(
    tmp_path, monkeypatch, capsys
):
    pipe = scoring_pipe(caption_dropout=False)
    sampled = []
    monkeypatch.setattr(
        "pipeline.inference.plan.sample_codes_batched", lambda *_, **__: sampled.append(1)
    )
    with pytest.raises(
        ValueError, match=r"best_of is 2.*judge consensus .* CLIP model .*caption_dropout=0\.1$"
    ):
        pipe("a red star", best_of=2)
    pipe.save_pretrained(tmp_path / "bundle")
    command = ["generate", "--bundle", tmp_path / "bundle", "a red star", "--best-of", 2]
    fails(capsys, [*command, "--out", tmp_path / "out"], "best_of is 2", "clip_scorer")
    assert not sampled and not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert main([str(a) for a in [*command[:-2], "--out", tmp_path / "out"]]) == 0
