"""Transparency: premultiplied values survive PIL images, backgrounds, and tokenizers of four
channels encode, train and score them."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTModel

from stage1_tokenizer import (
    DiscriminatorOptions,
    ObjectiveConfig,
    PerceptualOptions,
    TokenizerObjective,
    VqganOptions,
    from_pil,
    pixels,
    reencoding_metrics,
    resize_and_crop,
    to_model_range,
    to_pil,
    to_uint8,
)
from stage1_tokenizer.code_views import gumbel_views, naive_views
from stage1_tokenizer.likelihoods import build_likelihood
from stage1_tokenizer.perceptual import BackboneDistance
from stage1_tokenizer.pixels import laid_on_white, through_jpeg, without_haze
from stage1_tokenizer.transparency import (
    as_filterable,
    filtered,
    from_white,
    on_background,
    premultiplied,
    straightened,
)
from tests.helpers.tokenizers import ALL_KINDS, EVERY_TOKENIZER, objective_of, tiny_tokenizer


def every_pair() -> np.ndarray:
    """Straight (256,256,4): every value at every alpha."""
    value, alpha = np.meshgrid(np.arange(256), np.arange(256))
    return np.stack([value, 255 - value, value // 2, alpha], axis=-1).astype(np.uint8)


def premultiplied_images(count: int, side: int = 16, seed: int = 0) -> torch.Tensor:
    """Smooth images uint8 (count,side,side,4), from clear to opaque."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (count, 4, 4, 4)).repeat(side // 4, 1).repeat(side // 4, 2)
    coarse[..., 3] = np.where(coarse[..., 3] < 100, 0, coarse[..., 3])
    return torch.from_numpy(premultiplied(coarse.astype(np.uint8)))


def test_almost_transparent_and_almost_opaque_pixels_are_cleaned():
    """Each alpha with a colour as large as it; what lies between stays as it is."""
    alpha = torch.arange(256, dtype=torch.uint8)
    images = alpha.repeat(4, 1).T[None, None]
    cleaned = to_uint8(without_haze(to_model_range(images)))[0, 0]
    expected = torch.where(alpha <= 8, 0, torch.where(alpha >= 247, 255, alpha))
    assert cleaned[:, 3].equal(expected)
    assert cleaned[:, 0].equal(torch.where(alpha <= 8, 0, alpha))


@pytest.mark.parametrize("channels", [3, 4])
def test_decoded_alpha_is_clean_and_other_channels_stay(channels):
    tokenizer = tiny_tokenizer(channels=channels)
    codes = torch.arange(12).repeat(2)[:16].reshape(1, 4, 4)
    shown = tokenizer.likelihood.image(tokenizer.code_parameters(codes)).clamp(-1, 1)
    shown[:, -1] += torch.linspace(-2, 2, 16)
    tokenizer.likelihood.image = lambda parameters: shown
    expected = without_haze(shown.clamp(-1, 1)) if channels == 4 else shown.clamp(-1, 1)
    assert tokenizer.decode(codes).equal(expected)


def test_premultiplied_values_survive_straight_images():
    """Of all pairs of a value and an alpha."""
    images = torch.from_numpy(premultiplied(every_pair()))[None]
    shown = to_pil(images)
    assert shown[0].mode == "RGBA"
    assert torch.equal(from_pil(shown, channels=4), images)


def test_premultiplying_rounds_to_the_nearest_value():
    straight = every_pair().astype(float)
    expected = np.floor(straight[..., :3] * straight[..., 3:] / 255 + 0.5)
    assert np.array_equal(premultiplied(every_pair())[..., :3], expected)


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (10, 200, 77)])
def test_a_background_shows_as_pillow_composes(background):
    straight = every_pair()
    below = Image.new("RGBA", (256, 256), background)
    expected = np.asarray(Image.alpha_composite(below, Image.fromarray(straight)).convert("RGB"))
    found = on_background(premultiplied(straight), background)
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_images_on_white_with_their_alpha_give_the_premultiplied_values():
    images = premultiplied(every_pair())
    assert np.array_equal(from_white(on_background(images), images[..., 3:]), images)


def test_white_in_the_models_range_is_white_of_8_bits():
    images = premultiplied_images(3)
    shown = to_uint8(laid_on_white(to_model_range(images)))
    assert np.array_equal(shown.numpy(), on_background(images.numpy()))


