"""`CLIPScorer` on a small model that the test makes."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from pipeline import CLIPScorer

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


def test_transparent_images_are_scored_on_white(folder):
    judge = CLIPScorer(str(folder))
    clear = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    white = Image.new("RGB", (32, 32), "white")
    torch.testing.assert_close(judge([clear], ["a"]), judge([white], ["a"]))
