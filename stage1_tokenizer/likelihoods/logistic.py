"""The discretized logistic and its mixture, in which a pixel's channels depend on one another
(PixelCNN++, Salimans et al. 2017, https://arxiv.org/abs/1701.05517, sections 2.1 and 2.2).

Legend: B batch, K components, C channels, H W pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stage1_tokenizer.likelihoods.base import Likelihood
from stage1_tokenizer.likelihoods.masses import VALUES, logistic_log_mass
from stage1_tokenizer.options import STEP
from stage1_tokenizer.pixels import to_values, values_to_model_range

LEAST_SCALE = STEP / 16
"""With it a pixel that is certain costs 0.001 bits."""


class DiscretizedLogistic(Likelihood):
    """A mixture of logistics over the 256 values of each channel (eq. 2), trained on its exact
    probability.

    A pixel's channels share the component. The location of a channel is linear in the values of the
    channels before it, by the decoder's coefficients (eq. 3). Thus the decoder need not know what
    the channels of a pixel have in common.

    Args:
        channels: of an image.
        mixtures: components, K.
    """

    def __init__(self, channels: int = 3, mixtures: int = 1) -> None:
        self.channels = channels
        self.mixtures = mixtures
        self.pairs = channels * (channels - 1) // 2

    def parameter_count(self, channels: int) -> int:
        return self.mixtures * (1 + 2 * channels + self.pairs)

    def nll_map(self, pixels: Tensor, parameters: Tensor) -> Tensor:
        """Of pixels at the values of 8-bit images."""
        return -self._log_prob(to_values(pixels), parameters.float())

    def log_prob(self, values: Tensor, parameters: Tensor) -> Tensor:
        return self._log_prob(values, parameters.double())

    def _log_prob(self, values: Tensor, parameters: Tensor) -> Tensor:
        log_weights, location, scale, coefficients = self._split(parameters)
        location = self._conditioned(location, coefficients, values)
        mass = logistic_log_mass(values.unsqueeze(1), location, scale)
        return torch.logsumexp(self._posterior(log_weights, mass) + mass, dim=1)

    def log_probabilities(
        self, parameters: Tensor, known: Tensor | None = None, channel: int | None = None
    ) -> Tensor:
        if known is None:
            if self.channels > 1:
                raise ValueError(
                    "a channel's probabilities depend on the channels before it; give `known`, "
                    "values (B,C,H,W) that are right in those channels"
                )
            known = torch.zeros_like(parameters[:, :1], dtype=torch.long)
        log_weights, location, scale, coefficients = self._split(parameters.double())
        location = self._conditioned(location, coefficients, known)
        mass = logistic_log_mass(known.unsqueeze(1), location, scale)
        log_weights = self._posterior(log_weights, mass)
        if channel is not None:
            here = slice(channel, channel + 1)
            log_weights, location, scale = (x[:, :, here] for x in (log_weights, location, scale))
        every = torch.arange(VALUES, device=parameters.device).reshape(-1, 1, 1, 1, 1, 1)
        table = torch.logsumexp(log_weights + logistic_log_mass(every, location, scale), dim=2)
        return table.movedim(0, -1).contiguous()

    def image(self, parameters: Tensor) -> Tensor:
        """The mean, of locations within the pixels' range."""
        log_weights, location, _, coefficients = self._split(parameters.float())
        means = location[:, :, :0]
        for channel, own in enumerate(coefficients.split(list(range(self.channels)), dim=2)):
            mean = location[:, :, channel] + (own * means).sum(2)
            means = torch.cat([means, mean.clamp(-1, 1).unsqueeze(2)], dim=2)
        return (log_weights.exp() * means).sum(1)

    def _split(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log weights (B,K,1,H,W), locations and scales (B,K,C,H,W), and coefficients of earlier
        channels (B,K,pairs,H,W)."""
        by_component = parameters.unflatten(1, (self.mixtures, -1))
        sizes = [1, self.channels, self.channels, self.pairs]
        logits, location, raw_scale, coefficients = by_component.split(sizes, dim=2)
        scale = LEAST_SCALE + F.softplus(raw_scale)
        return logits.log_softmax(1), location, scale, coefficients

    def _conditioned(self, location: Tensor, coefficients: Tensor, values: Tensor) -> Tensor:
        """Locations (B,K,C,H,W) given the values (B,C,H,W) of earlier channels."""
        channel, earlier = torch.tril_indices(
            self.channels, self.channels, -1, device=values.device
        )
        pixels = values_to_model_range(values, location.dtype)[:, earlier].unsqueeze(1)
        return location.index_add(2, channel, coefficients * pixels)

    def _posterior(self, log_weights: Tensor, mass: Tensor) -> Tensor:
        """Log weights (B,K,C,H,W) of the components, given a pixel's earlier channels, whose values
        have these log masses (B,K,C,H,W) under each."""
        earlier = mass.cumsum(2) - mass
        return (log_weights + earlier).log_softmax(1)
