"""Variance and bias of the gradient that each quantizer gives its encoder. The exact gradient is
known for one position of 32 codes.

    python -m benchmarks.gradient_variance [--samples 2000]
        [--out docs/images/gradient-variance.png]

A batch of logits, a codebook and a decoder of two layers are sampled once. The cost is a squared
error. Every estimator computes the gradient of the same logits from its own samples; the exact
gradient sums over all codes. Categorical estimators have 32 logits, those of bits 5.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from stage1_tokenizer.quantizers.bits import unpack
from stage1_tokenizer.quantizers.categorical import gumbel_noise_like
from stage1_tokenizer.quantizers.gumbel import reinmax, relax, straight_through
from stage1_tokenizer.quantizers.smoothing import smooth

CODES = 32
BITS = 5
DIM = 8
IMAGES = 16
TEMPERATURES = (0.1, 0.15, 0.25, 0.4, 0.6, 0.8, 1.0, 1.5, 2.5)
Estimator = Callable[[Tensor, float], Tensor]


class Problem:
    """Logits, codes' vectors and a decoder that are the same for all estimators."""

    def __init__(self, inputs: int) -> None:
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        self.logits = draw(IMAGES, inputs)
        self.codebook = draw(CODES, DIM) if inputs == CODES else unpack(torch.arange(CODES), BITS)
        self.first = draw(self.codebook.shape[1], 32) / self.codebook.shape[1] ** 0.5
        self.second = draw(32, 12) / 32**0.5
        self.target = draw(IMAGES, 12)

    def cost(self, latents: Tensor) -> Tensor:
        """Latents (...,B,D) -> costs (...,B)."""
        return ((latents @ self.first).relu() @ self.second - self.target).square().sum(-1)

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """Of whole codes: (B,inputs) -> (B,K)."""
        return (logits if logits.shape[1] == CODES else logits @ self.codebook.T / 2).log_softmax(1)

    def exact(self) -> Tensor:
        logits = self.logits.clone().requires_grad_()
        costs = self.cost(self.codebook[:, None].expand(-1, IMAGES, -1)).T
        (self.log_probabilities(logits).exp() * costs).sum().backward()
        assert logits.grad is not None
        return logits.grad


def relaxed(problem: Problem, weigh: Callable[[Tensor, Tensor, float], Tensor]) -> Estimator:
    def estimate(logits: Tensor, temperature: float) -> Tensor:
        return problem.cost(
            weigh(logits, gumbel_noise_like(logits), temperature) @ problem.codebook
        ).sum()

    return estimate


def score_function(problem: Problem, baseline: bool) -> Estimator:
    # What a running mean settles on.
    probabilities = problem.log_probabilities(problem.logits).exp()
    mean = (
        (probabilities * problem.cost(problem.codebook[:, None].expand(-1, IMAGES, -1)).T)
        .sum(1)
        .mean()
        if baseline
        else 0.0
    )

    def estimate(logits: Tensor, temperature: float) -> Tensor:
        log_q = problem.log_probabilities(logits)
        codes = log_q.detach().exp().multinomial(1)
        costs = problem.cost(problem.codebook[codes[:, 0]]).detach()
        return ((costs - mean) * log_q.gather(1, codes)[:, 0]).sum()

    return estimate


def smoothed(problem: Problem, kind: str) -> Estimator:
    def estimate(logits: Tensor, temperature: float) -> Tensor:
        return problem.cost(
            2 * smooth(logits.sigmoid(), torch.rand_like(logits), 1 / temperature, kind) - 1
        ).sum()  # type: ignore[arg-type]

    return estimate


def variance_and_bias(
    problem: Problem, estimate: Estimator, temperature: float, samples: int
) -> tuple[float, float]:
    """Both summed over the logits and divided by the exact gradient's squared length."""
    torch.manual_seed(0)
    gradients = []
    for _ in range(samples):
        logits = problem.logits.clone().requires_grad_()
        estimate(logits, temperature).backward()
        assert logits.grad is not None
        gradients.append(logits.grad)
    stacked = torch.stack(gradients)
    exact = problem.exact()
    length = exact.square().sum()
    # The mean's own noise is no bias.
    bias = (stacked.mean(0) - exact).square().sum() - stacked.var(0).sum() / samples
    return float(stacked.var(0).sum() / length), float(bias.clamp(min=0) / length)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path("docs/images/gradient-variance.png"))
    options = parser.parse_args()
    from matplotlib.figure import Figure

    categorical = Problem(CODES)
    bits = Problem(BITS)
    flat = {
        "score function": score_function(categorical, False),
        "score function, running baseline": score_function(categorical, True),
    }
    curves = {
        "Gumbel-softmax, relaxed": (categorical, relaxed(categorical, relax)),
        "Gumbel-softmax, straight-through": (categorical, relaxed(categorical, straight_through)),
        "ReinMax": (categorical, relaxed(categorical, reinmax)),
        "bits, exponential pair": (bits, smoothed(bits, "exponential_pair")),
        "bits, power-function pair": (bits, smoothed(bits, "power_pair")),
        "bits, spike-and-exponential": (bits, smoothed(bits, "spike_exponential")),
    }
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    for number, (name, estimate) in enumerate(flat.items()):
        variance, bias = variance_and_bias(categorical, estimate, 1.0, options.samples)
        print(f"{name:<36} variance {variance:10.3f}  bias {bias:8.4f}")
        left.axhline(variance, color="black", linestyle=("-", "--")[number], label=name)
    for name, (problem, estimate) in curves.items():
        # A power function at temperature 1 is flat and says nothing of its bit.
        temperatures = [t for t in TEMPERATURES if t < 1 or "power" not in name]
        rows = [
            variance_and_bias(problem, estimate, temperature, options.samples)
            for temperature in temperatures
        ]
        for temperature, (variance, bias) in zip(temperatures, rows, strict=True):
            print(
                f"{name:<36} temperature {temperature:4} variance {variance:10.3f}  bias "
                f"{bias:8.4f}"
            )
        left.plot(temperatures, [row[0] for row in rows], "o-", label=name, markersize=3)
        right.plot(temperatures, [row[1] for row in rows], "o-", label=name, markersize=3)
    for axes, title in ((left, "variance"), (right, "squared bias")):
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="temperature",
            ylabel=f"{title} / squared length of the exact gradient",
            title=title,
        )
        axes.grid(alpha=0.3)
    right.set_ylim(bottom=1e-4)
    left.legend(fontsize=8)
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
