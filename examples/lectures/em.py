"""Expectation maximisation of a Gaussian mixture, beside amortised inference with the same mixture.

    python -m examples.lectures.em --out em.png

Both need q(z|x) for the bound log p(x) >= E_q[log p(x,z) - log q(z|x)]. It falls short by the KL of
q(z|x) to p(z|x). EM (Dempster et al. 1977) computes the exact posterior of each number, so that the
bound is tight. Amortised inference (Kingma & Welling 2013) trains one small network for all
numbers. What it loses is the amortisation gap (Cremer et al. 2018).

Legend: n numbers, K components.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from examples.lectures.plots import canvas, out_option

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRUTH = ((0.35, -1.5, 0.4), (0.4, 0.5, 2.5), (0.25, 3.0, 0.5))
"""Weight, mean and standard deviation of each component that made the data."""


@dataclass(frozen=True)
class Mixture:
    """The generative model: z by the weights, then x given z from a Gaussian. Each is (K,)."""

    weights: Tensor
    means: Tensor
    stds: Tensor

    def log_joint(self, x: Tensor) -> Tensor:
        """log p(x,z) of numbers (n,): (n,K)."""
        distances = (x[:, None] - self.means) / self.stds
        constant = self.weights.log() - self.stds.log() - math.log(2 * math.pi) / 2
        return constant - distances.square() / 2

    def log_likelihood(self, x: Tensor) -> Tensor:
        """log p(x), (n,)."""
        return self.log_joint(x).logsumexp(1)

    def log_posterior(self, x: Tensor) -> Tensor:
        """log p(z|x), (n,K): the E-step."""
        return self.log_joint(x).log_softmax(1)


def sample(count: int, seed: int = 0) -> Tensor:
    """Numbers from the true mixture, (count,)."""
    generator = torch.Generator().manual_seed(seed)
    weights, means, stds = torch.tensor(TRUTH, dtype=torch.float64).T
    z = weights.multinomial(count, replacement=True, generator=generator)
    noise = torch.randn(count, generator=generator, dtype=torch.float64)
    return means[z] + stds[z] * noise


def m_step(x: Tensor, posterior: Tensor) -> Mixture:
    """The mixture with the highest bound, given q(z|x) (n,K): weighted shares, means and standard
    deviations."""
    shares = posterior / posterior.sum(0)
    means = shares.T @ x
    variances = (shares * (x[:, None] - means).square()).sum(0)
    return Mixture(posterior.mean(0), means, variances.sqrt())


def bound(mixture: Mixture, x: Tensor, log_q: Tensor) -> Tensor:
    """The evidence lower bound of each number, (n,), by a sum over z."""
    return (log_q.exp() * (mixture.log_joint(x) - log_q)).sum(1)


def gap(mixture: Mixture, x: Tensor, log_q: Tensor) -> Tensor:
    """KL(q(z|x) || p(z|x)) of each number, (n,)."""
    return (log_q.exp() * (log_q - mixture.log_posterior(x))).sum(1)


def em(x: Tensor, mixture: Mixture, iterations: int) -> tuple[Mixture, list[float]]:
    """The mixture after some iterations, and the mean log-likelihood before each and at the end."""
    history = [float(mixture.log_likelihood(x).mean())]
    for _ in range(iterations):
        mixture = m_step(x, mixture.log_posterior(x).exp())
        history.append(float(mixture.log_likelihood(x).mean()))
    return mixture, history


def start(x: Tensor, components: int) -> Mixture:
    """Equal weights, means at quantiles of the data, and its standard deviation."""
    at = torch.linspace(0, 1, components + 2, dtype=x.dtype)[1:-1]
    even = torch.full_like(at, 1 / components)
    return Mixture(even, x.quantile(at), x.std().expand(components))


def network(hidden: int, components: int, seed: int = 0) -> nn.Module:
    """Logits of q(z|x) from one hidden layer."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, components)).double()


def log_amortised(encoder: nn.Module, x: Tensor) -> Tensor:
    """log q(z|x) of the network, (n,K)."""
    logits: Tensor = encoder(x[:, None])
    return logits.log_softmax(1)


def train(encoder: nn.Module, mixture: Mixture, x: Tensor, steps: int) -> list[float]:
    """Raises the mean bound of the data by the encoder alone. Returns it before each step."""
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.05)
    history = []
    for _ in range(steps):
        elbo = bound(mixture, x, log_amortised(encoder, x)).mean()
        optimizer.zero_grad()
        (-elbo).backward()
        optimizer.step()
        history.append(float(elbo.detach()))
    return history


def draw_model(axes: Axes, x: Tensor, grid: Tensor, mixture: Mixture) -> None:
    """The data, and the density that EM fitted."""
    axes.hist(x, bins=50, density=True, color="0.85", label="data")
    axes.plot(grid, mixture.log_likelihood(grid).exp(), "k", label="p(x), fitted by EM")
    for k, density in enumerate(mixture.log_joint(grid).exp().T):
        axes.plot(grid, density, f"C{k}", label=f"p(x, z = {k + 1})")
    axes.set(title="data and generative model", xlabel="x", ylabel="density")


def draw_posteriors(axes: Axes, grid: Tensor, log_posterior: Tensor, style: str) -> None:
    """A line per component."""
    for k, probability in enumerate(log_posterior.exp().T):
        axes.plot(grid, probability, f"C{k}{style}")
    axes.set(title="posteriors: exact (solid) and amortised", xlabel="x", ylabel="probability of z")


def main(out: Path, iterations: int = 200, steps: int = 600) -> None:
    """Four panels: the model, likelihood and bounds, the posteriors, and the gap between them."""
    x = sample(400)
    components = len(TRUTH)
    mixture, likelihoods = em(x, start(x, components), iterations)
    grid = torch.linspace(-5, 6, 400, dtype=x.dtype)
    plot = canvas(11, 7.5)
    ((model, curves), (posteriors, gaps)) = plot.subplots(2, 2)
    draw_model(model, x, grid, mixture)
    curves.plot(
        range(1, iterations + 2), likelihoods, "k", label="log p(x) before each EM iteration"
    )
    draw_posteriors(posteriors, grid, mixture.log_posterior(grid), "-")
    for style, hidden in ((":", 2), ("--", 16)):
        name = f"network with {hidden} hidden units"
        encoder = network(hidden, components)
        bounds = train(encoder, mixture, x, steps)
        curves.plot(range(1, steps + 1), bounds, style, label=f"bound per step, {name}")
        log_q = log_amortised(encoder, grid).detach()
        draw_posteriors(posteriors, grid, log_q, style)
        gaps.plot(grid, gap(mixture, grid, log_q), f"C3{style}", label=name)
    curves.set(title="log-likelihood and evidence lower bound", ylabel="nats per number")
    curves.set(xscale="log", ylim=(-4, -1.9), xlabel="EM iteration, or step of the network")
    gaps.set(
        title="gap: KL(q(z|x) || p(z|x))", xlabel="x", ylabel="nats", yscale="log", ylim=(1e-5, 10)
    )
    for axes in (model, curves, gaps):
        axes.legend(fontsize=8)
    plot.savefig(out)


if __name__ == "__main__":
    main(out_option(__doc__ or ""))
