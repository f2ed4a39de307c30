"""Published weights -> our modules: OpenAI's dVAE, VQ-GAN and its Gumbel variant of
taming-transformers, LlamaGen's VQ-8 and VQ-16.

Knows the names of weights in their files, and reads sizes from shapes; knows no training. Unpickles
plain tensors alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stage1_tokenizer.config import TokenizerConfig
from stage1_tokenizer.options import VectorOptions, VqganOptions

Kind = Literal["openai-dvae", "taming-vqgan", "taming-gumbel", "llamagen"]
Weights = dict[str, Tensor]

_IMAGE_SIZE = 256
"""All of them were trained on images of 256 pixels."""
_SUFFIXES = {"w": "weight", "b": "bias"}
_BOOKKEEPING = (
    "quantizer.counts",
    "quantizer.usage_ema",
    "quantizer.sums",
    "quantizer.steps",
    "quantizer.initialized",
)
"""State of our quantizers besides their weights, which further training alone uses."""


def load_external(path: str | Path, kind: Kind) -> tuple[TokenizerConfig, Weights]:
    """The configuration that fits a file of published weights, and the weights under our names.

    `path` is a .safetensors file or one of torch that holds tensors only; for `openai-dvae` a
    folder with one for the encoder and one for the decoder (encoder.safetensors,
    decoder.safetensors; or .pt).

    Raises:
        ValueError: the file is unsafe or corrupted, or holds another architecture's weights; names
            the first keys that differ.
        FileNotFoundError: there is no such file.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(get_args(Kind))}")
    path = Path(path)
    weights = _dvae_folder(path) if kind == "openai-dvae" and path.is_dir() else read_weights(path)
    return convert(weights, kind, str(path))


def convert(weights: Weights, kind: Kind, name: str) -> tuple[TokenizerConfig, Weights]:
    """As `load_external`, of weights already read; `name` is what errors call them."""
    try:
        match kind:
            case "openai-dvae":
                return _openai_dvae(weights)
            case "llamagen":
                return _vqgan(_llamagen_names(weights), "llamagen")
            case _:
                return _vqgan(weights, kind)
    except KeyError as error:
        raise ValueError(
            f"{name} holds no {kind} weights: it has no {error.args[0]!r}, and its first keys are "
            f"{sorted(weights)[:3]}; "
            f"choose one of the kinds {', '.join(get_args(Kind))}"
        ) from error


def align_state_dict(config: TokenizerConfig, weights: Weights, own: Weights, name: str) -> Weights:
    """The whole state of our module: `weights`, and of `own` what is bookkeeping.

    Raises:
        ValueError: a weight is missing, too many or of another shape; names the first.
    """
    kept = {key: value for key, value in own.items() if key in _BOOKKEEPING}
    missing = sorted(set(own) - set(kept) - set(weights))
    unexpected = sorted(set(weights) - set(own))
    shapes = [key for key in weights if key in own and weights[key].shape != own[key].shape]
    if missing or unexpected or shapes:
        raise ValueError(
            f"{name} does not fit {config.architecture} with {config.quantizer}; first keys that "
            f"differ: missing {missing[:3]}, "
            f"unexpected {unexpected[:3]}, of another shape {shapes[:3]}; give the settings that "
            "it was trained with"
        )
    return kept | weights


