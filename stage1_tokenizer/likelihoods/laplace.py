"""Laplace likelihoods: of a fixed scale (L1), and DALL-E's on the logit of the pixel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stage1_tokenizer.likelihoods.base import Likelihood
from stage1_tokenizer.likelihoods.masses import laplace_log_cdf, log_mass
from stage1_tokenizer.pixels import (
    LAPLACE_MARGIN,
    from_laplace_logits,
    step_edges,
    to_laplace_logits,
)


class Laplace(Likelihood):
    """L1: pixels are the decoder's output plus Laplace noise of a fixed scale."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def nll_map(self, pixels: Tensor, parameters: Tensor) -> Tensor:
        absolute = (pixels - parameters.float()).abs() / self.scale
        return absolute + math.log(2 * self.scale)

    def _log_mass(self, values: Tensor, parameters: Tensor) -> Tensor:
        low, high = (
            (edge - parameters) / self.scale for edge in step_edges(values, parameters.dtype)
        )
        return log_mass(laplace_log_cdf, values, low, high)


class LogitLaplace(Likelihood):
    """DALL-E's: a Laplace on the logit of the squeezed pixel, which has a bounded support.

    Location and scale are both learned. The density (2021, appendix A.3) is over the unit interval,
    of which squeezed pixels take up [eps, 1 - eps]; the change of variables to the model's range
    adds the log of its slope, (1 - 2 eps) / 2. There the support is (-1.25, 1.25): some mass lies
    beyond the pixels' [-1, 1]. Of 8-bit values, the first and the last take it.

    Unlike the paper's, the scale is the exponential of the decoder's output plus `least_scale`. The
    scale of flat backgrounds could otherwise fall to the resolution of 8 bits, and they would
    outweigh all other pixels by its inverse.
    """

    parameters_per_channel = 2
    learns_scale = True

    def __init__(self, least_scale: float) -> None:
        self.least_scale = least_scale

    def nll_map(self, pixels: Tensor, parameters: Tensor) -> Tensor:
        location, log_scale = parameters.float().chunk(2, dim=1)
        scale = self.least_scale + log_scale.exp()
        logits = to_laplace_logits(pixels)
        unit = torch.sigmoid(logits)
        log_density = (
            -(2 * scale).log() - (unit * (1 - unit)).log() - (logits - location).abs() / scale
        )
        return -(log_density + math.log((1 - 2 * LAPLACE_MARGIN) / 2))

    def image(self, parameters: Tensor) -> Tensor:
        """The median, which is the most likely value too where the scale is below 1."""
        return from_laplace_logits(parameters.float().chunk(2, dim=1)[0])

    def _log_mass(self, values: Tensor, parameters: Tensor) -> Tensor:
        location, log_scale = parameters.chunk(2, dim=1)
        # A step of a scale of exp(20) has no mass that counts, and a larger one would overflow.
        scale = self.least_scale + log_scale.clamp(max=20).exp()
        low, high = (
            (to_laplace_logits(edge) - location) / scale
            for edge in step_edges(values, location.dtype)
        )
        return log_mass(laplace_log_cdf, values, low, high)
