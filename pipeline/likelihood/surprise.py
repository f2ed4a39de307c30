"""Where an image's bits are: per code and per pixel. Knows a model of images; draws nothing.

Legend: B images, T text positions, H W pixels, C channels, h w grid of codes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.likelihood.estimate import check_probability, sample_seeds
from pipeline.likelihood.model import CodeModel, LatentModel
from pipeline.runtime.threads import free_threads
from stage1_tokenizer import to_model_range
from stage2_prior import score_each_code


@dataclass(frozen=True)
class Surprise:
    """The bits of one image."""

    codes: list[Tensor]
    """-log2 p(code | caption, codes before it) of each level (h,w), coarse levels first; nothing of
    Gaussian latents, whose prior is one density. They sum to -log2 p(codes | caption)."""
    pixels: Tensor
    """(H,W) -log2 p(pixel | z), the sum over channels. Side information of an image, such as the
    standard deviation of `calibrated_l2`, is left out."""


@free_threads()
@torch.inference_mode()
def surprise(
    model: CodeModel | LatentModel, text_ids: Tensor, images: Tensor, *, seed: int = 0
) -> list[Surprise]:
    """Of captions (B,T) and images uint8 (B,H,W,C), each through the first sample of its posterior
    that `image_likelihood` takes.

    Raises:
        ValueError: as `image_likelihood`.
    """
    check_probability(model, images)
    images = images.to(model.tokenizer.device)
    z = model.sample_posterior(to_model_range(images), sample_seeds(images, 1, seed)).z
    values = images.permute(0, 3, 1, 2)
    parameters = model.parameters(z)
    likelihood = model.tokenizer.likelihood
    known = likelihood.given(likelihood.side_information(values, parameters))
    pixels = -known.log_prob(values, parameters).sum(1).cpu() / math.log(2)
    levels: list[tuple[Tensor, ...]] = [()] * len(images)
    if isinstance(model, CodeModel):
        layout = model.tokenizer.layout
        nats = -score_each_code(model.prior, text_ids, z.flatten(1)).cpu()
        parts = (nats / math.log(2)).split([level.length for level in layout], dim=1)
        grids = [part.unflatten(1, level.grid) for part, level in zip(parts, layout, strict=True)]
        levels = list(zip(*grids, strict=True))
    return [Surprise(list(codes), bits) for codes, bits in zip(levels, pixels, strict=True)]
