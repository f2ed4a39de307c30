"""`LatentPriorModule`: a prior over Gaussian latents that is saved and loaded, and the context that
captions give it. Knows settings, sizes and text ids; nothing of images or of what made the latents.

Legend: B batch, n dimensions of a latent vector, C features of a context, T text slots, M random
numbers per sample.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from stage2_prior.file_checks import StoredTensor, build_config
from stage2_prior.flows.build import build_latent_prior
from stage2_prior.flows.config import LatentPriorConfig
from stage2_prior.flows.context import CaptionContext
from stage2_prior.flows.transform import Conditioner
from stage2_prior.saving import SavedConfig, SavedModule, refuse_larger


@dataclass(kw_only=True)
class SavedLatentPriorConfig(SavedConfig):
    """A `LatentPriorConfig` as it is saved: `model` is its dictionary. With the sizes that latents
    and captions give."""

    model_type = "mini_dalle_latent_prior"
    latent_features: int = 0
    input_shape: list[int] | None = None
    text_vocab_size: int = 0
    text_pad_id: int = 0
    trained_with_caption_dropout: bool = False


class LatentPriorModule(SavedModule):
    """p(z | context) by the prior that a configuration names, which is `prior`.

    Args:
        config: the prior's settings; or what `config_class` is, as loading passes it on.
        latent_features: n; needed with settings.
        input_shape: shape of a pseudo-input of `vamp`. After loading, `prior.attach` gives a
            `VampPrior` its encoder again.
        text_vocab_size: entries of the vocabulary of captions, which `encode_text` needs; without
            it, a conditional prior takes contexts alone.
        text_pad_id: text id of unused slots.

    Raises:
        ValueError: as `build_latent_prior`.
    """

    config_class = SavedLatentPriorConfig
    transformers_name = "LatentPriorModel"
    noun = "prior"
    described_by = ("model", "latent_features", "input_shape", "text_vocab_size", "text_pad_id")
    # Sampling refuses what the training did not allow.
    recorded = ("trained_with_caption_dropout",)
    config: SavedLatentPriorConfig

    def __init__(
        self,
        config: LatentPriorConfig | SavedLatentPriorConfig,
        latent_features: int = 0,
        input_shape: tuple[int, ...] | None = None,
        *,
        text_vocab_size: int = 0,
        text_pad_id: int = 0,
    ) -> None:
        saved = (
            self.own_config_of(config)
            if isinstance(config, SavedLatentPriorConfig)
            else self.config_class(
                model=asdict(config),
                latent_features=latent_features,
                input_shape=None if input_shape is None else list(input_shape),
                text_vocab_size=text_vocab_size,
                text_pad_id=text_pad_id,
            )
        )
        super().__init__(saved)

    def _build(self) -> None:
        saved = self.config
        self.prior_config = build_config(LatentPriorConfig, saved.model or {}, "config.json")
        shape = None if saved.input_shape is None else tuple(saved.input_shape)
        self.prior = build_latent_prior(self.prior_config, saved.latent_features, shape)
        self.caption_context = (
            CaptionContext(saved.text_vocab_size, saved.text_pad_id, self.prior.context_features)
            if saved.text_vocab_size and self.prior.context_features
            else None
        )

    @classmethod
    def check_stored(
        cls, config: SavedLatentPriorConfig, stored: Mapping[str, StoredTensor]
    ) -> None:
        """Raises ValueError where there are more layers than stored tensors, or more dimensions
        than stored numbers."""
        own = build_config(LatentPriorConfig, config.model, "its model section")
        if own.kind in ("realnvp", "maf"):
            refuse_larger("layers", own.transforms * own.depth, len(stored))
        numbers = sum(math.prod(tensor.shape) for tensor in stored.values())
        refuse_larger("latent dimensions", config.latent_features, numbers)

    @property
    def latent_features(self) -> int:
        """n."""
        return self.prior.latent_features

    @property
    def context_features(self) -> int:
        """C; 0 for an unconditional prior."""
        return self.prior.context_features

    @property
    def noise_features(self) -> int:
        """M."""
        return self.prior.noise_features

    def forward(self, latents: Tensor, text_ids: Tensor | None = None) -> Tensor:
        """log p(z | caption) (B,) in nats of latents (B,n) and text ids (B,T), so that wrappers of
        modules can train a prior; errors as in `encode_text` and `log_prob`."""
        return self.prior.log_prob(latents, self.encode_text(text_ids))

    def encode_text(self, text_ids: Tensor | None) -> Tensor | None:
        """Text ids (B,T) -> the context (B,C) that `log_prob`, `sample` and `from_noise` take; None
        for an unconditional prior, which ignores captions, or without text ids.

        Raises:
            ValueError: the prior is conditional and was built without a vocabulary.
        """
        if text_ids is None or not self.context_features:
            return None
        if self.caption_context is None:
            raise ValueError(
                "this prior was built without a vocabulary; give a context to log_prob, or build "
                "it with text_vocab_size"
            )
        context: Tensor = self.caption_context(text_ids.to(self.device))
        return context

    def log_prob(self, latents: Tensor, context: Tensor | None = None) -> Tensor:
        """As `LatentPrior.log_prob`: latents (B,n), context (B,C) -> (B,) in nats."""
        return self.prior.log_prob(latents, context)

    def sample(
        self, count: int, generator: torch.Generator | None = None, context: Tensor | None = None
    ) -> Tensor:
        """As `LatentPrior.sample`: (count,n)."""
        return self.prior.sample(count, generator, context)

    def from_noise(self, noise: Tensor, context: Tensor | None = None) -> Tensor:
        """As `LatentPrior.from_noise`: standard normal numbers (B,M) -> samples (B,n)."""
        return self.prior.from_noise(noise, context)

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The matrices between hidden layers of a flow's networks, which optimizers for matrices
        may step."""
        conditioners = [m for m in self.prior.modules() if isinstance(m, Conditioner)]
        return [layer.weight for c in conditioners for layer in c.hidden[1:]]  # type: ignore[misc]
