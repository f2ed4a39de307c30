"""ELBO surgery on a VAE with two latents: what a learned prior changes, and what it leaves.

    python -m examples.lectures.surgery --out surgery.png

The bound's KL is the mutual information of image and latents, plus the KL of the aggregated
posterior to the prior (Hoffman & Johnson 2016; `pipeline/evaluation/elbo_surgery.py`). A VAE is
trained with N(0, I). Then a RealNVP is fitted to its latents, the VAE being left as it is.

Legend: B images.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from examples.lectures.plots import canvas, out_option
from pipeline.evaluation.elbo_surgery import ElboParts, fixed_prior, surgery
from stage1_tokenizer import (
    GaussianOptions,
    ImageTokenizer,
    ObjectiveConfig,
    TokenizerConfig,
    TokenizerObjective,
    to_model_range,
)
from stage2_prior import AggregatedPosterior, LatentPriorConfig, LatentPriorModel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIDE = 8
FLIPPED = 0.03
"""Probability that a pixel is of the other colour."""
BATCH = 128


def bars(count: int, generator: torch.Generator) -> Tensor:
    """White bars on black, two pixels wide, across or upright: uint8 (count,8,8,1). A few pixels
    are flipped."""
    first = torch.randint(SIDE - 1, (count, 1, 1), generator=generator)
    places = torch.arange(SIDE)[:, None]
    across = ((places == first) | (places == first + 1)).expand(count, SIDE, SIDE)
    upright = torch.rand(count, 1, 1, generator=generator) < 0.5
    image = torch.where(upright, across.mT, across)
    flipped = torch.rand(count, SIDE, SIDE, generator=generator) < FLIPPED
    return ((image ^ flipped).to(torch.uint8) * 255).unsqueeze(-1)


def train_vae(steps: int) -> ImageTokenizer:
    """A VAE with two latents and the prior N(0, I)."""
    torch.manual_seed(0)
    config = TokenizerConfig(
        image_size=SIDE,
        channels=1,
        downsample_factor=4,
        width=32,
        decoder_depth=1,
        code_dim=8,
        quantizer="gaussian",
        gaussian=GaussianOptions(latents="vector", vector_features=2),
        likelihood="bernoulli",
    )
    vae = ImageTokenizer(config)
    objective = TokenizerObjective(vae, ObjectiveConfig(kl_ramp_steps=steps // 2))
    optimizer = torch.optim.Adam(vae.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        (loss,) = objective.losses(bars(BATCH, generator), step)
        optimizer.zero_grad()
        loss.value.backward()
        optimizer.step()
    return vae.eval()


def train_prior(vae: ImageTokenizer, steps: int) -> LatentPriorModel:
    """A RealNVP of the VAE's latents: maximum likelihood of samples from the posteriors."""
    torch.manual_seed(0)
    images = bars(4000, torch.Generator().manual_seed(2))
    posterior = vae.posterior(to_model_range(images))
    prior = LatentPriorModel(LatentPriorConfig(kind="realnvp", width=64), 2)
    optimizer = torch.optim.Adam(prior.parameters(), lr=5e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        chosen = torch.randint(len(images), (2 * BATCH,))
        loss = -prior.log_prob(posterior.sample()[chosen]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return prior.eval()


def parts_by_prior(
    vae: ImageTokenizer, prior: LatentPriorModel, images: Tensor
) -> dict[str, ElboParts]:
    """The ELBO's parts under N(0, I), the learned prior, and the aggregated posterior of the very
    images, which is the best prior there is for them."""
    posterior = vae.posterior(to_model_range(images))
    aggregated = AggregatedPosterior.of(posterior.mean.double(), posterior.log_std.double())
    priors = {"N(0, I)": fixed_prior(vae), "RealNVP": prior.log_prob, "q_agg": aggregated.log_prob}
    return surgery(vae, images, priors)


def draw_density(axes: Axes, log_density: Tensor, title: str) -> None:
    """Densities on a grid of latents in [-3.5, 3.5], rows from below. The highest ones are shown
    alike, or a narrow peak would leave the rest white."""
    side = round(len(log_density) ** 0.5)
    density = log_density.exp().reshape(side, side).numpy()
    extent = (-3.5, 3.5, -3.5, 3.5)
    axes.imshow(density, origin="lower", extent=extent, cmap="Blues", vmin=0, vmax=0.25)
    axes.set(title=title, xlim=extent[:2], ylim=extent[2:], xlabel="z1", ylabel="z2")


def draw_parts(axes: Axes, parts: dict[str, ElboParts]) -> None:
    """A group of bars per part, a bar per prior."""
    names = ("-reconstruction", "mutual\ninformation", "marginal KL", "-ELBO")
    for number, (prior, found) in enumerate(parts.items()):
        heights = (-found.reconstruction, found.mutual_information, found.marginal_kl, -found.elbo)
        places = [place + 0.27 * (number - 1) for place in range(len(names))]
        drawn = axes.bar(places, heights, 0.25, label=f"prior {prior}")
        axes.bar_label(drawn, fmt="%.2f", fontsize=7)
    axes.set_xticks(range(len(names)), names)
    axes.set(title="parts of the ELBO on held-out images", ylabel="nats per image")
    axes.legend(fontsize=8, loc="upper center")


@torch.no_grad()
def draw(out: Path, vae: ImageTokenizer, prior: LatentPriorModel, images: Tensor) -> None:
    """Three panels: q_agg on N(0, I), q_agg on the learned prior, and the ELBO's parts."""
    line = torch.linspace(-3.5, 3.5, 200)
    grid = torch.cartesian_prod(line, line).flip(1)
    plot = canvas(13, 4.2)
    fixed, learned, bars_of_parts = plot.subplots(1, 3, width_ratios=(1, 1, 1.4))
    samples = vae.posterior(to_model_range(images)).sample(torch.Generator().manual_seed(0))
    draw_density(fixed, fixed_prior(vae)(grid), "samples of q_agg on N(0, I)")
    draw_density(learned, prior.log_prob(grid), "samples of q_agg on the learned prior")
    for axes in (fixed, learned):
        axes.scatter(*samples.T, s=1.5, color="C1")
    draw_parts(bars_of_parts, parts_by_prior(vae, prior, images))
    plot.savefig(out)


def main(out: Path, steps: int = 2000, images: int = 1000) -> None:
    """Trains both, and draws the parts on images that neither saw."""
    vae = train_vae(steps)
    prior = train_prior(vae, steps)
    draw(out, vae, prior, bars(images, torch.Generator().manual_seed(3)))


if __name__ == "__main__":
    main(out_option(__doc__ or ""))
