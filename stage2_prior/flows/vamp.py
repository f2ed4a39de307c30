"""VampPrior: a mixture of the posteriors of learned pseudo-inputs. Knows vectors, and a function
from inputs to posteriors; nothing of what is behind it.

Legend: n dimensions of a latent vector, C features of a context, K pseudo-inputs.

Tomczak & Welling 2018 (https://arxiv.org/abs/1705.07120), eq. 9: p(z) = 1/K sum_k q(z | u_k), with
pseudo-inputs u_k learned by gradient. The weights are learned here, too; they start at 1/K.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from stage2_prior.flows.mixture import Components, Mixture, MixtureWeights

Posterior = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Inputs (K,...) -> means (K,n) and logarithms of standard deviations (K,n) of their posteriors."""


class VampPrior(Mixture):
    """K pseudo-inputs, each a component by way of `posterior`.

    Args:
        latent_features: n.
        input_shape: the shape of one input of `posterior`.
        components: K.
        context_features: C.

    `attach` gives it the posterior, first and after loading: it is not saved with the prior.
    """

    def __init__(
        self,
        latent_features: int,
        input_shape: tuple[int, ...],
        components: int,
        context_features: int = 0,
    ) -> None:
        super().__init__(latent_features, context_features)
        self.weights = MixtureWeights(components, context_features)
        self.pseudo_inputs = nn.Parameter(torch.randn(components, *input_shape))
        self._posterior: Posterior | None = None

    def attach(self, posterior: Posterior) -> None:
        """Sets what maps inputs to posteriors. Its weights get gradients, and are not this
        module's parameters."""
        # Within a function: a module as an attribute would become a part of this one.
        self._posterior = lambda inputs: posterior(inputs)

    @torch.no_grad()
    def set_pseudo_inputs(self, inputs: Tensor) -> None:
        """Starts the pseudo-inputs at given inputs (K,...), such as training images. They start as
        noise otherwise, whose posteriors may be nearly equal.

        Raises:
            ValueError: their shape is not that of the pseudo-inputs.
        """
        if inputs.shape != self.pseudo_inputs.shape:
            raise ValueError(
                f"inputs have shape {tuple(inputs.shape)} and must have that of the "
                f"pseudo-inputs, {tuple(self.pseudo_inputs.shape)}"
            )
        self.pseudo_inputs.copy_(inputs)

    def components(self, context: Tensor | None = None) -> Components:
        """The posteriors of the pseudo-inputs as they are now.

        Raises:
            ValueError: no posterior is attached, or it gives another shape than (K,n).
        """
        if self._posterior is None:
            raise ValueError(
                "a VampPrior needs the encoder that it was trained with; call "
                "attach(posterior) with a function from inputs to (mean, log_std)"
            )
        means, log_stds = self._posterior(self.pseudo_inputs)
        needed = (len(self.pseudo_inputs), self.latent_features)
        if tuple(means.shape) != needed or tuple(log_stds.shape) != needed:
            raise ValueError(
                f"the posterior gives means {tuple(means.shape)} and log_stds "
                f"{tuple(log_stds.shape)}; both must be {needed}"
            )
        return Components(self.weights(context), means, log_stds)
