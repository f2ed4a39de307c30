"""log p(x) of a mixture, exactly and by samples of its latent variable.

    python -m examples.lectures.likelihood --out likelihood.png

p(x) = sum_z p(z) p(x|z) is the mean of p(x|z) over samples of the prior. The mean over S samples is
unbiased. Its logarithm is too low on average (Jensen's inequality), and far too low where few
samples explain x. The exact sum is that of `stage2_prior/flows/mixture.py`.

Legend: K components, S samples of z, R repetitions.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from examples.lectures.plots import canvas, out_option
from stage2_prior.flows.base import standard_normal_log_prob
from stage2_prior.flows.mixture import Components, mixture_log_prob

COMPONENTS = 200
STD = 0.02
POINTS = {"x = -1.5": -1.5, "x = 0.1": 0.1, "x = 2.6": 2.6}
COUNTS = tuple(2**power for power in range(15))


def model() -> Components:
    """K narrow Gaussians in a row. Their weights have two modes."""
    means = torch.linspace(-4, 4, COMPONENTS, dtype=torch.float64)[:, None]
    wide = standard_normal_log_prob((means + 1.5) / 0.5)
    narrow = standard_normal_log_prob((means - 1) / 0.7)
    log_weights = torch.logaddexp(wide, narrow).log_softmax(0)
    return Components(log_weights[None], means, torch.full_like(means, math.log(STD)))


def log_likelihood(x: Tensor, mixture: Components) -> Tensor:
    """log p(x,z) of numbers (N,), summed over all z in the logarithm: (N,)."""
    return mixture_log_prob(x[:, None], mixture)


def log_estimates(
    x: float, mixture: Components, samples: int, repetitions: int, generator: torch.Generator
) -> Tensor:
    """R estimates of log p(x), each from S samples of the prior p(z)."""
    weights = mixture.log_weights[0].exp()
    z = weights.multinomial(repetitions * samples, replacement=True, generator=generator)
    standardized = (x - mixture.means[z]) * (-mixture.log_stds[z]).exp()
    log_p = standard_normal_log_prob(standardized) - mixture.log_stds[z, 0]
    return log_p.reshape(repetitions, samples).logsumexp(1) - math.log(samples)


def main(out: Path, repetitions: int = 100) -> None:
    """The density, and for three points the estimates against the number of samples."""
    mixture = model()
    generator = torch.Generator().manual_seed(0)
    grid = torch.linspace(-4, 4, 800, dtype=torch.float64)
    plot = canvas(11, 3.8)
    density, estimates = plot.subplots(1, 2)
    density.plot(grid, log_likelihood(grid, mixture).exp(), "k")
    for number, (name, x) in enumerate(POINTS.items()):
        exact = float(log_likelihood(torch.tensor([x], dtype=torch.float64), mixture))
        density.axvline(x, color=f"C{number}", linestyle=":", label=name)
        found = [log_estimates(x, mixture, count, repetitions, generator) for count in COUNTS]
        low, middle, high = torch.stack(found).quantile(
            torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), dim=1
        )
        estimates.axhline(exact, color=f"C{number}", linestyle=":")
        estimates.plot(COUNTS, middle, f"C{number}", label=name)
        estimates.fill_between(COUNTS, low, high, color=f"C{number}", alpha=0.2)
    density.set(title=f"p(x), a mixture of {COMPONENTS} Gaussians", xlabel="x", ylabel="density")
    estimates.set(title="log p(x): exact (dotted), median and 80% of estimates")
    estimates.set(xscale="log", xlabel="samples of z", ylabel="nats", ylim=(-20, 2))
    for axes in (density, estimates):
        axes.legend(fontsize=8)
    plot.savefig(out)


if __name__ == "__main__":
    main(out_option(__doc__ or ""))
