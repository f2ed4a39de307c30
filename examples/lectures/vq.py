"""Codes partition the plane: the cells of nearest codes while moving averages move the codes.

    python -m examples.lectures.vq --out vq.png

The quantizer is that of `stage1_tokenizer/quantizers/vector.py`, with vectors of two features that
are not normalised. It starts from codes in one corner instead of vectors of the first batch, so
that the moves are long. Codes without vectors restart where the error is large.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from examples.lectures.plots import canvas, out_option
from stage1_tokenizer.options import VectorOptions
from stage1_tokenizer.quantizers.vector import VectorQuantizer, nearest

CODES = 16
SHOWN = (0, 9, 150)
"""Steps after which the cells are drawn."""
EDGE = 4.0
SIDE = 200


def vectors(count: int, generator: torch.Generator) -> Tensor:
    """Vectors (count,2): a ring around a blob."""
    angle = 2 * torch.pi * torch.rand(count, generator=generator)
    ring = 2.5 * torch.stack([angle.cos(), angle.sin()], dim=1)
    outside = torch.rand(count, 1, generator=generator) < 0.7
    return ring * outside + 0.35 * torch.randn(count, 2, generator=generator)


def train(steps: int, seed: int = 0) -> tuple[list[Tensor], list[float]]:
    """The codebook (K,2) before each step and at the end, and the mean squared error of each."""
    generator = torch.Generator().manual_seed(seed)
    options = VectorOptions(normalize=False, decay=0.9)
    quantizer = VectorQuantizer(CODES, 2, options)
    quantizer.codebook.copy_(0.5 * torch.randn(CODES, 2, generator=generator) - 2.5)
    quantizer.initialized.fill_(True)
    books = [quantizer.vectors()]
    errors = []
    for _ in range(steps):
        features = vectors(512, generator).T.reshape(1, 2, 16, 32)
        found = quantizer(features)
        errors.append(float((features - found.latents).square().sum(1).mean()))
        books.append(quantizer.vectors())
    return books, errors


def main(out: Path, steps: int = 150) -> None:
    """Cells and codes at three times, and the error per step."""
    books, errors = train(steps)
    data = vectors(600, torch.Generator().manual_seed(1))
    axis = torch.linspace(-EDGE, EDGE, SIDE)
    grid = torch.cartesian_prod(axis, axis)
    plot = canvas(13, 3.6)
    *cells, curve = plot.subplots(1, 4)
    for axes, step in zip(cells, SHOWN, strict=True):
        book = books[min(step, steps)]
        owners = nearest(grid, book).reshape(SIDE, SIDE).T.numpy()
        axes.imshow(
            owners, origin="lower", extent=(-EDGE, EDGE, -EDGE, EDGE), cmap="tab20", alpha=0.5
        )
        axes.scatter(*data.T, s=2, color="k", alpha=0.4)
        axes.scatter(*book.T, s=40, color="w", edgecolors="k")
        axes.set(title=f"cells of {CODES} codes, step {step}", xlim=(-EDGE, EDGE))
        axes.set(ylim=(-EDGE, EDGE), aspect="equal")
    curve.plot(range(1, steps + 1), errors)
    curve.set(title="squared distance to the code", xlabel="step", xscale="log", yscale="log")
    plot.savefig(out)


if __name__ == "__main__":
    main(out_option(__doc__ or ""))
