"""An image for each code: a grid filled with it (naive), or a grid optimized so that the decoded
image is encoded as it (Gumbel). Knows tokenizers and 8-bit images; no data set.

Legend: n codes to show, B codes in a batch, H W pixels, C channels, h w code grid, N codes of an
image over all levels, K codes of the codebook.

The optimization is activation maximization (Erhan et al. 2009) of a code, through the
Gumbel-softmax relaxation (Jang et al. 2016, https://arxiv.org/abs/1611.01144, eq. 2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stage1_tokenizer.model import TokenizerModule
from stage1_tokenizer.pixels import to_model_range, to_uint8
from stage1_tokenizer.quantizers import VectorQuantizer
from stage1_tokenizer.quantizers.categorical import Categorical, gumbel_noise_like
from stage1_tokenizer.quantizers.gumbel import relax

GUMBEL_QUANTIZERS = ("vq", "gumbel", "score_function")
"""Quantizers with Gumbel views: those with one soft assignment per position."""
STEPS = 60
"""Steps of Adam. Each decodes and encodes the images of all codes once, with gradients."""
_LEARNING_RATE = 1.0
_TEMPERATURES = (1.0, 0.5)
"""Of the first and the last step; geometric in between."""
_BATCH = 64
_MAX_PIXELS = 2**18
"""Pixels of the images that are optimized at a time: 64 images of 64x64."""
_MAX_LOGITS = 2**24
"""Logits that are optimized at a time, which Adam holds three times."""


@dataclass
class CodeViews:
    """An image for each of n codes."""

    images: Tensor
    """uint8 (n,H,W,C)."""
    fractions: Tensor
    """(n,) float: of the codes that the image is encoded as, the fraction that are the shown
    code."""


@dataclass
class OptimizedGrids:
    """A grid of codes for each of B codes, and how it was found."""

    grids: Tensor
    """(B,h,w) int64."""
    objective: Tensor
    """(steps,B): mean log-probability of the shown code over the positions, in nats, while the
    codes are relaxed."""


@torch.no_grad()
def naive_views(
    tokenizer: TokenizerModule, codes: Tensor, common: Tensor, grid: tuple[int, int], number: int
) -> CodeViews:
    """Each code (n,) of a level, counted from 0, in every position of its level.

    Other levels hold their codes of `common` (N,). `grid` is the finest grid's height and width.
    """
    levels = tokenizer.quantizer.layout(grid)
    start = sum(level.length for level in levels[:number])
    streams = common.repeat(len(codes), 1)
    streams[:, start : start + levels[number].length] = codes[:, None]
    images = []
    for some in streams.to(tokenizer.device).split(_BATCH):
        shaped = some if len(levels) > 1 else some.unflatten(1, grid)
        images.append(to_uint8(tokenizer.decode(shaped, grid)).cpu())
    return _with_fractions(tokenizer, torch.cat(images), codes, grid, number)


def gumbel_views(
    tokenizer: TokenizerModule,
    codes: Tensor,
    grid: tuple[int, int],
    *,
    steps: int = STEPS,
    seed: int = 0,
) -> CodeViews:
    """For each code (n,) the grid of codes whose image is encoded as it most, found by
    `optimize_grids`. An image does not depend on the other codes, but for rounding.

    Raises:
        ValueError: the quantizer has no Gumbel views.
    """
    check_gumbel(tokenizer)
    positions = grid[0] * grid[1]
    pixels = positions * tokenizer.own_config.downsample_factor**2
    most = min(_MAX_PIXELS // pixels, _MAX_LOGITS // (positions * tokenizer.num_codes), _BATCH)
    images = []
    for some in codes.split(max(most, 1)):
        found = optimize_grids(tokenizer, some, grid, steps=steps, seed=seed)
        images.append(to_uint8(tokenizer.decode(found.grids, grid)).cpu())
    return _with_fractions(tokenizer, torch.cat(images), codes, grid, 0)


def check_gumbel(tokenizer: TokenizerModule) -> None:
    """Raises ValueError where the tokenizer's quantizer has no Gumbel views."""
    name = tokenizer.own_config.quantizer
    if name not in GUMBEL_QUANTIZERS:
        raise ValueError(
            f"the quantizer is {name}, and Gumbel images of codes need one of "
            f"{', '.join(GUMBEL_QUANTIZERS)}; choose the mode naive"
        )


