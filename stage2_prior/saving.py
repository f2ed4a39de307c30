"""How priors are saved and loaded: config.json and safetensors, with checks. Knows files and
configurations; knows no particular prior."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

_Config = TypeVar("_Config")


class SavedPrior(PreTrainedModel):
    """A prior that is saved as transformers saves models, and loaded with all weights checked.
    Its constructor takes a `config_class` alone, too."""

    config_class: type[PreTrainedConfig]
    described_by: ClassVar[tuple[str, ...]]
    """Fields of the configuration that say what the prior is; the fingerprint covers them. `model`
    is one."""
    recorded: ClassVar[tuple[str, ...]] = ()
    """Fields of the configuration that record the training."""
    if TYPE_CHECKING:
        to = nn.Module.to  # type: ignore[assignment]  # transformers' wrapper hides the signature

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with the configuration or any weight."""
        described = [getattr(self.config, name) for name in self.described_by]
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            # Flat first: a 0-d tensor cannot be viewed as bytes.
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, name: str | Path, *arguments: Any, **options: Any
    ) -> Any:
        """A prior from a folder, or by a name of the Hub.

        Missing or unknown weights are refused; transformers' own method would initialise or ignore
        them. A name of the Hub, or further options, are passed on to it. `Any`, since it returns a
        pair with `output_loading_info`.

        Raises:
            ValueError: a file is missing, truncated or another model's, or the weights do not fit
                the configuration; names the first keys that differ.
        """
        folder = Path(name)
        if not arguments and not options and (folder.is_dir() or isinstance(name, Path)):
            return cls._read(folder)
        with_info = options.pop("output_loading_info", False)
        checked = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        try:
            loaded: Any = super().from_pretrained(name, *arguments, **(options | checked))
        except SafetensorError as error:
            raise ValueError(
                f"the weights of {name} cannot be read: {error}; the file is truncated or "
                "corrupted, copy it again"
            ) from error
        model, info = loaded
        mismatched = [entry[0] for entry in info["mismatched_keys"]]
        _refuse_misfit(name, {*info["missing_keys"], *info["unexpected_keys"], *mismatched})
        return (model, info) if with_info else model

    @classmethod
    def _read(cls, folder: Path) -> Self:
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise ValueError(
                    f"{folder} holds no {name}; a prior needs config.json and model.safetensors"
                )
        try:
            prior = cls(cls.config_class(**cls._config_values(folder / "config.json")))
            weights = load_file(folder / "model.safetensors")
        except (SafetensorError, json.JSONDecodeError, TypeError) as error:
            raise ValueError(
                f"{folder} cannot be read: {error}; the file is truncated or not a prior's, "
                "copy it again"
            ) from error
        own = prior.state_dict()
        _refuse_misfit(
            folder,
            (set(own) ^ set(weights)) or {k for k in own if own[k].shape != weights[k].shape},
        )
        prior.load_state_dict(weights)
        return prior.eval()

    @classmethod
    def _config_values(cls, path: Path) -> dict[str, Any]:
        values = json.loads(path.read_text())
        if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
            raise ValueError(f"{path} is not a prior's configuration: it has no 'model' section")
        needed = cls.config_class.model_type
        if values.get("model_type", needed) != needed:
            raise ValueError(
                f"{path} is of the model type {values['model_type']!r}; {cls.__name__} reads "
                f"{needed!r} alone"
            )
        known = (*cls.described_by, *cls.recorded)
        return {key: values[key] for key in known if key in values}


def _refuse_misfit(name: str | Path, differ: set[str]) -> None:
    if differ:
        raise ValueError(
            f"the weights of {name} do not fit its config.json; first keys that differ: "
            f"{sorted(differ)[:3]}"
        )


def build_config(kind: type[_Config], values: dict[str, Any] | None) -> _Config:
    """A configuration from saved values; unknown keys are refused."""
    values = values or {}
    unknown = set(values) - {f.name for f in fields(kind)}  # type: ignore[arg-type]
    if unknown:
        raise ValueError(
            f"the prior's config.json has unknown keys {sorted(unknown)} for {kind.__name__}"
        )
    return kind(**values)
