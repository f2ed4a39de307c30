"""Two moons by a RealNVP: density, samples, and the noise that the flow makes of the data.

    python -m examples.lectures.flows --out flows.png

Maximum likelihood by the change of variables, log p(z) = log N(f(z); 0, I) + log |det df/dz|. The
flow is that of `stage2_prior/flows/coupling.py`.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from examples.lectures.plots import canvas, out_option
from stage2_prior.flows.build import build_latent_prior
from stage2_prior.flows.config import LatentPriorConfig
from stage2_prior.flows.flow import Flow

EDGE = 3.0
SIDE = 120


def two_moons(count: int, generator: torch.Generator) -> Tensor:
    """Points (count,2) near two half circles that reach into each other."""
    angle = math.pi * torch.rand(count, generator=generator)
    moon = torch.randint(2, (count,), generator=generator)
    sign = 1 - 2 * moon
    points = torch.stack([moon + sign * angle.cos(), 0.5 * moon + sign * angle.sin()], dim=1)
    centred = points - torch.tensor([0.5, 0.25])
    return 1.3 * (centred + 0.1 * torch.randn(count, 2, generator=generator))


def fit(steps: int, seed: int = 0) -> tuple[Flow, list[float]]:
    """A RealNVP after some steps of maximum likelihood, and the nats per point of each step."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    config = LatentPriorConfig(kind="realnvp", transforms=8, width=48)
    flow = build_latent_prior(config, 2)
    optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3)
    history = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, 2 * (1 - step / steps))
        nats = -flow.log_prob(two_moons(256, generator)).mean()
        optimizer.zero_grad()
        nats.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimizer.step()
        history.append(float(nats.detach()))
    assert isinstance(flow, Flow)
    return flow, history


def main(out: Path, steps: int = 600) -> None:
    """Data, density, samples, and the noise of the data."""
    flow, history = fit(steps)
    generator = torch.Generator().manual_seed(1)
    data = two_moons(1500, generator)
    axis = torch.linspace(-EDGE, EDGE, SIDE)
    points = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        density = flow.log_prob(points).exp().reshape(SIDE, SIDE).T.numpy()
        noise, _ = flow.to_noise(data)
    plot = canvas(13, 3.6)
    given, learned, drawn, mapped = plot.subplots(1, 4)
    given.scatter(*data.T, s=3)
    given.set_title("data z")
    learned.imshow(density, origin="lower", extent=(-EDGE, EDGE, -EDGE, EDGE), cmap="magma")
    learned.set_title(f"density p(z), {sum(history[-50:]) / len(history[-50:]):.2f} nats per point")
    drawn.scatter(*flow.sample(1500, generator).T, s=3)
    drawn.set_title("samples of p(z)")
    mapped.scatter(*noise.T, s=3)
    mapped.set_title("noise f(z) of the data")
    for axes in (given, learned, drawn, mapped):
        axes.set(xlim=(-EDGE, EDGE), ylim=(-EDGE, EDGE), aspect="equal")
    plot.savefig(out)


if __name__ == "__main__":
    main(out_option(__doc__ or ""))
