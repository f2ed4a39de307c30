"""Perceptual distances: zero for equal images, equal to plain definitions, differentiable,
offline."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTModel,
)

from stage1_tokenizer import PerceptualOptions
from stage1_tokenizer.metrics import multi_scale_distance, structural_similarity
from stage1_tokenizer.perceptual import BackboneDistance, build_distance


def pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def ssim_by_hand(x: np.ndarray, y: np.ndarray, size: int, peak: float) -> tuple[float, float]:
    """One channel (H,W), window by window."""
    steps = np.arange(size) - (size - 1) / 2
    window = np.exp(-(steps**2) / (2 * 1.5**2))
    weights = np.outer(window, window) / window.sum() ** 2
    whole, contrast = [], []
    for i in range(x.shape[0] - size + 1):
        for j in range(x.shape[1] - size + 1):
            a, b = x[i : i + size, j : j + size], y[i : i + size, j : j + size]
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
            cov = (weights * (a - mean_a) * (b - mean_b)).sum()
            c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
            contrast.append((2 * cov + c2) / (var_a + var_b + c2))
            whole.append(contrast[-1] * (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1))
    return float(np.mean(whole)), float(np.mean(contrast))


@pytest.mark.parametrize("side", [14, 6])
def test_structural_similarity_is_that_of_its_definition(side):
    x, y = (pixels(1, 2, side, side + 2, seed=s).double() for s in (0, 1))
    whole, contrast = structural_similarity(x, y, peak=2.0)
    for c in range(2):
        expected = ssim_by_hand(x[0, c].numpy(), y[0, c].numpy(), min(11, side), 2.0)
        assert (float(whole[0, c]), float(contrast[0, c])) == pytest.approx(expected, abs=1e-9)


def test_multi_scale_similarity_is_the_weighted_product_over_scales():
    x = pixels(2, 3, 44, 60)
    y = 0.8 * x + 0.2 * pixels(2, 3, 44, 60, seed=1)
    weights = torch.tensor([0.0448, 0.2856, 0.3001])
    weights = weights / weights.sum()
    scales = [(F.avg_pool2d(x, 2**s), F.avg_pool2d(y, 2**s)) for s in range(3)]  # 44, 22, 11
    parts = [
        structural_similarity(a, b, 2.0)[0 if s == 2 else 1] for s, (a, b) in enumerate(scales)
    ]
    expected = 1 - torch.stack([p**w for p, w in zip(parts, weights, strict=True)]).prod(0).mean(1)
    torch.testing.assert_close(multi_scale_distance(x, y), expected)


@pytest.mark.parametrize("size", [(8, 8), (16, 24), (64, 64)])
def test_equal_images_are_at_no_distance_and_worse_ones_farther(size):
    x = pixels(2, 3, *size)
    noise = pixels(2, 3, *size, seed=1)
    distances = [multi_scale_distance(x, x + amount * noise) for amount in (0.0, 0.1, 0.5)]
    torch.testing.assert_close(distances[0], torch.zeros(2), atol=1e-5, rtol=0)
    assert (distances[0] < distances[1]).all() and (distances[1] < distances[2]).all()


def test_opposite_and_flat_images_have_finite_gradients_also_in_bf16():
    for other in (-pixels(2, 3, 32, 32), torch.zeros(2, 3, 32, 32)):
        x = pixels(2, 3, 32, 32).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            distance = multi_scale_distance(other, x)
        distance.sum().backward()
        assert distance.dtype == torch.float32 and x.grad.isfinite().all()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Small backbones of both kinds as transformers saves them."""
    root = tmp_path_factory.mktemp("backbones")
    torch.manual_seed(0)
    resnet = ResNetModel(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    )
    vit = ViTModel(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=16,
            patch_size=8,
        )
    )
    for name, model in {"resnet": resnet, "vit": vit}.items():
        model.save_pretrained(root / name)
    (root / "vit" / "preprocessor_config.json").write_text(
        '{"image_processor_type": "ViTImageProcessor", "image_mean": [0.5, 0.5, 0.5], "image_std": '
        "[0.5, 0.5, 0.5]}"
    )
    return {name: str(root / name) for name in ("resnet", "vit")}


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_a_backbones_distance_is_that_of_its_normalised_features(folders, kind):
    distance = BackboneDistance(folders[kind], (1, 2))
    x, y = pixels(2, 3, 32, 32), pixels(2, 3, 32, 32, seed=1)
    mean = torch.tensor([0.485, 0.456, 0.406] if kind == "resnet" else [0.5] * 3)[:, None, None]
    deviation = torch.tensor([0.229, 0.224, 0.225] if kind == "resnet" else [0.5] * 3)[
        :, None, None
    ]
    expected = torch.zeros(2)
    states = []
    for v in (x, y):
        if kind == "vit":
            v = F.interpolate(v, (16, 16), mode="bilinear", antialias=True)
        states.append(
            distance.backbone(
                (v / 2 + 0.5 - mean) / deviation, output_hidden_states=True
            ).hidden_states
        )
    for layer in (1, 2):
        a, b = (F.normalize(s[layer], dim=1 if kind == "resnet" else 2) for s in states)
        channel = 1 if kind == "resnet" else 2
        expected += (a - b).square().sum(channel).flatten(1).mean(1)
    torch.testing.assert_close(distance(x, y), expected)
    torch.testing.assert_close(distance(x, x), torch.zeros(2))