def test_colours_are_at_most_their_alpha():
    shown = to_uint8(torch.tensor([1.0, 0.0, -1.0, -0.2]).reshape(1, 4, 1, 1)).flatten()
    assert shown.tolist() == [102, 102, 0, 102]
    assert straightened(np.array([9, 9, 9, 0], np.uint8)).tolist() == [0, 0, 0, 0]


def test_resizing_lets_no_hidden_colour_through():
    """Red pixels that are clear beside blue ones that are opaque."""
    image = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    image.paste((0, 0, 100, 255), (16, 0, 32, 32))
    small = np.asarray(resize_and_crop(image, 9, channels=4))
    assert small[..., 0].max() == 0
    shown = small[..., 2][small[..., 3] > 100]
    # The filter rings by 4% beside an edge, where alpha is cut to 255 and the colour is not.
    assert np.abs(shown.astype(int) - 100).max() <= 4
    assert 0 < small[0, 4, 3] < 255


def test_filtering_an_array_premultiplies_it_no_second_time():
    images = premultiplied_images(1, 32)[0].numpy()
    by_channel = [
        np.asarray(Image.fromarray(images[..., c]).resize((12, 12), Image.Resampling.BICUBIC))
        for c in range(4)
    ]
    found = filtered(as_filterable(images).resize((12, 12), Image.Resampling.BICUBIC))
    assert np.array_equal(found[..., 3], by_channel[3])
    for c in range(3):
        assert np.array_equal(found[..., c], np.minimum(by_channel[c], by_channel[3]))


def test_opaque_images_are_opaque_in_four_channels():
    values = from_pil([Image.new("RGB", (4, 4), (9, 8, 7)), Image.new("L", (4, 4), 5)], channels=4)
    assert values[:, 0, 0].tolist() == [[9, 8, 7, 255], [5, 5, 5, 255]]


def test_a_transparent_palette_and_grey_keep_their_transparency():
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putpixel((0, 0), 0)
    palette.info["transparency"] = 0
    grey = Image.new("LA", (4, 4), (200, 51))
    values = from_pil([palette, grey], channels=4)
    assert values[0, 0, 0].tolist() == [0, 0, 0, 0]
    assert values[0, 1, 1].tolist() == [10, 20, 30, 255]
    assert values[1, 0, 0].tolist() == [40, 40, 40, 51]


def test_transparency_laid_on_white_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(pixels, "_laid_on_white", [])
    tokenizer = tiny_tokenizer()
    with caplog.at_level(logging.WARNING):
        tokenizer.to_codes([Image.new("RGBA", (16, 16), (9, 9, 9, 255))])
        assert not caplog.messages
        for _ in range(2):
            clear = tokenizer.to_codes([Image.new("RGBA", (16, 16), (9, 9, 9, 0))])
    assert torch.equal(clear, tokenizer.to_codes([Image.new("RGB", (16, 16), "white")]))
    assert len(caplog.messages) == 1
    assert "3 channels: it is laid on white" in caplog.text


@EVERY_TOKENIZER
def test_every_tokenizer_of_four_channels_trains_on_transparent_images(kind):
    tokenizer = tiny_tokenizer(channels=4, **ALL_KINDS[kind])
    objective = TokenizerObjective(tokenizer.train(), objective_of(kind))
    images = premultiplied_images(12)
    for loss in objective.losses(images, 0):
        loss.value.backward()
        assert torch.isfinite(loss.value)
    metrics = objective.evaluate([images])
    assert metrics["psnr"] > 0


@pytest.mark.parametrize("architecture", ["patch", "transformer", "dalle", "vqgan"])
def test_every_architecture_of_four_channels_gives_rgba(architecture):
    sizes = {"vqgan": VqganOptions(channels=32, multipliers=(1, 1, 1), blocks=1)}
    changes = sizes if architecture == "vqgan" else {}
    tokenizer = tiny_tokenizer(channels=4, architecture=architecture, **changes)
    images = to_pil(premultiplied_images(2))
    codes = tokenizer.to_codes(images)
    shown = tokenizer.to_images(codes)
    assert [image.mode for image in shown] == ["RGBA", "RGBA"]
    values = from_pil(shown, channels=4)
    assert torch.equal(values, to_uint8(tokenizer.decode(codes)))
    assert (values[..., :3] <= values[..., 3:]).all()


def test_codes_see_transparency():
    """Black and clear are alike on no background but black."""
    tokenizer = tiny_tokenizer(channels=4)
    black, clear = (Image.new("RGBA", (16, 16), (0, 0, 0, alpha)) for alpha in (255, 0))
    assert not torch.equal(tokenizer.to_codes([black]), tokenizer.to_codes([clear]))


