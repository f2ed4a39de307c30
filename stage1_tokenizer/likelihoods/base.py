"""The interface of likelihoods. Knows no distribution.

Legend: B batch, C channels, H W pixels. Pixels are in the model's range [-1,1]; values are integers
in 0..255.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stage1_tokenizer.likelihoods.masses import VALUES


class Likelihood:
    """What a decoder's output means: a distribution of images.

    Training minimises `nll_map`, mostly a density of pixels. At the 256 points that 8-bit images
    take, a density is no probability: it has no upper limit, and it does not sum to one.
    `exact_nll` and `log_prob` are those of a proper distribution of 8-bit values. Each value has
    the mass that the density puts on its step, half a step of 2/255 to either side. The first and
    the last value take the tails too.

    Some likelihoods say something of a whole image first, its side information. The probability
    of the values is then that of two parts:

        side = likelihood.side_information(values, parameters)
        known = likelihood.given(side)
        nats = likelihood.side_nats - known.log_prob(values, parameters).sum(dim=(1, 2, 3))
    """

    parameters_per_channel = 1
    learns_scale = False
    """Whether the density may grow without bound on the 256 values of 8-bit images. In training
    they are then spread over their steps by uniform noise (dequantization, Theis et al. 2016),
    which makes the density's mean a bound of the discrete probability."""
    side_choices = 1
    """Number of different side informations of an image, all equally likely."""

    def parameter_count(self, channels: int) -> int:
        """Parameters of a pixel, which the decoder gives."""
        return channels * self.parameters_per_channel

    def nll_map(self, pixels: Tensor, parameters: Tensor) -> Tensor:
        """The training loss of pixels (B,C,H,W) -> the same shape, in nats per dimension; an
        image's is their sum."""
        raise NotImplementedError

    def nll(self, pixels: Tensor, parameters: Tensor) -> Tensor:
        """The training loss of pixels (B,C,H,W) -> (B,), in nats per image."""
        return self.nll_map(pixels, parameters).flatten(1).sum(1)

    def image(self, parameters: Tensor) -> Tensor:
        """The pixels to show (B,C,H,W): the most likely ones."""
        return parameters.float()

    def covers(self, values: Tensor) -> bool:
        """Whether all of these values have a probability above 0."""
        return True

    @property
    def side_nats(self) -> float:
        """What the side information of an image costs, in nats."""
        return math.log(self.side_choices)

    def side_information(self, values: Tensor, parameters: Tensor) -> Tensor:
        """The side information that makes values (B,C,H,W) most likely -> (B,) int64 in
        0..`side_choices`-1."""
        return torch.zeros(len(values), dtype=torch.long, device=values.device)

    def given(self, side: Tensor) -> Likelihood:
        """The likelihood of images whose side information (B,) is known."""
        return self

    def log_prob(self, values: Tensor, parameters: Tensor) -> Tensor:
        """Exact log probabilities of values (B,C,H,W) -> the same shape, float64 in nats.

        Raises:
            ValueError: a value has no probability, or `given` is needed first.
        """
        return self._log_mass(values, parameters.double())

    def exact_nll(self, values: Tensor, parameters: Tensor) -> Tensor:
        """Negative log probability of values (B,C,H,W) -> (B,) float64, in nats per image, side
        information included.

        Raises:
            ValueError: a value has no probability.
        """
        known = self.given(self.side_information(values, parameters))
        return self.side_nats - known.log_prob(values, parameters).flatten(1).sum(1)

    def log_probabilities(
        self, parameters: Tensor, known: Tensor | None = None, channel: int | None = None
    ) -> Tensor:
        """Log probabilities of all 256 values -> (B,C,H,W,256) float64 in nats, each row a
        distribution.

        That is 2 KiB per dimension. Pixels do not depend on one another, so `parameters[:, :,
        top:bottom]` gives these rows alone. An entropy coder needs the same bits on both sides. It
        must ask for the same pieces when it encodes and when it decodes: in other pieces the last
        bit may differ.

        Args:
            known: values (B,C,H,W), of which those of a pixel's earlier channels count. Needed if
                the channels depend on one another (`discretized_logistic`).
            channel: this one alone, (B,1,H,W,256). A decoder takes one after another.

        Raises:
            ValueError: `known` or `given` is needed first.
        """
        if channel is not None:
            per_channel = parameters.unflatten(1, (self.parameters_per_channel, -1))
            parameters = per_channel[:, :, channel : channel + 1].flatten(1, 2)
        every = torch.arange(VALUES, device=parameters.device).reshape(-1, 1, 1, 1, 1)
        return self._log_mass(every, parameters.double()).movedim(0, -1).contiguous()

    def _log_mass(self, values: Tensor, parameters: Tensor) -> Tensor:
        """Log probabilities of values (...,C,H,W) under parameters (B,P,H,W), broadcast."""
        raise NotImplementedError


def bits_per_dimension(nats: float, dimensions: int) -> float:
    """Nats per image of a probability -> bits per dimension."""
    return nats / (dimensions * math.log(2))
