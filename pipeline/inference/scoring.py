"""Scores of given images: pairs with prompts, checked, and likelihoods in batches. Knows images,
ids and codes; encodes neither images nor prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from pipeline.inference.editing import check_image
from pipeline.runtime.threads import free_threads
from stage1_tokenizer import TokenizerConfig
from stage2_prior import PriorModule, score_codes


def checked_pairs(
    images: Image.Image | Sequence[Image.Image],
    prompts: str | Sequence[str],
    config: TokenizerConfig,
) -> tuple[list[Image.Image], list[str]]:
    """The images in the channels of a tokenizer, and as many prompts.

    Raises:
        ValueError: there is no image, there are not as many prompts as images, or an image is not
            of the tokenizer's size; names it.
    """
    images = [images] if isinstance(images, Image.Image) else list(images)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not images:
        raise ValueError("no image was given; give at least one, with a prompt for each")
    if len(images) != len(prompts):
        raise ValueError(
            f"there are {len(images)} images and {len(prompts)} prompts; give one prompt per image"
        )
    names = ["the image"] if len(images) == 1 else [f"image {i}" for i in range(len(images))]
    return [
        check_image(image, config.size, config.channels, name)
        for image, name in zip(images, names, strict=True)
    ], prompts


@free_threads()
def score_codes_batched(
    prior: PriorModule, text_ids: Tensor, codes: Tensor, batch_size: int
) -> Tensor:
    """`score_codes` of captions (B,T) and codes (B,N), `batch_size` at a time: (B,) on the CPU."""
    batches = zip(text_ids.split(batch_size), codes.split(batch_size), strict=True)
    return torch.cat([score_codes(prior, *batch) for batch in batches]).cpu()