def read_weights(path: Path) -> Weights:
    """Named tensors of a file, whatever they are wrapped in."""
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {path}; give a .safetensors file, or one of torch that holds "
            "tensors only"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ValueError(
            f"{path} cannot be read: {error}; the file is truncated or corrupted, copy it again"
        ) from error
    except Exception as error:
        # torch's loader raises many kinds for files that are corrupted, and its own for those that
        # are unsafe
        raise ValueError(
            f"{path} is corrupted, or holds more than tensors "
            f"({' '.join(str(error).split())[:120]}); loading such a file can run any "
            "program in it, so it is refused. Where it can be trusted, save its tensors alone, in "
            "the environment that it came from: "
            "weights = torch.load(path, weights_only=False); "
            'safetensors.torch.save_file(weights.state_dict(), "weights.safetensors") '
            '(or weights["state_dict"] of a training checkpoint)'
        ) from error
    for key in ("state_dict", "ema", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if (
        not isinstance(loaded, dict)
        or not loaded
        or not all(isinstance(value, Tensor) for value in loaded.values())
    ):
        raise ValueError(f"{path} holds no named tensors; give a state dict")
    return loaded


def _dvae_folder(folder: Path) -> Weights:
    weights: Weights = {}
    for part in ("encoder", "decoder"):
        found = [
            folder / f"{part}{suffix}"
            for suffix in (".safetensors", ".pt", ".pth", ".pkl")
            if (folder / f"{part}{suffix}").is_file()
        ]
        if not found:
            raise FileNotFoundError(
                f"{folder} holds no {part}.safetensors (or .pt); the dVAE's encoder and decoder "
                "are both needed"
            )
        weights |= {f"{part}.{key}": value for key, value in read_weights(found[0]).items()}
    return weights


def _count(weights: Iterable[str], pattern: str) -> int:
    """How many different numbers stand at the group of a pattern; KeyError where none does."""
    numbers = {match[1] for key in weights if (match := re.match(pattern, key))}
    if not numbers:
        raise KeyError(pattern.replace("\\", "").replace("(d+)", "0"))
    return len(numbers)


def _openai_dvae(weights: Weights) -> tuple[TokenizerConfig, Weights]:
    first = weights["encoder.blocks.input.w"]
    last = weights["encoder.blocks.output.conv.w"]
    table = weights["decoder.blocks.input.w"]
    shift = weights["decoder.blocks.input.b"]
    halvings = _count(weights, r"encoder\.blocks\.group_(\d+)\.") - 1
    config = TokenizerConfig(
        image_size=_IMAGE_SIZE,
        channels=first.shape[1],
        downsample_factor=2**halvings,
        architecture="dalle",
        width=first.shape[0] << halvings,
        encoder_depth=_count(weights, r"encoder\.blocks\.group_1\.block_(\d+)\."),
        decoder_depth=_count(weights, r"decoder\.blocks\.group_1\.block_(\d+)\."),
        quantizer="gumbel",
        num_codes=last.shape[0],
        code_dim=table.shape[0],
        likelihood="logit_laplace",
    )
    renamed = {}
    for key, value in weights.items():
        if not key.startswith("decoder.blocks.input."):
            stem, _, suffix = key.rpartition(".")
            renamed[f"{stem.replace('output.conv', 'output')}.{_SUFFIXES.get(suffix, suffix)}"] = (
                value
            )
    # A 1x1 convolution of one-hot codes is a look-up.
    renamed["quantizer.codebook"] = table[:, :, 0, 0].T + shift
    return config, renamed


def _vqgan(weights: Weights, kind: Kind) -> tuple[TokenizerConfig, Weights]:
    """VQ-GAN by the names of taming-transformers, whose checkpoints hold the losses' networks
    too."""
    gumbel = kind == "taming-gumbel"
    names = {
        "quantize.embed.weight" if gumbel else "quantize.embedding.weight": "quantizer.codebook",
        "quant_conv.weight": "encoder.quant_conv.weight",
        "quant_conv.bias": "encoder.quant_conv.bias",
        "post_quant_conv.weight": "decoder.post_quant_conv.weight",
        "post_quant_conv.bias": "decoder.post_quant_conv.bias",
    }
    if gumbel:
        names |= {
            "quantize.proj.weight": "encoder.project.weight",
            "quantize.proj.bias": "encoder.project.bias",
        }
    for key in names:
        weights[key]  # a KeyError names what another architecture lacks
    first = weights["encoder.conv_in.weight"]
    resolutions = _count(weights, r"encoder\.down\.(\d+)\.")
    widths = [
        weights[f"encoder.down.{i}.block.0.conv2.weight"].shape[0] for i in range(resolutions)
    ]
    codebook = weights["quantize.embed.weight" if gumbel else "quantize.embedding.weight"]
    config = TokenizerConfig(
        image_size=_IMAGE_SIZE,
        channels=first.shape[1],
        downsample_factor=2 ** (resolutions - 1),
        architecture="vqgan",
        vqgan=VqganOptions(
            channels=first.shape[0],
            multipliers=tuple(width // first.shape[0] for width in widths),
            blocks=_count(weights, r"encoder\.down\.0\.block\.(\d+)\."),
            latent_channels=weights["encoder.conv_out.weight"].shape[0],
            attention=f"encoder.down.{resolutions - 1}.attn.0.q.weight" in weights,
        ),
        quantizer="gumbel" if gumbel else "vq",
        num_codes=codebook.shape[0],
        code_dim=codebook.shape[1],
        # Trained further, codes that the first batches do not show must stay as they were
        # published.
        vq=VectorOptions()
        if gumbel
        else VectorOptions(
            codebook="gradient", normalize=kind == "llamagen", dead_code_threshold=0.0
        ),
        likelihood="l1",
    )
    renamed = {
        names.get(key, key): value for key, value in weights.items() if not key.startswith("loss.")
    }
    if kind == "llamagen":
        # Its codes have length 1, ours a root mean square of 1.
        key = "decoder.post_quant_conv.weight"
        renamed[key] = renamed[key] / codebook.shape[1] ** 0.5
    return config, renamed


def _llamagen_names(weights: Weights) -> Weights:
    """LlamaGen's names as those of taming-transformers, which number the decoder's resolutions from
    the finest."""
    last = _count(weights, r"encoder\.conv_blocks\.(\d+)\.") - 1
    middle = {"0": "block_1", "1": "attn_1", "2": "block_2"}
    rules: list[tuple[str, Callable[[re.Match[str]], str]]] = [
        (r"^encoder\.conv_blocks\.(\d+)\.", lambda m: f"encoder.down.{m[1]}."),
        (r"^decoder\.conv_blocks\.(\d+)\.", lambda m: f"decoder.up.{last - int(m[1])}."),
        (r"\.res\.(\d+)\.", lambda m: f".block.{m[1]}."),
        (r"\.mid\.([012])\.", lambda m: f".mid.{middle[m[1]]}."),
    ]
    renamed = {}
    for key, value in weights.items():
        for pattern, rule in rules:
            key = re.sub(pattern, rule, key)
        renamed[key] = value
    renamed.pop("quantize.codebook_used", None)  # the last codes of its training
    return renamed
