"""`CLIPScorer` and a perceptual backbone on a small model that the test makes."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from pipeline import CLIPScorer
from stage1_tokenizer.perceptual import BackboneDistance

WORDS = ["<pad>", "<|startoftext|>", "<|endoftext|>", "a</w>", "red</w>", "blue</w>", "circle</w>"]


@pytest.fixture
def folder(tmp_path):
    """A CLIP model of random weights with tokenizer and image processor, as transformers saves
    them."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = CLIPTextConfig(
        **sizes,
        vocab_size=len(WORDS),
        max_position_embeddings=8,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8
    )
    CLIPModel(config).save_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(WORDS)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "pad_token": "<pad>"})
    )
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 16},
        "crop_size": {"height": 16, "width": 16},
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    return tmp_path


def test_scores_are_cosines_of_each_image_with_its_prompt(folder):
    judge = CLIPScorer(str(folder))
    images = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue", "red")]
    scores = judge(images, ["a", "a", "red"])
    assert scores.shape == (3,) and scores.abs().max() <= 1 + 1e-6
    torch.testing.assert_close(judge(images[:1], ["a"])[0], scores[0])
    assert scores[0] != scores[1]
    many = judge(images * 20, ["a", "a", "red"] * 20)
    torch.testing.assert_close(many, scores.repeat(20))


def test_invalid_scorer_is_named(folder, tmp_path):
    with pytest.raises(
        ValueError, match=r"the scorer '.*nothing' cannot be loaded as a CLIP model"
    ):
        CLIPScorer(str(tmp_path / "nothing"))
    CLIPModel.from_pretrained(folder).vision_model.save_pretrained(folder)
    with pytest.raises(
        ValueError, match=r"cannot be loaded as a CLIP model|does not compare images with text"
    ):
        CLIPScorer(str(folder))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", '{"model_type": "clip", "bos_token_id": ""}', "cannot be loaded"),
        ("config.json", '{"text_config": {"num_hidden_layers": 100000}}', "num_hidden_layers in"),
        ("merges.txt", "[1]", "cannot be loaded as a CLIP model"),
        ("vocab.json", "[1]", "cannot be loaded as a CLIP model"),
        ("vocab.json", '{"a</w>": 0, "<|endoftext|>": "x"}', "cannot be loaded as a CLIP model"),
        ("tokenizer_config.json", '{"tokenizer_class": 3}', "cannot be loaded as a CLIP model"),
        ("special_tokens_map.json", '{"pad_token": -1}', "cannot be loaded as a CLIP model"),
        ("special_tokens_map.json", "[" * 60 + "]" * 60, "nested more than 50 deep"),
        ("preprocessor_config.json", '{"image_mean": [{}]}', "cannot be loaded as a CLIP model"),
        ("model.safetensors", "", "cannot be loaded as a CLIP model"),
    ],
)
def test_a_damaged_folder_of_a_scorer_is_one_error_that_names_it(folder, name, content, message):
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message) as raised:
        CLIPScorer(str(folder))
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", '{"model_type": "clip", "bos_token_id": ""}', "cannot be loaded"),
        ("config.json", '{"vision_config": {"num_hidden_layers": 100000}}', "num_hidden_layers in"),
        ("preprocessor_config.json", '{"image_mean": [{}, 1, 1]}', r"image_mean\[0\] is a JSON"),
        ("preprocessor_config.json", '{"image_std": [1, 1, 0]}', "each must be above 0"),
        ("preprocessor_config.json", "[" * 60 + "]" * 60, "nested more than 50 deep"),
        ("model.safetensors", "", "cannot be loaded as a model"),
    ],
)
def test_a_damaged_folder_of_a_backbone_is_one_error_that_names_it(folder, name, content, message):
    BackboneDistance(str(folder), ())
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message) as raised:
        BackboneDistance(str(folder), ())
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)


def test_transparent_images_are_scored_on_white(folder):
    judge = CLIPScorer(str(folder))
    clear = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    white = Image.new("RGB", (32, 32), "white")
    torch.testing.assert_close(judge([clear], ["a"]), judge([white], ["a"]))
