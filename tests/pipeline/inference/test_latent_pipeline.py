"""`LatentPipeline`: what its images depend on, its bundle, and what it refuses."""

from __future__ import annotations

import shutil
import warnings

import numpy as np
import pytest
import torch

from pipeline import TextToImagePipeline
from pipeline.inference.base import image_seed
from pipeline.inference.latent_pipeline import LatentPipeline
from stage2_prior import SamplingOptions
from tests.helpers.pipelines import CAPTIONS, tiny_latent_pipeline, tiny_pipeline

KINDS = ["standard", "mixture", "vamp", "aggregated", "realnvp", "maf"]


def pixels(output) -> np.ndarray:
    return np.stack([np.asarray(image) for image in output.images])


@pytest.mark.parametrize("kind", ["mixture", "realnvp", "maf"])
def test_an_image_depends_on_its_prompt_and_seed_and_not_on_the_batch(kind):
    pipe = tiny_latent_pipeline(kind)
    whole = pipe(CAPTIONS, num_images_per_prompt=3, seed=5)
    assert whole.latents.shape == (12, 64) and whole.codes.shape == (12, 0)
    assert whole.seeds == [image_seed(5, i) for _ in CAPTIONS for i in range(3)]
    for batch_size in (1, 5):
        again = pipe(CAPTIONS, num_images_per_prompt=3, seed=5, batch_size=batch_size)
        torch.testing.assert_close(again.latents, whole.latents, rtol=1e-4, atol=1e-4)
        assert np.abs(pixels(again).astype(int) - pixels(whole)).max() <= 1
    alone = pipe(CAPTIONS[2], num_images_per_prompt=2, seed=5)
    torch.testing.assert_close(alone.latents, whole.latents[6:8], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(pipe(CAPTIONS[2], seed=6).latents, whole.latents[6:7])
    if kind != "mixture":  # whose weights alone depend on the caption
        assert not torch.allclose(whole.latents[0], whole.latents[3])


def test_output_has_the_log_density_of_its_latents():
    pipe = tiny_latent_pipeline("maf")
    output = pipe(CAPTIONS[:2], num_images_per_prompt=2, temperature=0.7)
    ids = pipe.text.encode(CAPTIONS[:2]).repeat_interleave(2, dim=0)
    expected = pipe.prior.log_prob(output.latents, pipe.prior.encode_text(ids))
    torch.testing.assert_close(output.log_likelihood, expected)
    assert not output.log_likelihood.requires_grad
    some = output.rows([3, 0])
    assert torch.equal(some.latents, output.latents[[3, 0]])


def test_temperature_scales_the_noise_of_latents_and_not_the_choice_of_a_component():
    flow = tiny_latent_pipeline("standard", 0)
    one = flow("", num_images_per_prompt=4).latents
    torch.testing.assert_close(flow("", num_images_per_prompt=4, temperature=0.5).latents, one / 2)
    assert flow("", num_images_per_prompt=2, temperature=0.0).latents.abs().max() == 0
    flow.defaults = SamplingOptions(temperature=0.5)
    torch.testing.assert_close(flow("", num_images_per_prompt=4).latents, one / 2)
    mixture = tiny_latent_pipeline("mixture", 0)
    means = mixture.prior.prior.means
    coldest = mixture("", num_images_per_prompt=16, temperature=0.0).latents
    chosen = torch.cdist(coldest, means).argmin(1)
    torch.testing.assert_close(coldest, means[chosen])
    assert len(chosen.unique()) > 1


def test_an_unconditional_prior_ignores_prompts_and_says_so():
    pipe = tiny_latent_pipeline("maf", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = pipe("")
    with pytest.warns(UserWarning, match="this bundle's prior is unconditional") as caught:
        assert torch.equal(pipe(CAPTIONS[0]).latents, plain.latents)
    assert caught[0].filename == __file__


def test_an_empty_prompt_needs_caption_dropout():
    pipe = tiny_latent_pipeline()
    with pytest.warns(UserWarning, match="an empty prompt is sampled without") as caught:
        pipe("")
    assert caught[0].filename == __file__
    pipe.prior.config.trained_with_caption_dropout = False
    with pytest.raises(ValueError, match="an empty prompt needs a prior trained with caption"):
        pipe("")


@pytest.mark.parametrize("kind", KINDS)
def test_a_bundle_gives_the_same_images_again(kind, tmp_path):
    context = 0 if kind in ("standard", "aggregated") else 8
    pipe = tiny_latent_pipeline(kind, context, trained_on={"experiment": "tiny"})
    pipe.defaults = SamplingOptions(temperature=0.8)
    pipe.save_pretrained(tmp_path / "bundle")
    again = TextToImagePipeline.from_pretrained(tmp_path / "bundle")
    assert isinstance(again, LatentPipeline)
    assert again.defaults == pipe.defaults and again.trained_on == {"experiment": "tiny"}
    prompts = CAPTIONS[:2] if context else [""]
    ours = pipe(prompts)
    theirs = again(prompts)
    assert torch.equal(theirs.latents, ours.latents)
    assert np.array_equal(pixels(theirs), pixels(ours))
    assert torch.equal(theirs.log_likelihood, ours.log_likelihood)


def test_a_prior_of_another_bundle_is_refused(tmp_path):
    tiny_latent_pipeline("maf").save_pretrained(tmp_path / "bundle")
    tiny_latent_pipeline("maf", 4).save_pretrained(tmp_path / "other")
    tiny_pipeline().save_pretrained(tmp_path / "codes")
    for other in ("other", "codes"):
        shutil.rmtree(tmp_path / "bundle" / "prior")
        shutil.copytree(tmp_path / other / "prior", tmp_path / "bundle" / "prior")
        with pytest.raises(ValueError, match=r"bundle/prior has fingerprint .* another bundle"):
            TextToImagePipeline.from_pretrained(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": 2.0}, "^guidance_scale is for bundles with codes, and this one has"),
        ({"best_of": 2}, "^best_of is for bundles with codes"),
        ({"judge": len}, "^judge is for bundles with codes"),
        ({"top_k": 3}, "whose one sampling option is temperature; leave it out$"),
        ({"compile": "on"}, "^compile is for bundles with codes"),
        ({"temperature": -1.0}, r"^sampling\.temperature is -1\.0"),
        ({"num_images_per_prompt": 0}, "^num_images_per_prompt is 0; it must be at least 1$"),
        ({"batch_size": 0}, "^batch_size is 0; it must be at least 1$"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_latent_pipeline("standard", 0)("", **options)


def test_options_that_ask_for_nothing_are_taken():
    pipe = tiny_latent_pipeline("standard", 0)
    same = pipe("", best_of=1, compile="auto", guidance_scale=None, judge=None)
    assert torch.equal(same.latents, pipe("").latents)


@pytest.mark.parametrize("name", ["edit", "outpaint", "vary", "complete", "score", "caption"])
def test_methods_that_need_codes_say_so(name):
    pipe = tiny_latent_pipeline("standard", 0)
    with pytest.raises(
        ValueError,
        match=rf"^this bundle has Gaussian latents, and {name} needs codes; train one with "
        r"tokenizer\.model\.quantizer=vq$",
    ):
        getattr(pipe, name)(None, prompt="a star")


def test_parts_that_do_not_belong_together_are_refused():
    pipe = tiny_latent_pipeline()
    with pytest.raises(ValueError, match=r"has 0 latent dimensions per image .* and the prior 64"):
        LatentPipeline(tiny_pipeline().tokenizer, pipe.prior, pipe.text)
    pipe.prior.config.text_vocab_size += 1
    with pytest.raises(ValueError, match=r"the text tokenizer has \d+ entries and the prior \d+;"):
        LatentPipeline(pipe.tokenizer, pipe.prior, pipe.text)
    with pytest.raises(ValueError, match="no prompt was given"):
        tiny_latent_pipeline("standard", 0)([])
