"""p(image given codes): negative log-likelihoods in nats, and the image to show. Knows no
networks.

Legend: B batch, C channels, H W pixels. Pixels are in the model's range [-1,1]. Densities are per
unit of that range; their support is wider.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from stage1_tokenizer.options import STEP, LikelihoodName
from stage1_tokenizer.pixels import LAPLACE_MARGIN, from_laplace_logits, to_laplace_logits


class Likelihood:
    """What a decoder's output means."""

    parameters_per_channel = 1
    learns_scale = False
    """Whether the density may grow without bound on the 256 values of 8-bit images; they are then
    spread over their steps by uniform noise (dequantization, Theis et al. 2016), which makes the
    density's mean a bound of the discrete probability."""

    def nll_map(self, pixels: Tensor, parameters: Tensor) -> Tensor:
        """Negative log-likelihood of pixels (B,C,H,W) -> the same shape, in nats per dimension; an
        image's is their sum."""
        raise NotImplementedError

    def nll(self, pixels: Tensor, parameters: Tensor) -> Tensor:
        """Negative log-likelihood of pixels (B,C,H,W) -> (B,), in nats per image."""
        return self.nll_map(pixels, parameters).flatten(1).sum(1)

    def image(self, parameters: Tensor) -> Tensor:
        """The pixels to show (B,C,H,W): the most likely ones."""
        return parameters.float()

    def bits_per_dimension(self, nats: Tensor | float, dimensions: int) -> Tensor | float:
        """Nats per image, of a density per unit of the model's range -> bits per dimension of 8-bit
        images (a step is 2/255 wide)."""
        return (nats / dimensions - math.log(STEP)) / math.log(2)


class Gaussian(Likelihood):
    """L2: pixels are the decoder's output plus normal noise of a fixed deviation."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def nll_map(self, pixels: Tensor, parameters: Tensor) -> Tensor:
        squared = (pixels - parameters.float()).square() / (2 * self.scale**2)
        return squared + math.log(self.scale * math.sqrt(2 * math.pi))


class CalibratedGaussian(Likelihood):
    """L2 with the deviation of each image that fits it best (sigma-VAE, Rybkin et al. 2021,
    https://arxiv.org/abs/2006.13202), so that no scale need be chosen: half the log of an image's
    mean squared error, in place of the error.

    Images then count alike in decibels, where with one deviation for all the hardest ones
    outweigh the rest. The variance is that of pixels spread over their 8-bit steps (uniform noise
    adds a twelfth of a step's square), and so has a least value. What the deviation itself would
    cost to code, some bits per image, is not counted.
    """

    def nll_map(self, pixels: Tensor, parameters: Tensor) -> Tensor:
        squared = (pixels - parameters.float()).square() + STEP**2 / 12
        # A constant to the gradient: at its best the derivative by it is zero.
        variance = squared.detach().mean(dim=(1, 2, 3), keepdim=True)
        return squared / (2 * variance) + 0.5 * (2 * math.pi * variance).log()


class Laplace(Likelihood):
    """L1: pixels are the decoder's output plus Laplace noise of a fixed scale."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def nll_map(self, pixels: Tensor, parameters: Tensor) -> Tensor:
        absolute = (pixels - parameters.float()).abs() / self.scale
        return absolute + math.log(2 * self.scale)


class LogitLaplace(Likelihood):
    """DALL-E's: a Laplace on the logit of the squeezed pixel, which has a bounded support.

    Location and scale are both learned. The density (2021, appendix A.3) is over the unit interval,
    of which squeezed pixels take up [eps, 1 - eps]; the change of variables to the model's range
    adds the log of its slope, (1 - 2 eps) / 2. There the support is (-1.25, 1.25): some mass lies
    beyond the pixels' [-1, 1].

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


class Bernoulli(Likelihood):
    """Pixels are coins of the decoder's probability. The likelihood of images of black and white
    dimensions; of others the mean over their random binarizations (a dimension is white with its
    own brightness), as is common for VAEs."""

    def nll_map(self, pixels: Tensor, parameters: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(
            parameters.float(), (pixels + 1) / 2, reduction="none"
        )

    def image(self, parameters: Tensor) -> Tensor:
        """The mean, which for a certain pixel is the most likely one."""
        return 2 * parameters.float().sigmoid() - 1

    def bits_per_dimension(self, nats: Tensor | float, dimensions: int) -> Tensor | float:
        """Nats per image -> bits per dimension: a probability already, no density."""
        return nats / dimensions / math.log(2)


def build_likelihood(name: LikelihoodName, scale: float) -> Likelihood:
    match name:
        case "l2":
            return Gaussian(scale)
        case "calibrated_l2":
            return CalibratedGaussian()
        case "l1":
            return Laplace(scale)
        case "logit_laplace":
            return LogitLaplace(scale)
        case "bernoulli":
            return Bernoulli()
