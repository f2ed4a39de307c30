"""The Bernoulli likelihood: each dimension of an image is a coin."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stage1_tokenizer.likelihoods.base import Likelihood
from stage1_tokenizer.likelihoods.masses import LAST


class Bernoulli(Likelihood):
    """Pixels are coins of the decoder's probability. The likelihood of images of black and white
    dimensions; of others the mean over their random binarizations (a dimension is white with its
    own brightness), as is common for VAEs. Values between 0 and 255 have no probability."""

    def nll_map(self, pixels: Tensor, parameters: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(
            parameters.float(), (pixels + 1) / 2, reduction="none"
        )

    def image(self, parameters: Tensor) -> Tensor:
        """The mean, which for a certain pixel is the most likely one."""
        return 2 * parameters.float().sigmoid() - 1

    def covers(self, values: Tensor) -> bool:
        return bool(((values == 0) | (values == LAST)).all())

    def log_prob(self, values: Tensor, parameters: Tensor) -> Tensor:
        if not self.covers(values):
            raise ValueError(
                "likelihood bernoulli has a probability of the values 0 and 255 alone, and these "
                "images have others; train a tokenizer with likelihood discretized_logistic"
            )
        return super().log_prob(values, parameters)

    def _log_mass(self, values: Tensor, parameters: Tensor) -> Tensor:
        black = torch.where(values == 0, F.logsigmoid(-parameters), -torch.inf)
        return torch.where(values == LAST, F.logsigmoid(parameters), black)
