"""How models are saved and loaded: config.json and safetensors, checked before memory is taken, and
a fingerprint of both. Knows files and configurations; knows no particular model.

The other stage has the same file, but for the name of its package: the stages share no package, and
a test compares the two.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from inspect import get_annotations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from stage2_prior.file_checks import (
    StoredTensor,
    UnsafeFile,
    check_folder,
    convert,
    read_json_object,
    stored_tensors,
)
from stage2_prior.hub import model_folder, push_folder

_WEIGHTS = "model.safetensors"
_CONFIG = "config.json"
_MAX_CONFIG_BYTES = 2**20
_HUB_OPTIONS = ("revision", "cache_dir", "token", "force_download", "local_files_only")
"""Options of `from_pretrained` that say what is downloaded."""


class SavedConfig(PreTrainedConfig):
    """What a `SavedModel` has in config.json: plain configurations as dictionaries."""

    model: dict[str, Any] | None = None
    saved_fingerprint: str | None = None
    """The model's `fingerprint` when it was saved; None where an older version saved it."""


class SavedModel(PreTrainedModel):
    """A model that is saved as transformers saves models, and loaded with every file checked. Its
    constructor takes a `config_class` alone, too."""

    config_class: type[SavedConfig]
    noun: ClassVar[str]
    """What the model is, in messages."""
    described_by: ClassVar[tuple[str, ...]] = ("model",)
    """Fields of the configuration that say what the model is; the fingerprint covers them."""
    recorded: ClassVar[tuple[str, ...]] = ()
    """Fields of the configuration that record the training."""
    if TYPE_CHECKING:
        to = nn.Module.to  # type: ignore[assignment]  # transformers' wrapper hides the signature

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with the configuration or any weight. Weights count with the
        values that they have in fp32, in which they are loaded."""
        return self._fingerprint_of(self.config, self.state_dict())

    @classmethod
    def _fingerprint_of(cls, config: PreTrainedConfig, weights: Mapping[str, Tensor]) -> str:
        described = [getattr(config, name) for name in cls.described_by]
        text = json.dumps(described if len(described) > 1 else described[0], sort_keys=True)
        digest = hashlib.sha256(text.encode())
        for name, tensor in sorted(weights.items()):
            digest.update(name.encode())
            values = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
            # Flat first: a 0-d tensor cannot be viewed as bytes.
            flat = values.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    @classmethod
    def check_stored(cls, config: Any, stored: Mapping[str, StoredTensor]) -> None:
        """Raises ValueError where the configuration describes a model that would take long to
        build, and that the stored weights are not of. Called before the model is built."""

    def save_pretrained(self, save_directory: Any, *arguments: Any, **options: Any) -> None:
        """As transformers does, which has the arguments, with the fingerprint in config.json."""
        # Other weights than its own, which transformers can save in their place, have another.
        is_own = not arguments and "state_dict" not in options
        self.config.saved_fingerprint = self.fingerprint if is_own else None
        super().save_pretrained(save_directory, *arguments, **options)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> str:
        """Uploads the model to the Hub, as `push_folder` does, which has the arguments and the
        errors. Returns the address of the commit."""
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_folder(
                Path(folder), repo_id, private=private, revision=revision, token=token
            )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, name: str | Path, *arguments: Any, **options: Any
    ) -> Any:
        """A model from a folder, or by a name of the Hub.

        Missing or unknown weights are refused; transformers' own method would initialise or ignore
        them. Of a name of the Hub, config.json and the weights are downloaded into its cache, and
        checked there. Further options are passed on to transformers, but for those that could run
        code. `Any`, since it returns a pair with `output_loading_info`.

        Raises:
            ValueError: a file is missing, truncated, changed since it was saved or another model's,
                or the weights do not fit the configuration; names the first keys that differ.
        """
        wanted = {key: options.pop(key) for key in _HUB_OPTIONS if key in options}
        inside = options.get("subfolder") or ""
        try:
            files = [f"{Path(inside) / file}" for file in (_CONFIG, _WEIGHTS)]
            folder = model_folder(name, files, **wanted)
        except FileNotFoundError as error:
            raise ValueError(
                f"no {cls.noun} can be loaded: {error}; give a folder that holds {_CONFIG} and "
                f"{_WEIGHTS}, or a Hub name with network access"
            ) from error
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
            loaded: Any = super().from_pretrained(folder, *arguments, **(options | checked))
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
        config, weights = cls._checked(folder)
        model = cls(config)
        for key, built in model.state_dict().items():
            # Indices and sizes follow from the configuration; counters, without dimensions, do not.
            exact = built.ndim > 0 and not built.is_floating_point() and built.dtype != torch.bool
            if exact and not torch.equal(built, weights[key].to(built.dtype)):
                raise ValueError(
                    f"{folder / _WEIGHTS} has values in {key} that do not follow from {_CONFIG}; "
                    "copy the folder again"
                )
        model.load_state_dict(weights)
        return model.eval()

    @classmethod
    def _checked(cls, folder: Path) -> tuple[Any, dict[str, Tensor]]:
        """The configuration and the weights of a folder. The weights are read once their header
        fits the configuration."""
        for name in (_CONFIG, _WEIGHTS):
            if not (folder / name).exists():
                raise ValueError(
                    f"{folder} holds no {name}; a {cls.noun} needs {_CONFIG} and {_WEIGHTS}"
                )
        check_folder(folder)
        try:
            values = cls._config_values(folder / _CONFIG)
            stored = stored_tensors(folder / _WEIGHTS)
            config = cls.config_class(**values)
            _refuse_misfit(folder, cls._misfits(config, stored, folder))
            weights = load_file(folder / _WEIGHTS)
        except (SafetensorError, TypeError) as error:
            raise ValueError(
                f"{folder} cannot be read: {error}; the file is truncated or not a {cls.noun}'s, "
                "copy it again"
            ) from error
        expected = config.saved_fingerprint
        if expected is not None and (found := cls._fingerprint_of(config, weights)) != expected:
            raise ValueError(
                f"{folder} has fingerprint {found}, and {expected} was saved: {_CONFIG} or "
                f"{_WEIGHTS} was changed or damaged since; copy the folder again"
            )
        return config, weights

    @classmethod
    def _misfits(cls, config: Any, stored: Mapping[str, StoredTensor], folder: Path) -> set[str]:
        """Names of weights that the configuration does not describe, or otherwise."""
        try:
            cls.check_stored(config, stored)
            with torch.device("meta"):  # which takes no memory
                own = cls(config).state_dict()
        except UnsafeFile:
            raise
        except (RuntimeError, ArithmeticError, MemoryError, TypeError, IndexError) as error:
            raise ValueError(
                f"{folder / _CONFIG} describes no {cls.noun} that can be built "
                f"({str(error).splitlines()[0][:200]}); copy the folder again"
            ) from error
        except ValueError as error:
            raise ValueError(f"{folder / _CONFIG}: {error}; copy the folder again") from error
        return (set(own) ^ set(stored)) or {
            key for key, tensor in own.items() if not stored[key].fits(tensor)
        }

    @classmethod
    def _config_values(cls, path: Path) -> dict[str, Any]:
        try:
            values = read_json_object(path, _MAX_CONFIG_BYTES)
        except UnsafeFile:
            raise
        except ValueError as error:
            raise ValueError(
                f"{path} cannot be read: {error}; the file is truncated or not a {cls.noun}'s, "
                "copy it again"
            ) from error
        if not isinstance(values.get("model"), dict):
            raise ValueError(
                f"{path} is not a {cls.noun}'s: it has no 'model' section; give a {cls.noun}'s "
                "folder"
            )
        needed = cls.config_class.model_type
        if values.get("model_type", needed) != needed:
            raise ValueError(
                f"{path} is of the model type {str(values['model_type'])[:60]!r}; {cls.__name__} "
                f"reads {needed!r} alone; give a {cls.noun}'s folder"
            )
        hints: dict[str, Any] = {}
        for kind in cls.config_class.__mro__:
            if issubclass(kind, SavedConfig):
                hints |= get_annotations(kind, eval_str=True)
        known = (*cls.described_by, *cls.recorded, "saved_fingerprint")
        return {
            key: convert(values[key], hints[key], f"{path}: {key}")
            for key in known
            if key in values
        }


def refuse_larger(what: str, described: int, stored: int) -> None:
    """Raises ValueError where a configuration describes more of something than weights hold."""
    if described > stored:
        raise ValueError(
            f"it describes {described:,} {what}, and the weights hold {stored:,}; they do not "
            "belong together"
        )


def _refuse_misfit(name: str | Path, differ: set[str]) -> None:
    if differ:
        shown = [key[:100] for key in sorted(differ)[:3]]
        raise ValueError(
            f"the weights of {name} do not fit its config.json (first keys that differ: {shown}); "
            "copy the folder again"
        )
