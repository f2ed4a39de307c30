"""Gaussian likelihoods (L2). The standard deviation is fixed, the best of each image, or learned
per pixel."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from stage1_tokenizer.likelihoods.base import Likelihood
from stage1_tokenizer.likelihoods.masses import normal_log_mass
from stage1_tokenizer.options import STEP
from stage1_tokenizer.pixels import to_values

DEVIATIONS = 256
"""Number of standard deviations that `calibrated_l2` chooses from."""
LEAST = STEP / 8
"""The least standard deviation. With it a pixel that is exact costs 0.0001 bits."""
MOST = 2.0
"""The largest one of `calibrated_l2`: no pixel errs by more, on average."""


class Gaussian(Likelihood):
    """Pixels are the decoder's output plus normal noise of a fixed standard deviation, in units of
    the model's range."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def nll_map(self, pixels: Tensor, parameters: Tensor) -> Tensor:
        squared = (pixels - parameters.float()).square() / (2 * self.scale**2)
        return squared + math.log(self.scale * math.sqrt(2 * math.pi))

    def _log_mass(self, values: Tensor, parameters: Tensor) -> Tensor:
        return normal_log_mass(values, parameters, self.scale)


class CalibratedGaussian(Likelihood):
    """The standard deviation of each image that fits it best (sigma-VAE, Rybkin et al. 2021,
    https://arxiv.org/abs/2006.13202), so that no scale need be chosen: half the log of an image's
    mean squared error, in place of the error.

    Images then count alike in decibels, where with one deviation for all the hardest ones
    outweigh the rest. The variance is that of pixels spread over their 8-bit steps (uniform noise
    adds a twelfth of a step's square), and so has a least value.

    The loss has no cost of the deviation itself. The probability has: a code in two parts, first
    one of 256 deviations on a log scale, 8 bits per image, then the values given it.
    """

    side_choices = DEVIATIONS

    def nll_map(self, pixels: Tensor, parameters: Tensor) -> Tensor:
        squared = (pixels - parameters.float()).square() + STEP**2 / 12
        # A constant to the gradient: at its best the derivative by it is zero.
        variance = squared.detach().mean(dim=(1, 2, 3), keepdim=True)
        return squared / (2 * variance) + 0.5 * (2 * math.pi * variance).log()

    def side_information(self, values: Tensor, parameters: Tensor) -> Tensor:
        """The index of the best deviation, if the probability has a single maximum over them."""

        def log_prob(index: Tensor) -> Tensor:
            return self.given(index).log_prob(values, parameters).flatten(1).sum(1)

        low = torch.zeros(len(values), dtype=torch.long, device=values.device)
        high = torch.full_like(low, DEVIATIONS - 1)
        for _ in range(int(math.log2(DEVIATIONS))):
            middle = (low + high) // 2
            rises = log_prob((middle + 1).clamp(max=DEVIATIONS - 1)) > log_prob(middle)
            low = torch.where(rises, middle + 1, low)
            high = torch.where(rises, high, middle)
        return low

    def given(self, side: Tensor) -> Likelihood:
        fraction = side.double() / (DEVIATIONS - 1)
        return _KnownDeviations(LEAST * (MOST / LEAST) ** fraction)

    def _log_mass(self, values: Tensor, parameters: Tensor) -> Tensor:
        raise ValueError(
            "calibrated_l2 has probabilities once an image's standard deviation is known; call "
            "likelihood.given(likelihood.side_information(values, parameters)) first, or exact_nll"
        )


class _KnownDeviations(Likelihood):
    """`calibrated_l2` of images whose standard deviations (B,) are known."""

    def __init__(self, deviations: Tensor) -> None:
        self.deviations = deviations.reshape(-1, 1, 1, 1)

    def _log_mass(self, values: Tensor, parameters: Tensor) -> Tensor:
        return normal_log_mass(values, parameters, self.deviations)


class LearnedGaussian(Likelihood):
    """A standard deviation per pixel and channel, which the decoder gives: a second parameter whose
    softplus is added to the least deviation.

    Trained on the exact probability. On dequantized pixels, 600 steps of a small tokenizer of emoji
    ended at 3.64 bits per dimension instead of 3.17: the density gains nothing from a deviation
    below that of the noise."""

    parameters_per_channel = 2

    def nll_map(self, pixels: Tensor, parameters: Tensor) -> Tensor:
        """Of pixels at the values of 8-bit images."""
        # The gradient of `log_ndtr` is wrong in float32 from some 1,000 deviations on.
        return -self._log_mass(to_values(pixels), parameters.double()).float()

    def image(self, parameters: Tensor) -> Tensor:
        return parameters.float().chunk(2, dim=1)[0]

    def _log_mass(self, values: Tensor, parameters: Tensor) -> Tensor:
        location, raw_scale = parameters.chunk(2, dim=1)
        return normal_log_mass(values, location, LEAST + F.softplus(raw_scale))
