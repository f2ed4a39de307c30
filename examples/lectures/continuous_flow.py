"""A continuous flow of numbers, its density by a second equation, and the adjoint gradient.

    python -m examples.lectures.continuous_flow --out continuous-flow.png

dz/dt = f(z) from t = 0 to 1 turns noise into data. Along a path, d log p(z(t))/dt = -df/dz (Chen et
al. 2018, https://arxiv.org/abs/1806.07366, eq. 8). The adjoint a = dL/dz(t) follows da/dt = -a
df/dz backwards in time (eq. 4), so that no path is kept in memory. The packages do not use this.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from examples.lectures.plots import canvas, out_option
from stage2_prior.flows.base import standard_normal_log_prob


def velocity(z: Tensor, theta: Tensor) -> Tensor:
    """f(z) (N,): pushes numbers away from 0, and towards theta and -theta."""
    return 2 * torch.tanh(2 * z) * (1 - z.abs() / theta)


def solve(field: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> list[Tensor]:
    """States at t = 0, 1/steps, ..., 1 by the classical Runge-Kutta method."""
    h = 1 / steps
    states = [start]
    for _ in range(steps):
        y = states[-1]
        k1 = field(y)
        k2 = field(y + h / 2 * k1)
        k3 = field(y + h / 2 * k2)
        states.append(y + h / 6 * (k1 + 2 * k2 + 2 * k3 + field(y + h * k3)))
    return states


def path(noise: Tensor, theta: Tensor, steps: int) -> list[Tensor]:
    """Numbers (N,) at each step, from noise to data."""
    return solve(lambda z: velocity(z, theta), noise, steps)


def log_density_along(noise: Tensor, theta: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Numbers (N,) at t = 1, and log p of each, from standard normal noise (N,)."""

    def field(state: Tensor) -> Tensor:
        z = state[0].detach().requires_grad_()
        f = velocity(z, theta)
        return torch.stack([f.detach(), -torch.autograd.grad(f.sum(), z)[0]])

    start = torch.stack([noise, standard_normal_log_prob(noise[:, None])])
    z, log_p = solve(field, start, steps)[-1]
    return z, log_p


def adjoint_gradient(z: Tensor, theta: Tensor, steps: int) -> Tensor:
    """dL/dtheta () of L = mean z(1)^2 / 2 from z(1) (N,): backwards in time, z, the adjoint, and
    the gradient's integral are one state."""

    def backwards(state: Tensor) -> Tensor:
        at = state[0].detach().requires_grad_()
        own = theta.expand_as(at).clone().requires_grad_()
        f = velocity(at, own)
        by_z, by_theta = torch.autograd.grad((state[1] * f).sum(), (at, own))
        return torch.stack([-f.detach(), by_z, by_theta])

    start = torch.stack([z, z / len(z), torch.zeros_like(z)])
    return solve(backwards, start, steps)[-1][2].sum()


def direct_gradient(noise: Tensor, theta: Tensor, steps: int) -> Tensor:
    """The same gradient by autograd through all steps of the solver."""
    theta = theta.clone().requires_grad_()
    return torch.autograd.grad(path(noise, theta, steps)[-1].square().mean() / 2, theta)[0]


def main(out: Path, samples: int = 20_000) -> None:
    """Paths, the density beside a histogram, and the adjoint gradient against the steps."""
    theta = torch.tensor(2.0, dtype=torch.float64)
    noise = torch.randn(samples, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    few = noise[:300]
    plot = canvas(12, 3.6)
    paths, density, gradients = plot.subplots(1, 3)
    paths.plot(torch.linspace(0, 1, 41), torch.stack(path(noise[:40], theta, 40)), "C0")
    paths.set(title="paths from noise to data", xlabel="t", ylabel="z")
    even = torch.linspace(-4, 4, 2001, dtype=torch.float64)
    z, log_p = log_density_along(even, theta, 40)
    density.hist(path(noise, theta, 40)[-1], bins=100, density=True, color="0.8", label="samples")
    density.plot(z, log_p.exp(), label="p(z), by its own equation")
    density.set(title="density at t = 1", xlabel="z")
    density.legend(fontsize=8, loc="upper center")
    counts = (2, 4, 8, 16, 32)
    adjoints = [adjoint_gradient(path(few, theta, n)[-1], theta, n) for n in counts]
    exact = direct_gradient(few, theta, 64)
    gradients.plot(counts, (torch.stack(adjoints) / exact - 1).abs(), "o-")
    gradients.set(title="relative error of the adjoint gradient", xlabel="steps of the solver")
    gradients.set_xscale("log", base=2)
    gradients.set_yscale("log")
    plot.savefig(out)


if __name__ == "__main__":
    main(out_option(__doc__ or ""))
