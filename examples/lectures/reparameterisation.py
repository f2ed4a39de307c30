"""Gradients through a sample: of a Gaussian they exist, of a discrete code they are zero.

    python -m examples.lectures.reparameterisation --out reparameterisation.png

Left: 20,000 estimates of d E[(z - 2)^2] / d mean for z ~ N(mean, std^2), each from one sample, by
reparameterisation (`stage1_tokenizer/posterior.py`) and by the score function. Right: with fixed
noise, the cost of z = argmax(logits + noise) is a step function of a logit. Its gradient is 0
wherever it exists, and the gradient of the expected cost is not.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from examples.lectures.plots import canvas, out_option
from stage1_tokenizer.posterior import GaussianPosterior
from stage1_tokenizer.quantizers.categorical import gumbel_noise_like

MEAN = 0.5
STD = 0.8
COSTS = torch.tensor([3.0, 1.0, 2.0])
"""Cost of each of three codes."""


def cost(z: Tensor) -> Tensor:
    """(z - 2)^2. d E / d mean = 2 (mean - 2)."""
    return (z - 2).square()


def estimates(samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One-sample gradients of the mean (samples,): reparameterised, and by the score function."""
    mean = torch.full((samples, 1), MEAN, requires_grad=True)
    posterior = GaussianPosterior(mean, torch.full((samples, 1), STD).log())
    z = posterior.sample(generator)
    (through,) = torch.autograd.grad(cost(z).sum(), mean, retain_graph=True)
    weighted = cost(z.detach())[:, 0] * posterior.log_prob(z.detach())
    (score,) = torch.autograd.grad(weighted.sum(), mean)
    return through[:, 0], score[:, 0]


def costs_of_codes(first: Tensor, noise: Tensor) -> Tensor:
    """Costs (N,S) of argmax(logits + noise), for the first of three logits (N,), noise (S,3)."""
    logits = torch.stack([first, torch.zeros_like(first), torch.zeros_like(first)], dim=1)
    return COSTS[(logits[:, None] + noise).argmax(2)]


def expected_cost(first: Tensor) -> Tensor:
    """E[cost] (N,) over codes by the softmax of the logits."""
    logits = torch.stack([first, torch.zeros_like(first), torch.zeros_like(first)], dim=1)
    return logits.softmax(1) @ COSTS


def main(out: Path, samples: int = 20_000) -> None:
    """Histograms of both estimators, and the cost of codes against a logit."""
    generator = torch.Generator().manual_seed(0)
    through, score = estimates(samples, generator)
    plot = canvas(11, 4)
    histograms, steps = plot.subplots(1, 2)
    for name, values in (("score function", score), ("reparameterisation", through)):
        label = f"{name}: mean {values.mean():.2f}, standard deviation {values.std():.2f}"
        histograms.hist(values, bins=105, range=(-25, 10), density=True, alpha=0.6, label=label)
    histograms.axvline(2 * (MEAN - 2), color="k", label=f"exact: {2 * (MEAN - 2):.2f}")
    histograms.set(title="gradient of the mean, from one sample", xlabel="gradient")
    histograms.set(yscale="log", ylim=(1e-4, 10), ylabel="density")
    first = torch.linspace(-5, 5, 1001)
    noise = gumbel_noise_like(torch.zeros(50, 3), generator)
    found = costs_of_codes(first, noise)
    steps.plot(first, found[:, 0], "C0", label="one sample of the noise: gradient 0")
    steps.plot(first, found.mean(1), "C1", label="mean of 50 samples: gradient 0")
    steps.plot(first, expected_cost(first), "k", label="expected cost")
    steps.set(title="cost of a sampled code", xlabel="logit of the first code", ylabel="cost")
    for axes in (histograms, steps):
        axes.legend(fontsize=8)
    plot.savefig(out)


if __name__ == "__main__":
    main(out_option(__doc__ or ""))
