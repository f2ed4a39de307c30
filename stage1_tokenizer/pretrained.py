"""`ImageTokenizer`: the tokenizer as a model of transformers. Knows how transformers makes and
registers models; model.py has what it does.

Once this is imported, `transformers.AutoModel` loads tokenizers.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, PreTrainedConfig

from stage1_tokenizer.model import SavedTokenizerConfig, TokenizerModule
from stage1_tokenizer.transformers_saving import SavedPreTrainedModel


class ImageTokenizerConfig(SavedTokenizerConfig, PreTrainedConfig):
    """A `TokenizerConfig` in the form that transformers saves: `model` is its dictionary."""


class ImageTokenizer(TokenizerModule, SavedPreTrainedModel):  # type: ignore[misc]
    """A `TokenizerModule` that is a `PreTrainedModel`, too; with its arguments."""

    config_class = ImageTokenizerConfig
    base_model_prefix = "tokenizer"
    main_input_name = "pixels"


AutoConfig.register(ImageTokenizerConfig.model_type, ImageTokenizerConfig)
AutoModel.register(ImageTokenizerConfig, ImageTokenizer)
