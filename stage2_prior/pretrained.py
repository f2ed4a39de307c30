"""`ImagePrior` and `LatentPriorModel`: priors as models of transformers. Knows how transformers
makes models; model.py and flows/model.py have what they do.
"""

from __future__ import annotations

from transformers import PreTrainedConfig

from stage2_prior.flows.model import LatentPriorModule, SavedLatentPriorConfig
from stage2_prior.model import PriorModule, SavedPriorConfig
from stage2_prior.transformers_saving import SavedPreTrainedModel


class ImagePriorConfig(SavedPriorConfig, PreTrainedConfig):
    """The two plain configurations in the form that transformers saves: `model` and `stream` are
    dictionaries."""


class ImagePrior(PriorModule, SavedPreTrainedModel):  # type: ignore[misc]
    """A `PriorModule` that is a `PreTrainedModel`, too; with its arguments."""

    config_class = ImagePriorConfig
    base_model_prefix = "prior"


class LatentPriorModelConfig(SavedLatentPriorConfig, PreTrainedConfig):
    """A `LatentPriorConfig` in the form that transformers saves: `model` is its dictionary."""


class LatentPriorModel(LatentPriorModule, SavedPreTrainedModel):  # type: ignore[misc]
    """A `LatentPriorModule` that is a `PreTrainedModel`, too; with its arguments."""

    config_class = LatentPriorModelConfig
    base_model_prefix = "latent_prior"
    main_input_name = "latents"
