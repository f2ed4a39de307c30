"""Gaussian latents: the posterior of the variational autoencoder (VAE), in the place of codes.
Knows features; nothing of images.

Legend: B batch, D features of a position, h w grid, n latent dimensions of an image. Latents of a
grid are flattened feature by feature, each row by row: n = D h w.

VAE, Kingma & Welling 2013 (https://arxiv.org/abs/1312.6114); free bits, Kingma et al. 2016
(https://arxiv.org/abs/1606.04934), appendix C.8; active units, Burda et al. 2015
(https://arxiv.org/abs/1509.00519), section 5.2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stage1_tokenizer.config import Level
from stage1_tokenizer.options import GaussianOptions
from stage1_tokenizer.posterior import GaussianLatents, GaussianPosterior
from stage1_tokenizer.quantizers.base import Quantized, Quantizer, mean_over_processes

LOG_STD_BOUND = 8.0
"""Standard deviations stay between exp(-8) and exp(8), so that no exponential overflows."""
ACTIVE_ABOVE = 0.01
"""Variance over images of the posterior's mean, above which a dimension is active."""
_NO_CODES = (
    "this tokenizer has Gaussian latents and no codes; train one with "
    "tokenizer.model.quantizer=vq, or use its latents (in Python: posterior and decode_latents)"
)


def active_dimensions(means: Tensor) -> Tensor:
    """Fraction () of the latent dimensions whose posterior mean varies over at least two images, of
    means (B,n): a variance above 0.01. A collapsed dimension has the same posterior for all."""
    return (means.var(dim=0) > ACTIVE_ABOVE).float().mean()


class GaussianQuantizer(Quantizer):
    """Quantizes nothing: latents are sampled from a Gaussian while training, and are its mean
    otherwise.

    Args:
        code_dim: features of a position, D.
        grid: height and width of the grid, which `latents: vector` is made for.
    """

    relaxed = True

    def __init__(self, code_dim: int, grid: tuple[int, int], options: GaussianOptions) -> None:
        self.is_vector = options.latents == "vector"
        super().__init__(code_dim if self.is_vector else 2 * code_dim, code_dim)
        self.options = options
        self.grid = grid
        size = code_dim * math.prod(grid)
        self.latent_dim = options.vector_features if self.is_vector else size
        if self.is_vector:
            self.to_vector = nn.Linear(size, 2 * self.latent_dim)
            self.from_vector = nn.Linear(self.latent_dim, size)

    def forward(self, features: Tensor, temperature: float | None = None) -> Quantized:
        """Features (B,input_dim,h,w) -> a sample of the posterior where there is a `temperature`
        (its value is not used), else its mean."""
        posterior = self.posterior(features)
        with torch.autocast(features.device.type, enabled=False):
            z = posterior.mean if temperature is None else posterior.sample()
            by_dimension = posterior.kl_by_dimension()
            metrics = {"kl": by_dimension.detach().sum(dim=1).mean()}
            if len(z) > 1:
                metrics["active_dimensions"] = active_dimensions(posterior.mean.detach())
            kl = self.with_free_bits(by_dimension.mean(dim=0))
        return Quantized(
            self.unflatten(z, (features.shape[2], features.shape[3])),
            torch.zeros(len(z), 0, dtype=torch.long, device=z.device),
            z.new_zeros(()),
            kl=kl,
            gaussian=GaussianLatents(posterior, z),
            metrics=metrics,
        )

    def posterior(self, features: Tensor) -> GaussianPosterior:
        """The posterior of features (B,input_dim,h,w), in fp32.

        Raises:
            ValueError: the latents are one vector, and the features have another grid than its own.
        """
        if self.is_vector:
            self._check_grid((features.shape[2], features.shape[3]))
            features = self.to_vector(features.flatten(1))
        mean, log_std = features.float().chunk(2, dim=1)
        return GaussianPosterior(
            mean.flatten(1), LOG_STD_BOUND * (log_std.flatten(1) / LOG_STD_BOUND).tanh()
        )

    def with_free_bits(self, kl: Tensor) -> Tensor:
        """The KL () to minimise, by its mean over the batch (n,) in each dimension: none is pushed
        below `free_bits`. While training, the mean is that over all processes."""
        if self.training and self.options.free_bits:
            kl = mean_over_processes(kl).clamp(min=self.options.free_bits)
        return kl.sum()

    def unflatten(self, z: Tensor, grid: tuple[int, int]) -> Tensor:
        """Latents (B,n) -> what the decoder sees of them (B,D,h,w), h w being `grid`.

        Raises:
            ValueError: the latents are one vector, and `grid` is not its own.
        """
        if self.is_vector:
            self._check_grid(grid)
            z = self.from_vector(z.to(self.from_vector.weight.dtype))
        return z.unflatten(1, (self.output_dim, *grid))

    def _check_grid(self, grid: tuple[int, int]) -> None:
        if grid != self.grid:
            raise ValueError(
                f"the features have a grid of {grid[0]}x{grid[1]} and the one latent vector of "
                f"this tokenizer is for {self.grid[0]}x{self.grid[1]}; give images of the size "
                "that it was trained on, or train with tokenizer.model.gaussian.latents=grid"
            )

    def encode(self, features: Tensor) -> Tensor:
        """Raises ValueError: there are no codes."""
        raise ValueError(_NO_CODES)

    def layout(self, grid: tuple[int, int]) -> tuple[Level, ...]:
        """(), since there are no codes."""
        return ()

    def embed(self, codes: Tensor, grid: tuple[int, int]) -> Tensor:
        """Raises ValueError: there are no codes."""
        raise ValueError(_NO_CODES)

    def vectors(self) -> Tensor:
        """Raises ValueError: there are no codes."""
        raise ValueError(_NO_CODES)

    def usage(self) -> list[Tensor]:
        """[], since there are no codes."""
        return []
