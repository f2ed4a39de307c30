"""How redundant a codebook is: how many codes draw differently, and which codes stay the same when
their image is encoded again. Knows tokenizers and 8-bit images; no data set.

Legend: B images, H W pixels, C channels, N codes of an image over all levels, K codes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from stage1_tokenizer.config import Level
from stage1_tokenizer.model import TokenizerModule
from stage1_tokenizer.pixels import through_jpeg, to_model_range, to_uint8

JPEG_QUALITY = 95
"""Pillow's quality of the JPEG images that are encoded again."""
MAX_DECODED_CODES = 4096
"""Codes per level that are decoded and compared, the most used ones."""
_MIN_DIFFERENCE = 2.0
"""RMS difference of two patches that draw differently, in steps of 8 bits."""
_GRIDS = 2
"""Grids in which each code is decoded."""
_BATCH = 64
_MAX_SIDE = 8
"""Codes per side of the grid in which a code is decoded: what lies farther away matters little."""


@torch.no_grad()
def distinct_codes(tokenizer: TokenizerModule, counts: Tensor) -> dict[str, int]:
    """How many of the codes in use draw differently, given a histogram (sum of K,) over all levels:
    the sum over the levels under "" and, where there are several, each one's number under
    "_level_1", ...

    Each code in use is decoded in the middle of two grids of at most 8x8 codes, whose other codes
    are drawn by their use (seeded). Among one code alone, such as plain background, decoders of
    some tokenizers draw little of a code that never stands there. The count is greedy, the most
    used code first: a code counts if its patch differs from that of every counted code by an RMS of
    at least 2 of 255, in one of the grids.
    At most the `MAX_DECODED_CODES` most used codes of a level are decoded, so more are not counted.

    Raises:
        ValueError: the tokenizer has Gaussian latents.
    """
    tokenizer.require_codes("distinct_codes")
    config = tokenizer.own_config
    side = max(_MAX_SIDE, 2 * config.stride // config.downsample_factor)
    grid = (min(tokenizer.grid[0], side), min(tokenizer.grid[1], side))
    layout = tokenizer.quantizer.layout(grid)
    distinct = {}
    start = 0
    for number, level in enumerate(layout, start=1):
        own_counts = counts.split([one.num_codes for one in layout])[number - 1]
        by_use = own_counts.argsort(descending=True, stable=True)
        used = by_use[: int((own_counts > 0).sum())][:MAX_DECODED_CODES]
        rows, columns = level.grid
        patches = []
        for seed in range(_GRIDS if len(used) else 0):
            streams = codes_by_use(counts, layout, seed).repeat(len(used), 1)
            streams[:, start + rows // 2 * columns + columns // 2] = used
            patches.append(decode_middle(tokenizer, streams, grid, number - 1))
        distinct[f"_level_{number}"] = _count_different(patches)
        start += level.length
    total = {"": sum(distinct.values())}
    return total | distinct if len(layout) > 1 else total


def codes_by_use(counts: Tensor, layout: Sequence[Level], seed: int) -> Tensor:
    """The codes (N,) of an image, each drawn by its use in its level: a histogram (sum of K,) over
    all levels, in which each level is used."""
    generator = torch.Generator().manual_seed(seed)
    parts = counts.split([level.num_codes for level in layout])
    drawn = [
        part.double().cpu().multinomial(level.length, replacement=True, generator=generator)
        for part, level in zip(parts, layout, strict=True)
    ]
    return torch.cat(drawn).to(counts.device)


def common_codes(counts: Tensor, layout: Sequence[Level]) -> Tensor:
    """The codes (N,) of an image that holds the commonest code of each level, by a histogram
    (sum of K,) over all levels."""
    parts = counts.split([level.num_codes for level in layout])
    return torch.cat(
        [part.argmax().expand(level.length) for part, level in zip(parts, layout, strict=True)]
    )


@torch.no_grad()
def decode_middle(
    tokenizer: TokenizerModule, streams: Tensor, grid: tuple[int, int], number: int
) -> Tensor:
    """What images of these codes (B,N) show in the middle position of a level, counted from 0:
    uint8 (B,height,width,C). `grid` is the finest grid's height and width."""
    layout = tokenizer.quantizer.layout(grid)
    rows, columns = layout[number].grid
    height = grid[0] * tokenizer.own_config.downsample_factor // rows
    width = grid[1] * tokenizer.own_config.downsample_factor // columns
    top = rows // 2 * height
    left = columns // 2 * width
    patches = []
    for some in streams.to(tokenizer.device).split(_BATCH):
        # A compiled decoder compiles again for each size of a batch.
        filled = F.pad(some, (0, 0, 0, _BATCH - len(some)))
        codes = filled if len(layout) > 1 else filled.unflatten(1, grid)
        images = to_uint8(tokenizer.decode(codes, grid))[: len(some)]
        patches.append(images[:, top : top + height, left : left + width].cpu())
    return torch.cat(patches)


def _count_different(patches: Sequence[Tensor]) -> int:
    """How many codes differ from all that count before them, given the patches uint8
    (B,height,width,C) of B codes in each grid."""
    if not patches:
        return 0
    left = torch.ones(len(patches[0]), dtype=torch.bool)
    same = torch.stack([_alike(of_grid) for of_grid in patches]).all(0)
    count = 0
    for number, row in enumerate(same):
        if left[number]:
            left &= ~row
            count += 1
    return count


def _alike(patches: Tensor) -> Tensor:
    """Which of the patches uint8 (B,height,width,C) draw the same: (B,B) bool."""
    flat = patches.flatten(1).double()  # squared distances of integers are exact
    norms = flat.square().sum(1)
    limit = _MIN_DIFFERENCE**2 * flat.shape[1]
    rows = [
        norm[:, None] + norms - 2 * some @ flat.T < limit
        for some, norm in zip(flat.split(_BATCH), norms.split(_BATCH), strict=True)
    ]
    return torch.cat(rows)


@torch.no_grad()
def unchanged_codes(
    tokenizer: TokenizerModule, codes: Tensor, images: Tensor, *, jpeg_quality: int | None = None
) -> Tensor:
    """(B,N) bool: whether each code (B,h,w) or (B,N) is the same after its image is encoded again.

    `images` uint8 (B,H,W,C) are what the codes decode to. With `jpeg_quality` they are stored as
    JPEG in between, which needs three channels.
    """
    if jpeg_quality is not None:
        images = through_jpeg(images, jpeg_quality)
    # Contiguous, or the encoder would see another memory format than that of other images.
    pixels = to_model_range(images.contiguous().to(tokenizer.device))
    return (tokenizer.encode(pixels) == codes.to(tokenizer.device)).flatten(1).cpu()


def agreement_by_level(unchanged: Tensor, layout: Sequence[Level]) -> dict[str, float]:
    """The fraction of unchanged codes, given `unchanged` (B,N): over all codes under "" and, where
    there are several levels, each one's under "_level_1", ..."""
    parts = {"": unchanged}
    if len(layout) > 1:
        split = unchanged.split([level.length for level in layout], dim=1)
        parts |= {f"_level_{number}": part for number, part in enumerate(split, start=1)}
    return {name: float(part.double().mean()) for name, part in parts.items()}


def reencoding_metrics(
    tokenizer: TokenizerModule, batches: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, float]:
    """The fraction of codes that stay the same after their image is encoded again:
    `reencode_agreement` at once, `reencode_agreement_jpeg95` after JPEG of quality 95; where there
    are several levels, also each one's under `..._level_1`, ...

    A batch is codes (B,h,w) or (B,N) of real images, and the uint8 images (B,H,W,3) that they
    decode to.
    """
    factor = tokenizer.own_config.downsample_factor
    height, width = batches[0][1].shape[1:3]
    layout = tokenizer.quantizer.layout((height // factor, width // factor))
    metrics = {}
    for suffix, quality in {"": None, f"_jpeg{JPEG_QUALITY}": JPEG_QUALITY}.items():
        unchanged = torch.cat(
            [
                unchanged_codes(tokenizer, codes, images, jpeg_quality=quality)
                for codes, images in batches
            ]
        )
        for level, agreement in agreement_by_level(unchanged, layout).items():
            metrics[f"reencode_agreement{suffix}{level}"] = agreement
    return metrics
