"""A density at the values of 8-bit images has no upper limit; the mass of a step has.

    python -m examples.lectures.dequantization --out dequantization.png

The decoder's output hits the value 128 exactly. As the standard deviation falls, the density there
grows beyond all limits: it claims fewer bits than 0. The exact probability is the mass on the
value's step. Uniform dequantization, the mean of -log density over the step, is an upper bound of
its bits (Theis et al. 2016). By Jensen's inequality it is never below the exact ones.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from examples.lectures.plots import canvas, out_option
from stage1_tokenizer.likelihoods.gaussian import Gaussian
from stage1_tokenizer.options import STEP
from stage1_tokenizer.pixels import dequantized, values_to_model_range

if TYPE_CHECKING:
    from matplotlib.axes import Axes

VALUES = torch.full((1, 1, 1, 1), 128)
PIXELS = values_to_model_range(VALUES, torch.float64)
"""The value in the model's range; also the decoder's output."""


def bits(nats: Tensor) -> float:
    """-log density in the model's range -> bits of a step, whose width is 2/255."""
    return float(nats.mean() - math.log(STEP)) / math.log(2)


def costs(std: float, samples: int, generator: torch.Generator) -> tuple[float, float, float]:
    """Bits of one pixel that the density at the value claims, that the exact probability takes, and
    that dequantization takes on average. The standard deviation is in steps."""
    likelihood = Gaussian(std * STEP)
    spread = dequantized(PIXELS.expand(samples, -1, -1, -1), generator)
    at_value = bits(likelihood.nll_map(PIXELS, PIXELS))
    exact = float(likelihood.exact_nll(VALUES, PIXELS)) / math.log(2)
    return at_value, exact, bits(likelihood.nll_map(spread, PIXELS))


def draw_steps(axes: Axes, std: float) -> None:
    """The density over five steps, and the mass of each."""
    values = torch.arange(126, 131).reshape(5, 1, 1, 1)
    likelihood = Gaussian(std * STEP)
    masses = likelihood.log_prob(values, PIXELS).exp().flatten().tolist()
    x = torch.linspace(125.5, 130.5, 600, dtype=torch.float64)
    pixels = (x / 127.5 - 1).reshape(-1, 1, 1, 1)
    density = (-likelihood.nll_map(pixels, PIXELS)).exp().flatten() * STEP
    axes.bar(values.flatten().tolist(), masses, width=1, color="0.8", edgecolor="0.5", label="mass")
    axes.plot(x, density, "C3", label="density")
    axes.set(title=f"standard deviation of {std} steps", xlabel="8-bit value", ylabel="per step")
    axes.legend(fontsize=8)


def main(out: Path, samples: int = 4000) -> None:
    """Density and masses for one standard deviation, and the bits against it."""
    stds = torch.logspace(1, -1.3, 60).tolist()
    generator = torch.Generator().manual_seed(0)
    at_value, exact, bound = zip(*(costs(std, samples, generator) for std in stds), strict=True)
    plot = canvas(11, 4)
    steps, curves = plot.subplots(1, 2)
    draw_steps(steps, 0.3)
    curves.plot(stds, at_value, "C3", label="density at the value: no bound")
    curves.plot(stds, exact, "k", label="exact: mass of the step")
    curves.plot(stds, bound, "C0", label="uniform dequantization: an upper bound")
    curves.axhline(0, color="0.7", linewidth=1)
    curves.set(title="bits of a pixel that is predicted exactly", ylabel="bits", ylim=(-3.5, 8))
    curves.set(xscale="log", xlabel="standard deviation, in steps")
    curves.invert_xaxis()
    curves.legend(fontsize=8)
    plot.savefig(out)


if __name__ == "__main__":
    main(out_option(__doc__ or ""))
