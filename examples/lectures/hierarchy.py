"""Coarse and fine codes of VQ-VAE-2, decoded apart.

    python -m examples.lectures.hierarchy --out hierarchy.png

Each quarter of an image has a colour, and each block of 4x4 pixels a pattern. A small tokenizer
with `quantizer: hierarchical` has four coarse codes per image, one per quarter, and sixteen fine
ones. Then one level keeps an image's codes, and the other one those of a plain white image.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from examples.lectures.plots import canvas, out_option
from examples.lectures.training import train_tokenizer
from pipeline.runtime.image_grid import make_grid
from stage1_tokenizer import HierarchicalOptions, ImageTokenizer, ObjectiveConfig, TokenizerConfig
from stage1_tokenizer.pixels import to_model_range, to_uint8

SIZE = 16
COLOURS = torch.tensor(
    [[1, 1, 1], [0.9, 0.1, 0.1], [0.1, 0.7, 0.2], [0.2, 0.3, 0.9], [1, 0.8, 0.1], [0.6, 0.2, 0.8]]
)
EVERY = torch.arange(4)
PATTERNS = torch.stack(
    [torch.zeros(4, 4), (EVERY < 2)[:, None].expand(4, 4), (EVERY < 2).expand(4, 4), torch.eye(4)]
)
MODEL = TokenizerConfig(
    image_size=SIZE,
    downsample_factor=4,
    width=32,
    decoder_depth=1,
    quantizer="hierarchical",
    num_codes=8,
    code_dim=8,
    hierarchical=HierarchicalOptions(levels=2, width=32, coarse_codes=(16,)),
)


def tiles(count: int, generator: torch.Generator) -> Tensor:
    """Images uint8 (count,16,16,3) of coloured quarters and dark patterns."""
    colours = COLOURS[torch.randint(len(COLOURS), (count, 2, 2), generator=generator)]
    patterns = PATTERNS[torch.randint(len(PATTERNS), (count, 4, 4), generator=generator)]
    dark = patterns.transpose(2, 3).reshape(count, SIZE, SIZE, 1)
    wide = colours.repeat_interleave(SIZE // 2, 1).repeat_interleave(SIZE // 2, 2)
    return (255 * wide * (1 - 0.7 * dark)).round().to(torch.uint8)


def train(steps: int) -> ImageTokenizer:
    """A tokenizer with two levels after some steps."""
    return train_tokenizer(MODEL, ObjectiveConfig(), lambda generator: tiles(32, generator), steps)


def apart(tokenizer: ImageTokenizer, images: Tensor) -> list[Tensor]:
    """Images uint8 (B,H,W,3) decoded from all their codes, from the coarse ones with the fine ones
    of a white image, and the other way round."""
    codes = tokenizer.encode(to_model_range(images))
    white = tokenizer.encode(to_model_range(torch.full_like(images, 255)))
    is_coarse = torch.arange(codes.shape[1]) < tokenizer.layout[0].length
    kinds = (codes, torch.where(is_coarse, codes, white), torch.where(is_coarse, white, codes))
    return [to_uint8(tokenizer.decode(some)) for some in kinds]


def main(out: Path, steps: int = 500) -> None:
    """A row per kind: images, all codes, coarse codes, fine codes."""
    tokenizer = train(steps)
    images = tiles(10, torch.Generator().manual_seed(1))
    names = ("image", "all codes", "coarse codes", "fine codes")
    plot = canvas(10, 4.4)
    rows = zip(plot.subplots(4, 1), names, [images, *apart(tokenizer, images)], strict=True)
    for axes, name, row in rows:
        axes.imshow(make_grid(list(row.numpy()), columns=len(row), gap=1))
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
        axes.set(xticks=[], yticks=[])
    plot.savefig(out)


if __name__ == "__main__":
    main(out_option(__doc__ or ""))
