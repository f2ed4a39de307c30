"""Fits one Gaussian q to a mixture p of two Gaussians under six f-divergences, and draws the fits.

    python -m examples.lectures.f_divergences --out f_divergences.png

D_f(p || q) = E_q[f(p / q)] for a convex f with f(1) = 0. The generators are those of f-GAN (Nowozin
et al. 2016, https://arxiv.org/abs/1606.00709, table 1), with two differences. The generator of
Jensen-Shannon is halved, so that the divergence is at most log 2. The generator of GAN is raised by
log 4, so that f(1) = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from examples.lectures.plots import canvas, out_option

Generator = Callable[[Tensor], Tensor]


def gan(u: Tensor) -> Tensor:
    """Twice Jensen-Shannon: what a GAN's generator minimises against the best discriminator, plus
    log 4 (Goodfellow et al. 2014)."""
    return torch.xlogy(u, u) - torch.xlogy(u + 1, u + 1) + (u + 1) * math.log(2)


GENERATORS: dict[str, Generator] = {
    "KL": lambda u: torch.xlogy(u, u),
    "reverse KL": lambda u: -u.log(),
    "Pearson": lambda u: (u - 1).square(),
    "squared Hellinger": lambda u: (u.sqrt() - 1).square(),
    "Jensen-Shannon": lambda u: gan(u) / 2,
    "GAN": gan,
}
"""Name -> f, of ratios p/q above 0."""


@dataclass(frozen=True)
class Gaussian:
    """A normal distribution of numbers."""

    mean: float
    std: float


@dataclass(frozen=True)
class Mixture:
    """A mixture of Gaussians; the weights sum to 1."""

    weights: tuple[float, ...]
    parts: tuple[Gaussian, ...]


TARGET = Mixture((0.65, 0.35), (Gaussian(-2.0, 0.8), Gaussian(2.5, 1.0)))
POINTS = torch.linspace(-10, 10, 501, dtype=torch.float64)
ROUNDS = 10
SIDE = 31


def log_normal(x: Tensor, mean: Tensor | float, std: Tensor | float) -> Tensor:
    """Log density of N(mean, std^2)."""
    std = torch.as_tensor(std, dtype=x.dtype)
    return -((x - mean) / std).square() / 2 - std.log() - math.log(2 * math.pi) / 2


def log_mixture(x: Tensor, mixture: Mixture) -> Tensor:
    """Log density of a mixture."""
    parts = [
        math.log(weight) + log_normal(x, part.mean, part.std)
        for weight, part in zip(mixture.weights, mixture.parts, strict=True)
    ]
    return torch.stack(parts).logsumexp(0)


def divergence(log_p: Tensor, log_q: Tensor, spacing: float, f: Generator) -> Tensor:
    """D_f(p || q) of log densities (...,N) on N points, this far apart: (...)."""
    return (log_q.exp() * f((log_p - log_q).exp())).sum(-1) * spacing


def fit(target: Mixture, f: Generator) -> Gaussian:
    """The Gaussian q with the least D_f(target || q): the best of a grid of means and standard
    deviations, which is laid again around the best, finer."""
    spacing = float(POINTS[1] - POINTS[0])
    log_p = log_mixture(POINTS, target)
    best = Gaussian(0.0, 2.4)
    reach = Gaussian(4.0, 2.0)
    for _ in range(ROUNDS):
        offsets = torch.linspace(-1, 1, SIDE, dtype=POINTS.dtype)
        means = best.mean + reach.mean * offsets[:, None]
        stds = (best.std + reach.std * offsets).clamp(min=0.4)
        log_q = log_normal(POINTS, means[..., None], stds[:, None])
        found = divergence(log_p, log_q, spacing, f).argmin()
        best = Gaussian(float(means[found // SIDE]), float(stds[found % SIDE]))
        reach = Gaussian(reach.mean / 3, reach.std / 3)
    return best


def main(out: Path) -> None:
    """A panel per divergence: the mixture and the Gaussian that fits it best."""
    plot = canvas(10, 5.5)
    x = POINTS[(POINTS >= -7) & (POINTS <= 7)]
    panels = plot.subplots(2, 3, sharex=True, sharey=True).flat
    for axes, (name, f) in zip(panels, GENERATORS.items(), strict=True):
        q = fit(TARGET, f)
        axes.fill_between(x, log_mixture(x, TARGET).exp(), color="0.8", label="mixture p")
        axes.plot(x, log_normal(x, q.mean, q.std).exp(), label="best Gaussian q")
        axes.set_title(f"{name}\nmean {q.mean:.2f}, standard deviation {q.std:.2f}", fontsize=10)
        axes.grid(alpha=0.3)
    plot.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    plot.supxlabel("x")
    plot.supylabel("density")
    plot.savefig(out)


if __name__ == "__main__":
    main(out_option(__doc__ or ""))
