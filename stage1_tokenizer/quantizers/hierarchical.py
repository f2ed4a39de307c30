"""Several grids of codes, each finer than the one before and conditioned on it: the hierarchy of
VQ-VAE-2. Knows features.

Legend: B batch, C width of the layers between the levels, D features of a code, h w the finest
grid.

VQ-VAE-2, Razavi et al. 2019 (https://arxiv.org/abs/1906.00446), section 3.1 and algorithm 1: the
encoder's features are halved down to the top grid, which is quantized first; each finer level is
quantized given the coarser one's codes; the decoder sees all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stage1_tokenizer.config import Level
from stage1_tokenizer.options import HierarchicalOptions, VectorOptions
from stage1_tokenizer.quantizers.base import Quantized, Quantizer, metrics_of_levels
from stage1_tokenizer.quantizers.vector import VectorQuantizer


class HierarchicalQuantizer(Quantizer):
    """`levels` vector quantizers, the coarsest first."""

    def __init__(
        self, num_codes: int, code_dim: int, options: HierarchicalOptions, vector: VectorOptions
    ) -> None:
        super().__init__(options.width, code_dim)
        levels = options.levels
        width = options.width
        self.sizes = (*(options.coarse_codes or (num_codes,) * (levels - 1)), num_codes)
        self.books = nn.ModuleList(VectorQuantizer(size, code_dim, vector) for size in self.sizes)
        # Of a level, coarsest first: its features from the next finer ones'; its vectors, given the
        # coarser level; the coarser level's codes and context at its own resolution.
        self.down = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Conv2d(width, width, 2, stride=2))
            for _ in range(levels - 1)
        )
        self.inwards = nn.ModuleList(
            nn.Conv2d(width if i == 0 else 2 * width, code_dim, 1) for i in range(levels)
        )
        self.outwards = nn.ModuleList(
            nn.Conv2d(code_dim if i == 0 else code_dim + width, width, 3, padding=1)
            for i in range(levels - 1)
        )
        self.up = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Conv2d(width, 4 * width, 1), nn.PixelShuffle(2))
            for _ in range(levels - 1)
        )
        self.merge = nn.Conv2d(code_dim + width, code_dim, 1)

    def forward(self, features: Tensor, temperature: float | None = None) -> Quantized:
        """Features (B,C,h,w) -> codes of all levels; there is nothing to relax, so `temperature` is
        not used.

        Raises:
            ValueError: the grid cannot be halved as often as there are levels above the finest.
        """
        self.layout((features.shape[2], features.shape[3]))
        pyramid = [features]
        for halve in reversed(self.down):
            pyramid.insert(0, halve(pyramid[0]))
        results = []
        context = None
        for level, own in enumerate(pyramid):
            given = own if context is None else torch.cat([own, context], dim=1)
            quantized = self.books[level](self.inwards[level](given))
            results.append(quantized)
            context, latents = self._onwards(level, quantized.latents, context)
        codes = torch.cat([result.codes.flatten(1) for result in results], dim=1)
        loss = torch.stack([result.loss for result in results]).sum()
        metrics = metrics_of_levels([result.metrics for result in results], self.usage())
        return Quantized(latents, codes, loss, metrics=metrics)

    def layout(self, grid: tuple[int, int]) -> tuple[Level, ...]:
        halvings = len(self.books) - 1
        if grid[0] % 2**halvings or grid[1] % 2**halvings:
            raise ValueError(
                f"a grid of {grid[0]}x{grid[1]} codes cannot be halved {halvings} times; make both "
                f"a multiple of {2**halvings}"
            )
        return tuple(
            Level(grid=(grid[0] >> i, grid[1] >> i), num_codes=size)
            for i, size in zip(range(halvings, -1, -1), self.sizes, strict=True)
        )

    def embed(self, codes: Tensor, grid: tuple[int, int]) -> Tensor:
        levels = self.layout(grid)
        context = None
        latents = codes.new_zeros(())
        for i, (level, flat) in enumerate(
            zip(levels, codes.split([level.length for level in levels], dim=1), strict=True)
        ):
            part = self.books[i].embed(flat.reshape(len(codes), *level.grid), level.grid)  # type: ignore[operator]
            context, latents = self._onwards(i, part, context)
        return latents

    def vectors(self) -> Tensor:
        return torch.cat([book.vectors() for book in self.books])  # type: ignore[operator]

    def usage(self) -> list[Tensor]:
        return [use for book in self.books for use in book.usage()]  # type: ignore[operator]

    def _onwards(
        self, level: int, latents: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """A level's codes (B,D,.,.) and what is known of the coarser ones -> the context of the
        next level, and what the decoder sees."""
        latents = latents.to(self.merge.weight.dtype)
        known = latents if context is None else torch.cat([latents, context], dim=1)
        if level < len(self.up):
            return self.up[level](self.outwards[level](known)), latents
        return known, self.merge(known)
