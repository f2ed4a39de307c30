"""The discretized logistic and its mixture, in which a pixel's channels depend on one another
(PixelCNN++, Salimans et al. 2017, https://arxiv.org/abs/1701.05517, sections 2.1 and 2.2).

Legend: B batch, K components, C channels, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        parts = self._components(parameters, values)
        return torch.logsumexp(parts.log_weights + parts.log_mass, dim=1)

    def log_probabilities(
        self, parameters: Tensor, known: Tensor | None = None, channel: int | None = None
    ) -> Tensor:
        if known is None and self.channels > 1:
            raise ValueError(
                "a channel's probabilities depend on the channels before it; give `known`, "
                "values (B,C,H,W) that are right in those channels"
            )
        if known is None:
            known = torch.zeros_like(parameters[:, :1], dtype=torch.long)
        parts = self._components(parameters.double(), known)
        here = slice(None) if channel is None else slice(channel, channel + 1)
        every = torch.arange(VALUES, device=parameters.device).reshape(-1, 1, 1, 1, 1, 1)
        log_mass = logistic_log_mass(every, parts.location[:, :, here], parts.scale[:, :, here])
        table = torch.logsumexp(parts.log_weights[:, :, here] + log_mass, dim=2)
        return table.movedim(0, -1).contiguous()

    def image(self, parameters: Tensor) -> Tensor:
        """The mean, of locations within the pixels' range."""
        logits, location, _, coefficients = self._split(parameters.float())
        means = location[:, :, :0]
        for channel, own in enumerate(self._by_channel(coefficients)):
            mean = location[:, :, channel] + (own * means).sum(2)
            means = torch.cat([means, mean.clamp(-1, 1).unsqueeze(2)], dim=2)
        return (logits.softmax(1) * means).sum(1)

    def _split(self, parameters: Tensor) -> tuple[Tensor, ...]:
        """Logits of the components (B,K,1,H,W), locations and raw scales (B,K,C,H,W), and
        coefficients of earlier channels (B,K,pairs,H,W)."""
        sizes = [1, self.channels, self.channels, self.pairs]
        return parameters.unflatten(1, (self.mixtures, -1)).split(sizes, dim=2)

    def _by_channel(self, coefficients: Tensor) -> tuple[Tensor, ...]:
        """(B,K,pairs,H,W) -> those of each channel: none, one, two, ..."""
        return coefficients.split(list(range(self.channels)), dim=2)

    def _components(self, parameters: Tensor, values: Tensor) -> _Components:
        """The mixture of each channel, given the values (B,C,H,W) of the channels before it."""
        logits, location, raw_scale, coefficients = self._split(parameters)
        pixels = values_to_model_range(values, location.dtype).unsqueeze(1)
        shifts = [
            (own * pixels[:, :, :channel]).sum(2)
            for channel, own in enumerate(self._by_channel(coefficients))
        ]
        location = location + torch.stack(shifts, dim=2)
        scale = LEAST_SCALE + F.softplus(raw_scale)
        log_mass = logistic_log_mass(values.unsqueeze(1), location, scale)
        # Not even the last bit may depend on the channel's own value: a decoder does not know it.
        earlier = log_mass[:, :, :-1].cumsum(2)
        earlier = torch.cat([torch.zeros_like(log_mass[:, :, :1]), earlier], dim=2)
        log_weights = (logits.log_softmax(1) + earlier).log_softmax(1)
        return _Components(log_weights, location, scale, log_mass)


@dataclass(frozen=True)
class _Components:
    """The mixture of each channel; all are (B,K,C,H,W)."""

    log_weights: Tensor
    location: Tensor
    scale: Tensor
    log_mass: Tensor
    """Of the values that were given, under each component."""
