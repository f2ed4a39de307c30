"""Residual quantization: several codes per position, each for what the ones before it left over.
Knows vectors; nothing of images.

Legend: B batch, D features of a code, h w code grid, N = B h w vectors.

RQ-VAE, Lee et al. 2022 (https://arxiv.org/abs/2203.01941), section 3.1. The stream holds all first
codes, then all second ones: a stream truncated after any depth is a coarser image.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from stage1_tokenizer.config import Level
from stage1_tokenizer.options import ResidualOptions, VectorOptions
from stage1_tokenizer.quantizers.base import Quantized, Quantizer, metrics_of_levels
from stage1_tokenizer.quantizers.gradients import pass_gradient
from stage1_tokenizer.quantizers.vector import VectorQuantizer, l2_normalize


class ResidualQuantizer(Quantizer):
    """`depth` vector quantizers in a row, or one that is used `depth` times."""

    def __init__(
        self, num_codes: int, code_dim: int, options: ResidualOptions, vector: VectorOptions
    ) -> None:
        super().__init__(code_dim, code_dim)
        self.num_codes = num_codes
        self.options = vector
        free = replace(vector, normalize=False)
        self.books = nn.ModuleList(
            VectorQuantizer(num_codes, code_dim, free)
            for _ in range(1 if options.shared else options.depth)
        )
        self.used = [0 if options.shared else i for i in range(options.depth)]
        """Number of the book of each depth."""

    def forward(self, features: Tensor, temperature: float | None = None) -> Quantized:
        """Features (B,D,h,w) -> the sum of their codes' vectors; there is nothing to relax, so
        `temperature` is not used."""
        b, d, h, w = features.shape
        with torch.autocast(features.device.type, enabled=False):
            vectors = features.float().permute(0, 2, 3, 1).reshape(-1, d)
            left = vectors = l2_normalize(vectors) if self.options.normalize else vectors
            parts = []
            seen = []
            for number in self.used:
                assigned = self._book(number).assign(left)
                parts.append(assigned)
                seen.append(left.detach())
                left = left - assigned.chosen.detach()
            if self.training:
                for number in range(len(self.books)):
                    own = [i for i, used in enumerate(self.used) if used == number]
                    self._book(number).update_codebook(
                        torch.cat([seen[i] for i in own]), torch.cat([parts[i].codes for i in own])
                    )
                for part, number in zip(parts, self.used, strict=True):
                    part.metrics |= self._book(number).usage_metrics()
            chosen = torch.stack([part.chosen for part in parts]).sum(0)
            latents = pass_gradient(vectors, chosen, self.options.gradient)
        codes = torch.cat([part.codes.reshape(b, h * w) for part in parts], dim=1)
        loss = torch.stack([part.loss for part in parts]).sum()
        shaped = latents.reshape(b, h, w, d).permute(0, 3, 1, 2)
        return Quantized(
            shaped,
            self._shaped(codes, (h, w)),
            loss,
            metrics=metrics_of_levels([part.metrics for part in parts], self.usage()),
        )

    def layout(self, grid: tuple[int, int]) -> tuple[Level, ...]:
        return (Level(grid=grid, num_codes=self.num_codes),) * len(self.used)

    def embed(self, codes: Tensor, grid: tuple[int, int]) -> Tensor:
        parts = codes.reshape(len(codes), len(self.used), *grid).unbind(1)
        return torch.stack(
            [
                self._book(number).embed(part, grid)
                for part, number in zip(parts, self.used, strict=True)
            ]
        ).sum(0)

    def vectors(self) -> Tensor:
        return torch.cat([self._book(number).vectors() for number in self.used])

    def usage(self) -> list[Tensor]:
        return [use for number in self.used for use in self._book(number).usage()]

    def _book(self, number: int) -> VectorQuantizer:
        book = self.books[number]
        assert isinstance(book, VectorQuantizer)
        return book

    def _shaped(self, codes: Tensor, grid: tuple[int, int]) -> Tensor:
        """Flat codes as they are; as a grid where there is a single depth."""
        return codes.reshape(len(codes), *grid) if len(self.used) == 1 else codes
