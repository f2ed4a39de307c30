"""A VAE with two latent dimensions: the images that a grid of latents decodes to.

    python -m examples.lectures.vae --out vae.png

The images are discs at any place, so two numbers describe them. Network, posterior and loss are
those of stage 1 with `quantizer: gaussian`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from examples.lectures.plots import canvas, out_option
from examples.lectures.training import train_tokenizer
from pipeline.runtime.image_grid import make_grid
from stage1_tokenizer import GaussianOptions, ImageTokenizer, ObjectiveConfig, TokenizerConfig
from stage1_tokenizer.pixels import to_model_range, to_uint8

SIZE = 16
SIDE = 9
MODEL = TokenizerConfig(
    image_size=SIZE,
    downsample_factor=4,
    width=32,
    decoder_depth=1,
    quantizer="gaussian",
    code_dim=8,
    gaussian=GaussianOptions(latents="vector", vector_features=2),
    likelihood_scale=0.3,
)


def discs(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images uint8 (count,16,16,3) of a disc on white, and its centre (count,2) in [-1,1]; blue
    grows to the right, green downwards."""
    centres = 2 * torch.rand(count, 2, generator=generator) - 1
    axis = torch.arange(SIZE) - (SIZE - 1) / 2
    rows = axis[:, None] - 5 * centres[:, 0, None, None]
    columns = axis[None, :] - 5 * centres[:, 1, None, None]
    cover = (3.5 - (rows.square() + columns.square()).sqrt()).clamp(0, 1)[..., None]
    red = torch.full((count,), 0.2)
    colours = torch.stack([red, (centres[:, 0] + 1) / 3, (centres[:, 1] + 1) / 2], dim=1)
    images = 1 - cover + cover * colours[:, None, None]
    return (255 * images).round().to(torch.uint8), centres


def train(steps: int) -> ImageTokenizer:
    """A VAE after some steps of maximising the evidence lower bound."""
    config = ObjectiveConfig(kl_ramp_steps=steps // 4)
    return train_tokenizer(MODEL, config, lambda generator: discs(64, generator)[0], steps)


def main(out: Path, steps: int = 500) -> None:
    """The decoded grid, and the posterior means of further images in their own colours."""
    vae = train(steps)
    quantiles = torch.special.ndtri(torch.linspace(0.03, 0.97, SIDE))
    latents = torch.cartesian_prod(-quantiles, quantiles).flip(1)
    with torch.no_grad():
        decoded = to_uint8(vae.decode_latents(latents))
        images, centres = discs(800, torch.Generator().manual_seed(1))
        means = vae.posterior(to_model_range(images)).mean
    plot = canvas(10, 5)
    grid, posterior = plot.subplots(1, 2)
    grid.imshow(make_grid(list(decoded.numpy()), columns=SIDE))
    grid.set_title("decoded latents, at quantiles of N(0, 1)")
    grid.set(xticks=[], yticks=[], xlabel="first latent dimension", ylabel="second")
    colours = torch.stack([torch.full((800,), 0.2), *((centres + 1) / 2).T], dim=1)
    posterior.scatter(*means.T, s=8, c=colours.tolist())
    posterior.set(title="posterior means, coloured by place", xlim=(-3, 3), ylim=(-3, 3))
    posterior.set(aspect="equal", xlabel="first latent dimension", ylabel="second")
    plot.savefig(out)


if __name__ == "__main__":
    main(out_option(__doc__ or ""))
