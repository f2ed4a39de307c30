"""Folders that a user names, with changed files: text tokenizers, CLIP scorers and perceptual
backbones as transformers saves them, and bundles to start a training from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random

from benchmarks.attack.trial import Input
from benchmarks.attack_bundles import PATH_CHANGES, VALUES, nest, replace_value

_WORDS = ("<pad>", "<|startoftext|>", "<|endoftext|>", "a</w>", "red</w>", "heart</w>")


def write_clip(folder: Path) -> None:
    """A CLIP model of random weights with tokenizer and image processor."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = CLIPTextConfig(
        **sizes,
        vocab_size=len(_WORDS),
        max_position_embeddings=8,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8
    )
    CLIPModel(config).save_pretrained(folder)
    files = {
        "vocab.json": {word: i for i, word in enumerate(_WORDS)},
        "tokenizer_config.json": {"tokenizer_class": "CLIPTokenizer", "pad_token": "<pad>"},
        "special_tokens_map.json": {"pad_token": "<pad>"},
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 16},
            "crop_size": {"height": 16, "width": 16},
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.3, 0.3, 0.3],
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def write_text(folder: Path) -> None:
    """A text tokenizer, with the files that older versions of transformers write."""
    from stage2_prior import TextTokenizer

    TextTokenizer.train(["a red heart"], vocab_size=300, length=9).fast.save_pretrained(folder)
    files = {
        "special_tokens_map.json": {"pad_token": "<pad>", "bos_token": {"content": "<start>"}},
        "added_tokens.json": {"<extra>": 5000},
        "config.json": {"model_type": "gpt2"},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))


def make(originals: Path, chance: Random, folder: Path) -> Input:
    """A folder with one change, or with two.

    Args:
        originals: has `text`, `clip` and `bundle`.
    """
    kind = chance.choice(("text", "clip", "backbone", "init_from"))
    original = {"backbone": "clip", "init_from": "bundle"}.get(kind, kind)
    copy = folder / kind
    shutil.copytree(originals / original, copy)
    names = []
    for _ in range(chance.choice((1, 1, 1, 2))):
        path = chance.choice(sorted(path for path in copy.rglob("*") if path.is_file()))
        name, change = _change(chance)
        try:
            change(path)
        except (OSError, ValueError, LookupError, AttributeError, ZeroDivisionError):
            continue  # no JSON, or one without values
        names.append(f"{path.relative_to(copy)}: {name}")
    return Input(f"{kind} {'; '.join(names)}", partial(_USES[kind], copy))


def _change(chance: Random) -> tuple[str, Callable[[Path], object]]:
    match chance.randrange(8):
        case 0:
            change = chance.choice(PATH_CHANGES)
            return change.__name__, change
        case 1:
            depth = chance.choice((60, 200, 10**5))
            return f"nested {depth}", partial(nest, depth=depth)
        case 2:
            text = chance.choice(("[]", "[1, 2]", "3", "{}", '{"a": {}}'))
            return text, lambda path: path.write_text(text)
        case _:
            place = chance.randrange(10**9)
            value = chance.choice(VALUES)
            return f"{place} = {str(value)[:20]}", partial(replace_value, place=place, value=value)


def _use_text(folder: Path) -> Sequence[str]:
    from stage2_prior import TextTokenizer

    TextTokenizer.pretrained(str(folder), length=20).encode(["a red heart"])
    return []


def _use_clip(folder: Path) -> Sequence[str]:
    from PIL import Image

    from pipeline import CLIPScorer

    CLIPScorer(str(folder))([Image.new("RGB", (20, 16))] * 2, ["a red", "a heart"])
    return []


def _use_backbone(folder: Path) -> Sequence[str]:
    import torch

    from stage1_tokenizer.perceptual import BackboneDistance

    pixels = torch.zeros(2, 3, 16, 16)
    BackboneDistance(str(folder), ())(pixels, pixels)
    return []


def _use_init_from(folder: Path) -> Sequence[str]:
    """What a run does before its first step, but for the captions."""
    from pipeline.config.load import load_values
    from pipeline.stages.finetune import (
        PretrainedPrior,
        check_init_from,
        parent_bundle,
        tokenizer_identity,
    )

    given = {"init_from": str(folder)}
    values = {"name": "tuned", "data": {"source": "images"}, "prior": given}
    values["tokenizer"] = {**given, "frozen": True}
    experiment = load_values(values, [])
    check_init_from(experiment.tokenizer, experiment.prior, experiment.text.max_length)
    parent_bundle(experiment)
    PretrainedPrior(str(folder), str(tokenizer_identity(experiment.tokenizer)))
    return []


_USES: dict[str, Callable[[Path], Sequence[str]]] = {
    "text": _use_text,
    "clip": _use_clip,
    "backbone": _use_backbone,
    "init_from": _use_init_from,
}
