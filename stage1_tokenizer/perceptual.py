"""How different two images look: multi-scale structural similarity, or a vision backbone's
features. Knows pixels, no tokenizer.

Legend: B batch, C channels, H W pixels, in the model's range [-1,1].

MS-SSIM: Wang et al. 2003. Distances of features at several layers, each normalised over its
channels: LPIPS, Zhang et al. 2018 (https://arxiv.org/abs/1801.03924), here without its learned
weights of channels, for any backbone that transformers loads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer.file_checks import (
    UnsafeFile,
    check_library_folder,
    check_weights,
    convert,
    read_json_object,
)
from stage1_tokenizer.metrics import multi_scale_distance
from stage1_tokenizer.options import PerceptualOptions
from stage1_tokenizer.pixels import laid_on_white

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


_TEXTS = ("*.json", "*.txt")
_MAX_LAYERS = 1000
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")


def checked_folder(name: str) -> Path:
    """The folder of any model of transformers, by path or name of the Hub. Of the Hub, safetensors
    are downloaded, or else the pickle, of which transformers reads tensors alone.

    Raises:
        FileNotFoundError: there is none.
        OSError: a file cannot be read, or it is no folder.
        ValueError: a file is not safe to read.
    """
    from stage1_tokenizer.hub import model_folder  # not above: it imports huggingface_hub

    folder = model_folder(name, [*_TEXTS, _WEIGHTS[0]])
    if not any(folder.glob("*.safetensors")) and not Path(name).expanduser().exists():
        folder = model_folder(name, [*_TEXTS, _WEIGHTS[1]])
    check_library_folder(folder)
    for pattern in _WEIGHTS:
        for path in folder.glob(pattern):
            check_weights(path)
    if (folder / "config.json").exists():
        _check_layers(read_json_object(folder / "config.json"))
    return folder


def _check_layers(config: Mapping[str, Any]) -> None:
    """Raises ValueError where a configuration asks for more layers than any published model has,
    which would take long to build."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_layers(value)
        if re.search("layer|depth|block", key):
            counts = value if isinstance(value, list) else [value]
            if any(isinstance(count, int) and count > _MAX_LAYERS for count in counts):
                raise ValueError(f"{key} in its config.json is above {_MAX_LAYERS}")


def _pixel_statistics(folder: Path) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (3,1,1) by which a model's images are normalised.

    Raises:
        ValueError: they are no three numbers each.
    """
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        known: dict[str, Any] = ImageProcessingMixin.get_image_processor_dict(folder)[0]
    except OSError:
        known = {}
    mean, deviation = (
        convert(known.get(name) or default, tuple[float, float, float], name)
        for name, default in zip(("image_mean", "image_std"), _IMAGENET, strict=True)
    )
    if min(deviation) <= 0:
        raise ValueError(f"image_std is {list(deviation)}; each must be above 0")
    return torch.tensor(mean)[:, None, None], torch.tensor(deviation)[:, None, None]


class Distance(Protocol):
    """Pixels (B,C,H,W) and what is compared with them -> a distance (B,) of 0 for equal ones,
    differentiable in both."""

    def __call__(self, pixels: Tensor, others: Tensor) -> Tensor: ...


class BackboneDistance(nn.Module):
    """Mean squared difference of a backbone's features, normalised over channels, averaged over
    positions and summed over layers.

    Args:
        name: a folder with a model of transformers, or a name of the Hub.
        layers: which hidden states to compare (0 is the embedding); all but that where empty.

    Of a model of images and text (CLIP) the part for images is taken. Images of four channels are
    laid on white first: backbones know three colours.

    Raises:
        ValueError: nothing can be loaded from there, it takes no images, or a layer is not there.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, name: str, layers: tuple[int, ...]) -> None:
        super().__init__()
        from transformers import AutoModel

        try:
            folder = checked_folder(name)
            model = AutoModel.from_pretrained(folder, trust_remote_code=False)
            mean, deviation = _pixel_statistics(folder)
        except UnsafeFile:
            raise
        except Exception as error:  # transformers raises all kinds for damaged files
            first = " ".join(str(error).split())[:200]
            raise ValueError(
                f"tokenizer.objective.perceptual.distance is {name!r}, which is not ms_ssim and "
                f"cannot be loaded as a model ({first}); give ms_ssim, a folder that holds a "
                "vision "
                "model, or a Hub name with network access"
            ) from error
        self.backbone = getattr(model, "vision_model", model).eval().requires_grad_(False)
        self.layers = layers
        size = getattr(self.backbone.config, "image_size", None)
        self.size = (size, size) if isinstance(size, int) else tuple(size) if size else None
        """Height and width that the backbone was made for; None where it takes any."""
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("deviation", deviation, persistent=False)
        try:
            states = len(self._states(torch.zeros(1, 3, 64, 64)))
        except Exception as error:  # of any architecture
            first = " ".join(str(error).split())[:200]
            raise ValueError(
                f"tokenizer.objective.perceptual.distance is {name!r}, a "
                f"{type(self.backbone).__name__}, which does not take images of "
                f"three colours and give hidden states ({first}); choose another model"
            ) from error
        if max(layers, default=0) >= states:
            raise ValueError(
                f"tokenizer.objective.perceptual.layers are {list(layers)} and the backbone has "
                f"hidden states 0..{states - 1}; choose among these"
            )

    def forward(self, pixels: Tensor, others: Tensor) -> Tensor:
        self.to(pixels.device)  # nobody else does: it is part of no network that is trained
        with torch.no_grad():
            first = self._features(pixels)
        total = torch.zeros(len(pixels), device=pixels.device)
        for a, b in zip(first, self._features(others), strict=True):
            total = total + (a - b).square().sum(1).flatten(1).mean(1)
        return total

    def _features(self, pixels: Tensor) -> list[Tensor]:
        """(B,C,...) of each layer, of length 1 over channels."""
        states = self._states(pixels)
        chosen = self.layers or range(1, len(states))
        # Transformers give (B, positions, C), convolutional networks (B,C,h,w).
        return [
            F.normalize((s.transpose(1, 2) if s.ndim == 3 else s).float(), dim=1)
            for s in (states[i] for i in chosen)
        ]

    def _states(self, pixels: Tensor) -> Sequence[Tensor]:
        """All hidden states for pixels (B,C,H,W) in the model's range."""
        pixels = laid_on_white(pixels)
        if self.size:
            pixels = F.interpolate(
                pixels, self.size, mode="bilinear", antialias=True, align_corners=False
            )
        states = self.backbone(
            pixel_values=((pixels + 1) / 2 - self.mean) / self.deviation, output_hidden_states=True
        ).hidden_states
        if not states:
            raise ValueError("there are none")
        return states


def build_distance(options: PerceptualOptions) -> Distance | None:
    """What the options ask for; None where it has no weight."""
    if not options.weight:
        return None
    return (
        multi_scale_distance
        if options.distance == "ms_ssim"
        else BackboneDistance(options.distance, options.layers)
    )
