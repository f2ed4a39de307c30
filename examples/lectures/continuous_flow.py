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

Field = Callable[[Tensor], Tensor]


def velocity(z: Tensor, theta: Tensor) -> Tensor:
    """f(z) (N,): pushes numbers away from 0, and towards theta and -theta."""
    return 4 * torch.tanh(3 * z) * (1 - z.abs() / theta)


def slope(z: Tensor, theta: Tensor) -> Tensor:
    """df/dz (N,), by autograd."""
    z = z.detach().requires_grad_()
    return torch.autograd.grad(velocity(z, theta.detach()).sum(), z)[0]


def solve(field: Field, start: Tensor, steps: int) -> list[Tensor]:
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


def log_density_along(noise: Tensor, theta: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Numbers (N,) at t = 1, and log p of each, from standard normal noise (N,)."""

    def field(state: Tensor) -> Tensor:
        z = state[0]
        return torch.stack([velocity(z, theta), -slope(z, theta)])

    start = torch.stack([noise, standard_normal_log_prob(noise[:, None])])
    z, log_p = solve(field, start, steps)[-1]
    return z, log_p


def adjoint_gradient(z: Tensor, theta: Tensor, steps: int) -> Tensor:
    """dL/dtheta () of L = mean z(1)^2 / 2 from z(1) (N,): backwards in time, z, the adjoint, and
    the gradient's integral are one state."""

    def backwards(state: Tensor) -> Tensor:
        at = state[0].detach().requires_grad_()
        own = theta.detach().expand_as(at).clone().requires_grad_()
        f = velocity(at, own)
        by_z, by_theta = torch.autograd.grad((state[1] * f).sum(), (at, own))
        return torch.stack([-f.detach(), by_z, by_theta])

    start = torch.stack([z, z / len(z), torch.zeros_like(z)])
    return solve(backwards, start, steps)[-1][2].sum()


def direct_gradient(noise: Tensor, theta: Tensor, steps: int) -> Tensor:
    """The same gradient by autograd through all steps of the solver."""
    theta = theta.detach().clone().requires_grad_()
    z = solve(lambda y: velocity(y, theta), noise, steps)[-1]
    return torch.autograd.grad(z.square().mean() / 2, theta)[0]


def main(out: Path, samples: int = 20_000) -> None:
    """Paths, the density beside a histogram, and the two gradients against the steps."""
    theta = torch.tensor(2.0, dtype=torch.float64)
    noise = torch.randn(samples, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plot = canvas(12, 3.6)
    paths, density, gradients = plot.subplots(1, 3)
    times = torch.linspace(0, 1, 41)
    paths.plot(times, torch.stack(solve(lambda y: velocity(y, theta), noise[:40], 40)), "C0")
    paths.set(title="paths from noise to data", xlabel="t", ylabel="z")
    even = torch.linspace(-4, 4, 801, dtype=torch.float64)
    z, log_p = log_density_along(even, theta, 40)
    data = solve(lambda y: velocity(y, theta), noise, 40)[-1]
    density.hist(data, bins=100, density=True, color="0.8", label="samples")
    density.plot(z, log_p.exp(), "C0", label="p(z(1)) by the equation of its logarithm")
    density.set(title="density at t = 1", xlabel="z")
    density.legend(fontsize=8)
    counts = (2, 4, 8, 16, 32, 64)
    exact = direct_gradient(noise[:500], theta, 512)
    for name, style, of in (("adjoint", "o-", True), ("through the solver", "x--", False)):
        errors = []
        for steps in counts:
            end = solve(lambda y: velocity(y, theta), noise[:500], steps)[-1]
            found = (
                adjoint_gradient(end, theta, steps)
                if of
                else direct_gradient(noise[:500], theta, steps)
            )
            errors.append(float((found / exact - 1).abs()))
        gradients.plot(counts, errors, style, label=name)
    gradients.set(title="relative error of dL/dtheta", xlabel="steps", xscale="log", yscale="log")
    gradients.legend(fontsize=8)
    plot.savefig(out)


if __name__ == "__main__":
    main(out_option(__doc__ or ""))
