"""Models of transformers, saved and loaded with the checks of saving.py. Knows no particular model.

The other stage has the same file, but for the name of its package: the stages share no package, and
a test compares the two.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from stage2_prior.saving import HubOptions, SavedModule, refuse_misfit


class SavedPreTrainedModel(SavedModule, PreTrainedModel):  # type: ignore[misc]  # see below
    """Makes a `SavedModule` a model of transformers: a class has that module as its first base, and
    this one as its second."""

    # Behind `SavedModule` comes `PreTrainedModel`, which has methods of the same names.
    def __init__(self, config: Any) -> None:
        super(SavedModule, self).__init__(config)
        self._build()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: every module initialises itself when it is made."""

    def save_pretrained(self, save_directory: Any, *arguments: Any, **options: Any) -> None:
        """As transformers does, which has the arguments, with the fingerprint in config.json."""
        # Other weights than its own, which transformers can save in their place, have another.
        is_own = not arguments and "state_dict" not in options
        self.config.saved_fingerprint = self.fingerprint if is_own else None
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # it lasts a split second, and breaks up the lines of a log
        try:
            super(SavedModule, self).save_pretrained(save_directory, *arguments, **options)
        finally:
            if shown:
                logging.enable_progress_bar()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, name: str | Path, *arguments: Any, **options: Any
    ) -> Any:
        """As `SavedModule.from_pretrained`, which has the errors.

        Missing or unknown weights are refused; transformers' own method would initialise or ignore
        them. Further options are passed on to transformers, but for those that could run code.
        `Any`, since it returns a pair with `output_loading_info`.
        """
        hub: Any = {key: options.pop(key) for key in HubOptions.__annotations__ if key in options}
        inside = options.get("subfolder") or ""
        folder = cls._located(name, inside, hub)
        if not arguments and not options:
            return cls._read(folder)
        cls._checked(folder / inside)
        with_info = options.pop("output_loading_info", False)
        checked = {
            "output_loading_info": True,
            "ignore_mismatched_sizes": True,
            "use_safetensors": True,
            "trust_remote_code": False,
        }
        try:
            loaded: Any = super(SavedModule, cls).from_pretrained(
                folder, *arguments, **(options | checked)
            )
        except SafetensorError as error:
            raise ValueError(
                f"the weights of {name} cannot be read: {error}; the file is truncated or "
                "corrupted, copy it again"
            ) from error
        model, info = loaded
        mismatched = [entry[0] for entry in info["mismatched_keys"]]
        refuse_misfit(name, {*info["missing_keys"], *info["unexpected_keys"], *mismatched})
        return (model, info) if with_info else model
