"""Coarse and fine codes of VQ-VAE-2, decoded apart.

    python -m examples.lectures.hierarchy --out hierarchy.png

A small tokenizer with `quantizer: hierarchical` learns scenes of the shapes world. Then one level
keeps the codes of an image, and the other one those of an empty white image.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from examples.lectures.plots import canvas, out_option
from pipeline.data.builtin.shapes import ShapesWorld
from pipeline.runtime.image_grid import make_grid
from stage1_tokenizer import HierarchicalOptions, ImageTokenizer, ObjectiveConfig, TokenizerConfig
from stage1_tokenizer.objective import TokenizerObjective
from stage1_tokenizer.pixels import to_model_range, to_uint8

SIZE = 32
MODEL = TokenizerConfig(
    image_size=SIZE,
    downsample_factor=4,
    width=48,
    decoder_depth=1,
    quantizer="hierarchical",
    num_codes=8,
    code_dim=8,
    hierarchical=HierarchicalOptions(levels=2, width=48, coarse_codes=(256,)),
)


def scenes(split: str) -> ShapesWorld:
    """Scenes of 32 pixels with one or two objects."""
    return ShapesWorld(SIZE, max_objects=2, split=split)


def train(steps: int, batch: int = 16, seed: int = 0) -> ImageTokenizer:
    """A tokenizer with two levels after some steps."""
    torch.manual_seed(seed)
    world = scenes("train")
    tokenizer = ImageTokenizer(MODEL)
    objective = TokenizerObjective(tokenizer, ObjectiveConfig())
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=4e-3)
    for step in range(steps):
        images = torch.from_numpy(world.images(range(step * batch, (step + 1) * batch)))
        (loss,) = objective.losses(images, step)
        optimizer.zero_grad()
        loss.value.backward()
        optimizer.step()
    return tokenizer.eval()


def apart(tokenizer: ImageTokenizer, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Images uint8 (B,H,W,3) decoded from all their codes, from the coarse ones with the fine ones
    of a white image, and the other way round."""
    codes = tokenizer.encode(to_model_range(images))
    white = tokenizer.encode(to_model_range(torch.full_like(images, 255)))
    is_coarse = torch.arange(codes.shape[1]) < tokenizer.layout[0].length
    coarse = torch.where(is_coarse, codes, white)
    fine = torch.where(is_coarse, white, codes)
    every, alone, rest = (to_uint8(tokenizer.decode(some)) for some in (codes, coarse, fine))
    return every, alone, rest


def main(out: Path, steps: int = 300) -> None:
    """A row per kind: images, all codes, coarse codes, fine codes."""
    tokenizer = train(steps)
    images = torch.from_numpy(scenes("held_out").images(range(10)))
    names = ("image", "all codes", "coarse codes", "fine codes")
    plot = canvas(10, 4.4)
    for axes, name, row in zip(
        plot.subplots(4, 1), names, (images, *apart(tokenizer, images)), strict=True
    ):
        axes.imshow(make_grid(list(row.numpy()), columns=len(row)))
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
        axes.set(xticks=[], yticks=[])
    plot.savefig(out)


if __name__ == "__main__":
    main(out_option(__doc__ or ""))