def test_image_tower_of_a_clip_model_is_used(tmp_path):
    small = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    clip = CLIPModel(
        CLIPConfig(
            vision_config={**small, "image_size": 16, "patch_size": 8},
            text_config={**small, "vocab_size": 50},
        )
    )
    clip.save_pretrained(tmp_path / "clip")
    distance = BackboneDistance(str(tmp_path / "clip"), ())
    x = pixels(2, 3, 32, 32)
    assert (
        float(distance(x, x).sum()) == 0 and (distance(x, pixels(2, 3, 32, 32, seed=1)) > 0).all()
    )
    assert (
        sum(p.numel() for p in distance.backbone.parameters())
        < sum(p.numel() for p in clip.parameters()) / 1.5
    )


def test_a_backbone_may_be_made_for_images_that_are_no_squares(tmp_path):
    shape = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[16, 32],
        patch_size=8,
    )
    ViTModel(shape).save_pretrained(tmp_path)
    distance = BackboneDistance(str(tmp_path), ())
    assert (
        distance.size == (16, 32)
        and (distance(pixels(2, 3, 8, 8), pixels(2, 3, 8, 8, seed=1)) > 0).all()
    )


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_gradients_reach_the_reconstruction_and_not_the_backbone(folders, kind):
    distance = build_distance(PerceptualOptions(weight=1.0, distance=folders[kind]))
    x = pixels(2, 3, 32, 32).requires_grad_()
    distance(pixels(2, 3, 32, 32, seed=1), x).sum().backward()
    assert (
        x.grad.any()
        and not any(p.requires_grad for p in distance.parameters())
        and not distance.backbone.training
    )


def test_invalid_backbones_are_named(folders, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"perceptual\.distance is '.*none', which is not ms_ssim and cannot be loaded as a "
        r"model",
    ):
        BackboneDistance(str(tmp_path / "none"), ())
    with pytest.raises(
        ValueError, match=r"perceptual\.layers are \[7\] and the backbone has hidden states 0\.\.2"
    ):
        BackboneDistance(folders["vit"], (7,))
    text = BertModel(
        BertConfig(
            vocab_size=8,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
        )
    )
    text.save_pretrained(tmp_path / "text")
    with pytest.raises(
        ValueError,
        match=r"a BertModel, which does not take images of three colours and give hidden states",
    ):
        BackboneDistance(str(tmp_path / "text"), ())
    assert build_distance(PerceptualOptions()) is None
    assert build_distance(PerceptualOptions(weight=0.1)) is multi_scale_distance