def optimize_grids(
    tokenizer: TokenizerModule,
    codes: Tensor,
    grid: tuple[int, int],
    *,
    steps: int = STEPS,
    seed: int = 0,
) -> OptimizedGrids:
    """For each code (B,) a grid of codes (h,w) whose image is encoded as it.

    Free logits (B,h,w,K) are relaxed by Gumbel noise and a falling temperature. The relaxed vectors
    are decoded, and the image is encoded. Adam raises the mean log-probability of the code over the
    positions, by the quantizer's soft assignment. It bounds the log of the code's share from below
    (Jensen); the share itself has hardly a gradient where it is small. The logits start so that
    each position holds the code with probability 1/2, and the likeliest codes are the result.

    All codes see the same noise. Weights stay as they are and get no gradients.
    """
    quantizer = tokenizer.quantizer
    assert isinstance(quantizer, VectorQuantizer | Categorical)
    device = tokenizer.device
    generator = torch.Generator().manual_seed(seed)
    table = quantizer.vectors().detach().float()
    own = codes.to(device)[:, None, None, None].expand(-1, *grid, 1)
    logits = torch.zeros(len(codes), *grid, len(table), device=device)
    logits.scatter_(3, own, math.log(max(len(table) - 1, 1))).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=_LEARNING_RATE)
    like = torch.empty(1, *grid, len(table))  # on the CPU: a seed means the same on every device
    objective = []
    for step in range(steps):
        noise = gumbel_noise_like(like, generator).to(device)
        with torch.enable_grad():
            latents = relax(logits, noise, _temperature(step, steps)) @ table
            log_p = quantizer.log_assignment(_encoded(tokenizer, latents)).gather(3, own)
            mean = log_p.mean((1, 2, 3))
            (-mean.sum()).backward(inputs=[logits])
        optimizer.step()
        optimizer.zero_grad()
        objective.append(mean.detach().cpu())
    return OptimizedGrids(logits.detach().argmax(3), torch.stack(objective))


def _encoded(tokenizer: TokenizerModule, latents: Tensor) -> Tensor:
    """Latents (B,h,w,D) -> the features that the encoder has of their image, with gradients."""
    parameters = tokenizer.decoder(latents.permute(0, 3, 1, 2).to(tokenizer.dtype))
    pixels = tokenizer.likelihood.image(parameters).clamp(-1, 1)
    features: Tensor = tokenizer.encoder(pixels.to(tokenizer.dtype))
    return features


def _temperature(step: int, steps: int) -> float:
    """Geometric from the first temperature to the last one."""
    first, last = _TEMPERATURES
    return first * (last / first) ** (step / max(steps - 1, 1))


@torch.no_grad()
def _with_fractions(
    tokenizer: TokenizerModule, images: Tensor, codes: Tensor, grid: tuple[int, int], number: int
) -> CodeViews:
    """The views of codes (n,) of a level by their images uint8 (n,H,W,C), which are encoded."""
    lengths = [level.length for level in tokenizer.quantizer.layout(grid)]
    fractions = []
    for some, shown in zip(images.split(_BATCH), codes.split(_BATCH), strict=True):
        # Contiguous, or the encoder would see another memory format than that of other images.
        pixels = to_model_range(some.contiguous().to(tokenizer.device))
        again = tokenizer.encode(pixels).flatten(1).split(lengths, 1)[number].cpu()
        fractions.append((again == shown.cpu()[:, None]).double().mean(1))
    return CodeViews(images, torch.cat(fractions))
