"""Gumbel-max samples codes; Gumbel-softmax relaxes them, and its gradient is biased.

    python -m examples.lectures.gumbel --out gumbel.png

Counts of argmax(logits + noise) beside the softmax; relaxed samples on the simplex of three codes;
bias and spread of the relaxed gradient of E[cost] against the exact one. Noise and relaxation are
those of `stage1_tokenizer/quantizers/`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from examples.lectures.plots import canvas, out_option
from stage1_tokenizer.quantizers.categorical import gumbel_noise_like
from stage1_tokenizer.quantizers.gumbel import relax

LOGITS = torch.tensor([0.8, 0.0, -0.6])
VECTORS = torch.tensor([-1.0, 0.4, 1.5])
"""The number that the decoder sees of each code."""
TARGET = 0.9
CORNERS = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.866]])
SHOWN = (2.0, 0.5, 0.1)
TEMPERATURES = (0.05, 0.1, 0.2, 0.4, 0.7, 1.0, 2.0)


def cost(weights: Tensor) -> Tensor:
    """Squared error of the decoder (...) for weights of the codes (...,3)."""
    return (weights @ VECTORS - TARGET).square()


def shares(samples: int, generator: torch.Generator) -> Tensor:
    """How often each code (3,) is the argmax of logits plus noise."""
    logits = LOGITS.expand(samples, 3)
    codes = (logits + gumbel_noise_like(logits, generator)).argmax(1)
    return torch.bincount(codes, minlength=3) / samples


def exact_gradient() -> Tensor:
    """Gradient (3,) of the expected cost, a sum over the codes."""
    logits = LOGITS.clone().requires_grad_()
    expected = logits.softmax(0) @ cost(torch.eye(3))
    return torch.autograd.grad(expected, logits)[0]


def relaxed_gradients(temperature: float, samples: int, generator: torch.Generator) -> Tensor:
    """Gradients (samples,3) of the cost of relaxed samples."""
    logits = LOGITS.repeat(samples, 1).requires_grad_()
    noise = gumbel_noise_like(logits.detach(), generator)
    return torch.autograd.grad(cost(relax(logits, noise, temperature)).sum(), logits)[0]


def main(out: Path, samples: int = 20_000) -> None:
    """Counts, the simplex at three temperatures, and the gradient."""
    generator = torch.Generator().manual_seed(0)
    plot = canvas(13, 3.6)
    counts, *simplexes, errors = plot.subplots(1, 2 + len(SHOWN))
    counts.bar([0.8, 1.8, 2.8], LOGITS.softmax(0).tolist(), width=0.4, label="softmax")
    counts.bar([1.2, 2.2, 3.2], shares(samples, generator).tolist(), width=0.4, label="Gumbel-max")
    counts.set(title="share of each code", xticks=[1, 2, 3], xlabel="code")
    for axes, temperature in zip(simplexes, SHOWN, strict=True):
        logits = LOGITS.expand(1500, 3)
        points = relax(logits, gumbel_noise_like(logits, generator), temperature) @ CORNERS
        axes.plot(*CORNERS[[0, 1, 2, 0]].T, "k", linewidth=1)
        axes.scatter(*points.T, s=3, alpha=0.4)
        axes.set(title=f"relaxed, t = {temperature}", aspect="equal")
        axes.axis("off")
    exact = exact_gradient()
    found = [relaxed_gradients(t, samples, generator) for t in TEMPERATURES]
    length = float(exact.norm())
    bias = [float((gradients.mean(0) - exact).norm()) / length for gradients in found]
    spread = [float(gradients.var(0).sum().sqrt()) / length for gradients in found]
    errors.plot(TEMPERATURES, bias, "o-", label="bias")
    errors.plot(TEMPERATURES, spread, "o-", label="standard deviation")
    errors.set(title="error of the gradient", xscale="log", yscale="log", xlabel="t")
    for axes in (counts, errors):
        axes.legend(fontsize=8)
    plot.savefig(out)


if __name__ == "__main__":
    main(out_option(__doc__ or ""))
