"""`ImageTokenizer`: pictures <-> codes, and how it is saved and loaded. Knows its parts; knows no training loop and no text.

Legend: B batch, C channels, H W pixels, h w code grid.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from stage1_tokenizer.config import Level, TokenizerConfig
from stage1_tokenizer.likelihoods import build_likelihood
from stage1_tokenizer.networks import Decoder, Encoder
from stage1_tokenizer.pixels import from_pil, to_model_range, to_pictures, to_pil
from stage1_tokenizer.quantizers import build_quantizer


class ImageTokenizerConfig(PreTrainedConfig):
    """A `TokenizerConfig` in the form that transformers saves: `model` is its dictionary."""

    model_type = "mini_dalle_tokenizer"
    model: dict[str, Any] | None = None


@dataclass
class TokenizerOutput:
    """One forward pass."""

    parameters: Tensor
    """(B,P,H,W) the likelihood's parameters."""
    codes: Tensor
    """(B,h,w) int64."""
    loss: Tensor
    """Scalar: the quantizer's part of the objective."""
    metrics: dict[str, Tensor]


class ImageTokenizer(PreTrainedModel):
    """Encoder, quantizer and decoder.

    Args:
        config: a `TokenizerConfig`, or the `ImageTokenizerConfig` that transformers passes on loading.
    """

    config_class = ImageTokenizerConfig
    base_model_prefix = "tokenizer"
    main_input_name = "pixels"

    def __init__(self, config: TokenizerConfig | ImageTokenizerConfig) -> None:
        hub = config if isinstance(config, ImageTokenizerConfig) else ImageTokenizerConfig(model=asdict(config))
        super().__init__(hub)
        own = self.own_config = build_config(TokenizerConfig, hub.model or {})
        self.likelihood = build_likelihood(own.likelihood, own.likelihood_scale)
        self.quantizer = build_quantizer(own)
        patch = min(own.factor, 4)
        out = own.channels * self.likelihood.parameters_per_channel
        self.encoder = Encoder(own.channels, own.widths, own.encoder_depth, own.encoder_kernel, patch, self.quantizer.input_dim)
        self.decoder = Decoder(own.code_dim, own.widths, own.decoder_depth, patch, out)
        self.to(memory_format=torch.channels_last)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing: every module initialises itself when it is made."""

    @property
    def num_codes(self) -> int:
        return self.own_config.num_codes

    @property
    def grid(self) -> tuple[int, int]:
        return self.own_config.grid

    @property
    def image_size(self) -> int:
        return self.own_config.image_size

    @property
    def layout(self) -> tuple[Level, ...]:
        """How the codes lie in one stream: one level."""
        return (Level(grid=self.grid, num_codes=self.num_codes),)

    @property
    def code_vectors(self) -> Tensor:
        """(K,D): what the decoder sees of each code, for models that take the codes further."""
        codes = torch.arange(self.num_codes, device=self.device)
        return self.quantizer.embed(codes[None, None]).detach()[0, :, 0].T

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with the configuration or any weight."""
        digest = hashlib.sha256(json.dumps(self.config.model, sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def forward(self, pixels: Tensor, temperature: float | None = None) -> TokenizerOutput:
        """Pixels (B,C,H,W) in [-1,1] through the codes and back; `temperature` relaxes gumbel's codes."""
        quantized = self.quantizer(self.encoder(pixels), temperature)
        parameters = self.decoder(quantized.latents)
        return TokenizerOutput(parameters, quantized.codes, quantized.loss, quantized.metrics)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B,C,H,W) in [-1,1] -> codes (B,h,w) int64.

        Raises:
            ValueError: the pixels have another shape than the tokenizer's.
        """
        expected = (self.own_config.channels, self.image_size, self.image_size)
        if tuple(pixels.shape[1:]) != expected:
            raise ValueError(f"pixels have shape {tuple(pixels.shape)} and must be (batch, {', '.join(map(str, expected))})")
        training, self.quantizer.training = self.quantizer.training, False
        try:
            return self.quantizer(self.encoder(pixels)).codes
        finally:
            self.quantizer.training = training

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B,h,w) -> the most likely pixels (B,C,H,W) in [-1,1].

        Raises:
            ValueError: the codes have another grid, or are not in 0..num_codes-1.
        """
        if tuple(codes.shape[1:]) != self.grid:
            raise ValueError(f"codes have shape {tuple(codes.shape)} and must be (batch, {self.grid[0]}, {self.grid[1]})")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.num_codes:
            raise ValueError(f"codes lie in {int(codes.min())}..{int(codes.max())} and must lie in 0..{self.num_codes - 1}")
        return self.likelihood.picture(self.decoder(self.quantizer.embed(codes))).clamp(-1, 1)

    def to_codes(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures of the tokenizer's size -> codes (B,h,w)."""
        return self.encode(to_model_range(from_pil(images, self.image_size)).to(self.device))

    def to_images(self, codes: Tensor) -> list[Image.Image]:
        """Codes (B,h,w) -> pictures."""
        return to_pil(to_pictures(self.decode(codes.to(self.device))))

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The kernels of encoder and decoder, which optimizers for matrices may step; a codebook is not among them."""
        return [p for network in (self.encoder, self.decoder) for p in network.parameters() if p.ndim >= 2]

    def compile_networks(self) -> None:
        """Compiles encoder and decoder in place; parameter names stay as they are."""
        self.encoder.compile(dynamic=False)
        self.decoder.compile(dynamic=False)

    @classmethod
    def load(cls, folder: str | Path) -> ImageTokenizer:
        """`from_pretrained` for a local folder, with one clear ValueError for anything missing, cut or foreign."""
        folder = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise ValueError(f"{folder} holds no {name}; a tokenizer needs config.json and model.safetensors")
        try:
            values = json.loads((folder / "config.json").read_text())
            if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
                raise ValueError(f"{folder}/config.json is not a tokenizer's: it has no 'model' section")
            tokenizer = cls(ImageTokenizerConfig(model=values["model"]))
            with safe_open(folder / "model.safetensors", framework="pt") as file:
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{folder} cannot be read: {error}; the file is cut or not a tokenizer's, copy it again") from error
        own = tokenizer.state_dict()
        differ = sorted(set(own) ^ set(weights)) or [k for k in own if own[k].shape != weights[k].shape]
        if differ:
            raise ValueError(f"{folder}/model.safetensors does not fit its config.json; first keys that differ: {differ[:3]}")
        tokenizer.load_state_dict(weights)
        return tokenizer.eval()


def build_config(kind: Any, values: dict[str, Any]) -> Any:
    """A configuration from saved values, nested ones too; a key this version does not know is refused rather than ignored."""
    unknown = set(values) - {f.name for f in fields(kind)}
    if unknown:
        raise ValueError(f"the tokenizer's config.json has unknown keys {sorted(unknown)} for {kind.__name__}")
    hints = get_type_hints(kind)
    nested = {k: build_config(hints[k], v) if is_dataclass(hints[k]) and isinstance(v, dict) else v for k, v in values.items()}
    return kind(**nested)


AutoConfig.register(ImageTokenizerConfig.model_type, ImageTokenizerConfig)
AutoModel.register(ImageTokenizerConfig, ImageTokenizer)
