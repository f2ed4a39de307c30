"""How models are saved and loaded: config.json and safetensors, checked before memory is taken, and
a fingerprint of both. Knows files and configurations; knows no particular model, nor transformers,
whose import takes longer than sampling an image (transformers_saving.py knows it).

The other stage has the same file, but for the name of its package: the stages share no package, and
a test compares the two.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import get_annotations
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Self, TypedDict, Unpack

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stage1_tokenizer.file_checks import (
    StoredTensor,
    UnsafeFile,
    check_folder,
    convert,
    read_json_object,
    stored_tensors,
)

_WEIGHTS = "model.safetensors"
_CONFIG = "config.json"
_MAX_CONFIG_BYTES = 2**20


class HubOptions(TypedDict, total=False):
    """What of a repository is downloaded: options of `huggingface_hub.snapshot_download`."""

    revision: str
    cache_dir: str | Path
    token: str | bool
    force_download: bool
    local_files_only: bool


@dataclass(kw_only=True)
class SavedConfig:
    """What a `SavedModule` has in config.json: plain configurations as dictionaries."""

    model_type: ClassVar[str]
    model: dict[str, Any] | None = None
    saved_fingerprint: str | None = None
    """The model's `fingerprint` when it was saved; None where an older version saved it."""


class SavedModule(nn.Module):
    """A module that is saved as config.json and model.safetensors, which transformers reads, too.
    Loading checks both. Besides other arguments, the constructor takes a saved configuration."""

    config_class: type[SavedConfig]
    transformers_name: ClassVar[str]
    """The class of transformers' models that has the same weights."""
    noun: ClassVar[str]
    """What the model is, in messages."""
    described_by: ClassVar[tuple[str, ...]] = ("model",)
    """Fields of the configuration that say what the model is; the fingerprint covers them."""
    recorded: ClassVar[tuple[str, ...]] = ()
    """Fields of the configuration that record the training."""
    config: SavedConfig

    def __init__(self, config: SavedConfig) -> None:
        super().__init__()
        self.config = config
        self._build()

    def _build(self) -> None:
        """Makes the parts that `config` describes."""
        raise NotImplementedError

    @classmethod
    def own_config_of(cls, config: SavedConfig) -> Any:
        """A configuration of the same model as this class has it, which may be the module or the
        model of transformers."""
        if isinstance(config, cls.config_class):
            return config
        return cls.config_class(**{name: getattr(config, name) for name in cls._fields()})

    @classmethod
    def _fields(cls) -> tuple[str, ...]:
        """Of the configuration, but for the fingerprint."""
        return (*cls.described_by, *cls.recorded)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(chain(self.parameters(), self.buffers())).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        tensors = chain(self.parameters(), self.buffers())
        return next(tensor.dtype for tensor in tensors if tensor.is_floating_point())

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with the configuration or any weight. Weights count with the
        values that they have in fp32, in which they are loaded."""
        return self._fingerprint_of(self.config, self.state_dict())

    @classmethod
    def _fingerprint_of(cls, config: SavedConfig, weights: Mapping[str, Tensor]) -> str:
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

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Writes config.json and model.safetensors into a folder, which is made if needed."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.saved_fingerprint = self.fingerprint
        fields = (*self._fields(), "saved_fingerprint")
        values = {name: getattr(self.config, name) for name in fields} | {
            "architectures": [self.transformers_name],
            "dtype": str(self.dtype).removeprefix("torch."),
            "model_type": self.config_class.model_type,
        }
        text = json.dumps(values, indent=2, sort_keys=True)
        (folder / _CONFIG).write_text(text + "\n", encoding="utf-8")
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        # transformers asks for the format.
        save_file(weights, folder / _WEIGHTS, metadata={"format": "pt"})

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> str:
        """Uploads the model to the Hub, as `push_folder` does, which has the arguments and the
        errors. Returns the address of the commit."""
        from stage1_tokenizer.hub import push_folder  # not above: it imports huggingface_hub

        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_folder(
                Path(folder), repo_id, private=private, revision=revision, token=token
            )

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, subfolder: str = "", **hub: Unpack[HubOptions]
    ) -> Self:
        """A model from a folder, or by a name of the Hub.

        Missing or unknown weights are refused. Of a name of the Hub, config.json and the weights
        are downloaded into its cache, and checked there.

        Raises:
            ValueError: a file is missing, truncated, changed since it was saved or another model's,
                or the weights do not fit the configuration; names the first keys that differ.
        """
        if unknown := sorted(set(hub) - set(HubOptions.__annotations__)):
            raise TypeError(
                f"{cls.__name__}.from_pretrained has no options {unknown}; leave them out, or use "
                f"{cls.transformers_name}, which has those of transformers"
            )
        return cls._read(cls._located(name, subfolder, hub) / subfolder)

    @classmethod
    def _located(cls, name: str | Path, subfolder: str, hub: HubOptions) -> Path:
        """The folder that a name is of, downloaded if need be."""
        path = Path(name).expanduser()
        if path.exists():
            return path
        from stage1_tokenizer.hub import model_folder  # not above: it imports huggingface_hub

        try:
            files = [f"{Path(subfolder) / file}" for file in (_CONFIG, _WEIGHTS)]
            return model_folder(name, files, **hub)
        except FileNotFoundError as error:
            raise ValueError(
                f"no {cls.noun} can be loaded: {error}; give a folder that holds {_CONFIG} and "
                f"{_WEIGHTS}, or a Hub name with network access"
            ) from error

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
            refuse_misfit(folder, cls._misfits(config, stored, folder))
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
            with torch.device("meta"), _NoValues():  # which takes no memory
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
        return {
            key: convert(values[key], hints[key], f"{path}: {key}")
            for key in (*cls._fields(), "saved_fingerprint")
            if key in values
        }


def refuse_larger(what: str, described: int, stored: int) -> None:
    """Raises ValueError where a configuration describes more of something than weights hold."""
    if described > stored:
        raise ValueError(
            f"it describes {described:,} {what}, and the weights hold {stored:,}; they do not "
            "belong together"
        )


def refuse_misfit(name: str | Path, differ: set[str]) -> None:
    """Raises ValueError where a file lacks these keys, or has them alone, or in another shape."""
    if differ:
        shown = [key[:100] for key in sorted(differ)[:3]]
        raise ValueError(
            f"the weights of {name} do not fit its config.json (first keys that differ: {shown}); "
            "copy the folder again"
        )


class _NoValues(TorchFunctionMode):
    """Leaves out random values. On the meta device there are none, and computing their shapes
    imports torch's compiler, which takes a second."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (Tensor.normal_, nn.init.normal_):
            return args[0] if args else kwargs["tensor"]
        if func is torch.randn:
            return torch.empty(*args)
        return func(*args, **(kwargs or {}))