def save_backbone(folder: Path) -> None:
    ViTModel(
        ViTConfig(
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            image_size=16,
            patch_size=8,
        ),
        add_pooling_layer=False,
    ).save_pretrained(folder)


def test_a_discriminator_and_perceptual_distances_take_four_channels(tmp_path):
    save_backbone(tmp_path)
    images = premultiplied_images(2, 32)
    for distance in ("ms_ssim", str(tmp_path)):
        objective = TokenizerObjective(
            tiny_tokenizer(channels=4, image_size=32).train(),
            ObjectiveConfig(
                perceptual=PerceptualOptions(weight=1.0, distance=distance),
                discriminator=DiscriminatorOptions(weight=0.5, start=0, width=16, layers=1),
            ),
        )
        losses = list(objective.losses(images, 0))
        assert [loss.group for loss in losses] == ["tokenizer", "discriminator"]
        assert float(losses[0].metrics["perceptual"]) > 0


def test_a_backbone_sees_images_on_white(tmp_path):
    torch.manual_seed(0)
    save_backbone(tmp_path)
    distance = BackboneDistance(str(tmp_path), ())
    images = premultiplied_images(1)
    shown = torch.from_numpy(on_background(images.numpy()))
    found = distance(to_model_range(images), to_model_range(shown))
    assert float(found) == pytest.approx(0, abs=1e-9)


def test_jpeg_keeps_alpha_beside():
    images = premultiplied_images(2)
    stored = through_jpeg(images, 95)
    assert torch.equal(stored[..., 3], images[..., 3])
    difference = (stored.int() - images.int()).abs()
    assert difference.max() > 0 and difference.float().mean() < 6
    assert (stored[..., :3] <= stored[..., 3:]).all()


def test_codes_of_four_channels_are_viewed_and_encoded_again():
    tokenizer = tiny_tokenizer(channels=4)
    images = premultiplied_images(2)
    codes = tokenizer.encode(to_model_range(images))
    metrics = reencoding_metrics(tokenizer, [(codes, to_uint8(tokenizer.decode(codes)))])
    assert set(metrics) == {"reencode_agreement", "reencode_agreement_jpeg95"}
    some = torch.arange(3)
    naive = naive_views(tokenizer, some, torch.zeros(16, dtype=torch.long), (4, 4), 0)
    gumbel = gumbel_views(tokenizer, some, (4, 4), steps=2)
    for views in (naive, gumbel):
        assert views.images.shape == (3, 16, 16, 4)
        assert (views.images[..., :3] <= views.images[..., 3:]).all()


@pytest.mark.parametrize(
    "name", ["l2", "calibrated_l2", "learned_l2", "l1", "logit_laplace", "discretized_logistic"]
)
def test_every_likelihood_gives_four_channels_probabilities(name):
    """Of each channel those of all values add up to one, and the value's own is `log_prob`."""
    mixtures = 3 if name == "discretized_logistic" else 1
    likelihood = build_likelihood(name, 0.1, 4, mixtures)
    values = premultiplied_images(2, 4).permute(0, 3, 1, 2).long()
    generator = torch.Generator().manual_seed(0)
    parameters = torch.randn(2, likelihood.parameter_count(4), 4, 4, generator=generator) / 2
    known = likelihood.given(likelihood.side_information(values, parameters))
    tables = torch.cat(
        [known.log_probabilities(parameters, values, channel) for channel in range(4)], dim=1
    )
    torch.testing.assert_close(tables.exp().sum(-1), torch.ones(2, 4, 4, 4, dtype=torch.float64))
    own = tables.gather(-1, values[..., None])[..., 0]
    torch.testing.assert_close(own, known.log_prob(values, parameters))
    assert likelihood.image(parameters).shape == (2, 4, 4, 4)


def test_alpha_depends_on_the_colours_in_the_conditional_mixture():
    likelihood = build_likelihood("discretized_logistic", 0.1, 4, 2)
    parameters = torch.full((1, likelihood.parameter_count(4), 1, 1), 0.5)
    dark, bright = (torch.tensor([v, v, v, 255]).reshape(1, 4, 1, 1) for v in (0, 250))
    alphas = [likelihood.log_probabilities(parameters, v, 3) for v in (dark, bright)]
    assert not torch.allclose(*alphas)
