"""`TokenizerModule`: images <-> codes or Gaussian latents, and how it is saved and loaded. Knows
its parts; knows no training loop and no text.

Legend: B batch, C channels, H W pixels, h w code grid, n latent dimensions of an image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from stage1_tokenizer.config import ImageSize, Level, TokenizerConfig, height_and_width
from stage1_tokenizer.convert_checkpoints import Kind, align_state_dict, load_external
from stage1_tokenizer.file_checks import StoredTensor, build_config
from stage1_tokenizer.likelihoods import build_likelihood
from stage1_tokenizer.networks import build_networks
from stage1_tokenizer.pixels import (
    check_model_range,
    from_pil,
    to_model_range,
    to_pil,
    to_uint8,
    without_haze,
)
from stage1_tokenizer.posterior import GaussianPosterior
from stage1_tokenizer.quantizers import (
    GaussianQuantizer,
    Quantized,
    VectorQuantizer,
    build_quantizer,
)
from stage1_tokenizer.saving import SavedConfig, SavedModule, refuse_larger
from stage1_tokenizer.tiling import by_tiles
from stage1_tokenizer.value_range import ValueRange

_LARGEST_SIDE = 2**15
"""Pixels of an image, which a file may say a tokenizer is for."""


@dataclass(kw_only=True)
class SavedTokenizerConfig(SavedConfig):
    """A `TokenizerConfig` as it is saved: `model` is its dictionary."""

    model_type = "mini_dalle_tokenizer"


@dataclass
class TokenizerOutput:
    """One forward pass."""

    parameters: Tensor
    """(B,P,H,W) the likelihood's parameters."""
    quantized: Quantized
    """Codes, and the quantizer's part of the objective."""
    reencoding: Tensor | None = None
    """Scalar, where asked for: the mean negative log-probability of the codes after their image is
    encoded again, in nats per code."""


class TokenizerModule(SavedModule):
    """Encoder, quantizer and decoder.

    Args:
        config: a `TokenizerConfig`, or what `config_class` is, as loading passes it on.
    """

    config_class = SavedTokenizerConfig
    transformers_name = "ImageTokenizer"
    noun = "tokenizer"

    def __init__(self, config: TokenizerConfig | SavedTokenizerConfig) -> None:
        saved = (
            self.own_config_of(config)
            if isinstance(config, SavedTokenizerConfig)
            else self.config_class(model=asdict(config))
        )
        super().__init__(saved)

    def _build(self) -> None:
        model = self.config.model or {}
        own = self.own_config = build_config(TokenizerConfig, model, "config.json")
        self.likelihood = build_likelihood(
            own.likelihood, own.likelihood_scale, own.channels, own.likelihood_mixtures
        )
        self.quantizer = build_quantizer(own)
        parameters = self.likelihood.parameter_count(own.channels)
        self.encoder, self.decoder = build_networks(
            own, self.quantizer.input_dim, self.quantizer.output_dim, parameters
        )
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def num_codes(self) -> int:
        """Entries of the codebook, of the finest one where they differ; 0 where latents are
        Gaussian."""
        return self.own_config.num_codes if self.own_config.has_codes else 0

    @property
    def latent_dim(self) -> int:
        """Latent dimensions of an image of `image_size`; 0 where there are codes."""
        return self.quantizer.latent_dim if isinstance(self.quantizer, GaussianQuantizer) else 0

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the (finest) code grid of an image of `image_size`."""
        return self.own_config.grid

    @property
    def image_size(self) -> ImageSize:
        """As in the configuration: one number, or height and width where they differ."""
        return self.own_config.image_size

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images that it is for, in pixels."""
        return self.own_config.size

    @property
    def layout(self) -> tuple[Level, ...]:
        """How the codes of an image of `image_size` lie in one stream: level after level, coarse
        ones first; () where latents are Gaussian."""
        return self.quantizer.layout(self.grid)

    @property
    def code_vectors(self) -> Tensor:
        """(sum of K, D): the vector of every code of every level, for models that take the codes
        further."""
        return self.quantizer.vectors().detach()

    def forward(
        self, pixels: Tensor, temperature: float | None = None, *, reencode: bool = False
    ) -> TokenizerOutput:
        """Pixels (B,C,H,W) in [-1,1] through the codes or latents and back; with a `temperature`,
        relaxed or sampled as in training. With `reencode` (`quantizer: vq`), the image of the codes
        is encoded again; the gradient of that reaches the encoder alone."""
        quantized = self.quantizer(self.encoder(pixels.to(self.dtype)), temperature)
        output = TokenizerOutput(self.decoder(quantized.latents.to(self.dtype)), quantized)
        if reencode:
            assert isinstance(self.quantizer, VectorQuantizer)
            image = to_uint8(self.likelihood.image(output.parameters.detach()))
            features = self.encoder(to_model_range(image.contiguous()).to(self.dtype))
            log_q = self.quantizer.log_assignment(features)
            output.reencoding = F.nll_loss(log_q.flatten(0, 2), quantized.codes.flatten())
        return output

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B,C,H,W) in [-1,1] -> codes int64: (B,h,w) of one level, (B,N) of several as
        `layout` says.

        Height and width may be any multiples of the coarsest code's side.

        Raises:
            ValueError: the pixels have other channels, a size that the grid does not divide, or
                another range; or the latents are Gaussian.
        """
        self.require_codes("encode")
        self.check_size(pixels.shape)
        check_model_range(pixels)
        training = self.quantizer.training
        self.quantizer.eval()
        try:
            return self.quantizer.encode(self.encoder(pixels.to(self.dtype)))
        finally:
            self.quantizer.train(training)

    @torch.no_grad()
    def log_assignment(self, pixels: Tensor) -> Tensor | None:
        """Pixels (B,C,H,W) in [-1,1] -> log q(code given image) (B,h,w,K) in nats, where codes are
        sampled in training (`gumbel`, `score_function`, `binary`); None where q is one code.

        Raises:
            ValueError: as `encode`.
        """
        self.require_codes("log_assignment")
        self.check_size(pixels.shape)
        check_model_range(pixels)
        if not self.quantizer.relaxed:
            return None
        return self.quantizer.log_assignment(self.encoder(pixels.to(self.dtype)))

    @torch.no_grad()
    def posterior(self, pixels: Tensor) -> GaussianPosterior:
        """Pixels (B,C,H,W) in [-1,1] -> the posterior of their latents (B,n). The latents of a grid
        are in the order feature, row, column.

        Raises:
            ValueError: the tokenizer has codes, or the pixels do not fit, as in `encode`.
        """
        quantizer = self._gaussian("posterior")
        self.check_size(pixels.shape)
        # Training calls this every step, so a GPU's values are not waited for.
        check_model_range(pixels, read=not pixels.is_cuda)
        return quantizer.posterior(self.encoder(pixels.to(self.dtype)))

    def latent_parameters(self, latents: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Latents (B,n) -> the likelihood's parameters (B,P,H,W), differentiable.

        Args:
            grid: height and width of the grid, for images of another size than `image_size`.

        Raises:
            ValueError: the tokenizer has codes, or the latents have another form than its own.
        """
        quantizer = self._gaussian("latent_parameters")
        grid = grid or self.grid
        size = self.latent_dim if quantizer.is_vector else quantizer.output_dim * math.prod(grid)
        if latents.ndim != 2 or latents.shape[1] != size:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)} and must be (batch, {size})"
            )
        return self.decoder(quantizer.unflatten(latents, grid).to(self.dtype))

    @torch.no_grad()
    def decode_latents(self, latents: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Latents (B,n) -> the most likely pixels (B,C,H,W) in [-1,1]; arguments and errors as in
        `latent_parameters`."""
        return self.likelihood.image(self.latent_parameters(latents, grid)).clamp(-1, 1)

    def require_codes(self, use: str) -> None:
        """Raises ValueError where latents are Gaussian.

        Args:
            use: what needs codes, for the message.
        """
        if not self.own_config.has_codes:
            raise ValueError(
                f"this tokenizer has Gaussian latents, and {use} needs codes; train one with "
                "tokenizer.model.quantizer=vq, or use its latents (in Python: posterior and "
                "decode_latents)"
            )

    def _gaussian(self, use: str) -> GaussianQuantizer:
        """The quantizer, where latents are Gaussian."""
        if not isinstance(self.quantizer, GaussianQuantizer):
            raise ValueError(
                f"this tokenizer has codes (quantizer {self.own_config.quantizer}), and {use} "
                "needs Gaussian latents; use encode and decode, or train a tokenizer with "
                "tokenizer.model.quantizer=gaussian"
            )
        return self.quantizer

    def check_size(self, shape: Sequence[int]) -> None:
        """Raises ValueError for pixels of a shape that this tokenizer cannot encode; names the
        nearest that it can."""
        self.own_config.check_pixels(shape)

    def at_size(self, image_size: ImageSize) -> Self:
        """The same weights for images of another size: itself where that is its own size, else a
        copy. The grid, and so the layout of the codes, follows.

        Raises:
            ValueError: a side is not a multiple of the coarsest code's; or one latent vector stands
                for an image, whose weights are for one size.
        """
        if height_and_width(image_size) == self.size:
            return self
        self.own_config.require_resizable(image_size)
        checked = replace(self.own_config, image_size=image_size).image_size
        # Its other fields stay as they are: the fingerprint covers them.
        values = dict(self.config.model or {}) | {"image_size": checked}
        other = type(self)(self.config_class(model=values))
        other.load_state_dict(self.state_dict())
        return other.to(self.device, self.dtype).train(self.training)

    @torch.no_grad()
    def decode(self, codes: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Codes (B,h,w), or (B,N) of several levels -> the most likely pixels (B,C,H,W) in [-1,1],
        `without_haze`; arguments and errors as in `code_parameters`."""
        self.require_codes("decode")
        return without_haze(self.likelihood.image(self.code_parameters(codes, grid)).clamp(-1, 1))

    def code_parameters(self, codes: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Codes (B,h,w), or (B,N) of several levels -> the likelihood's parameters (B,P,H,W),
        differentiable.

        Args:
            grid: the finest grid's height and width, needed only for flat codes of images of
                another size than `image_size`.

        Raises:
            ValueError: the codes have another form than the tokenizer's, or one is not in its
                level's 0..num_codes-1; or the latents are Gaussian.
        """
        self.require_codes("code_parameters")
        levels = self.quantizer.layout(grid or self.grid)
        if len(levels) > 1:
            expected = f"(batch, {sum(level.length for level in levels)})"
            fits = codes.ndim == 2 and codes.shape[1] == sum(level.length for level in levels)
        else:
            expected = (
                "(batch, height, width)" if grid is None else f"(batch, {grid[0]}, {grid[1]})"
            )
            fits = codes.ndim == 3 and (grid is None or tuple(codes.shape[1:]) == tuple(grid))
        if not fits:
            raise ValueError(f"codes have shape {tuple(codes.shape)} and must be {expected}")
        finest = (grid or self.grid) if len(levels) > 1 else (codes.shape[1], codes.shape[2])
        levels = self.quantizer.layout(finest)
        for number, (part, level) in enumerate(
            zip(codes.flatten(1).split([level.length for level in levels], 1), levels, strict=True),
            1,
        ):
            if part.numel() and not 0 <= int(part.min()) <= int(part.max()) < level.num_codes:
                which = f" of level {number}" if len(levels) > 1 else ""
                raise ValueError(
                    f"codes{which} lie in {int(part.min())}..{int(part.max())} and must lie in "
                    f"0..{level.num_codes - 1}"
                )
        return self.decoder(self.quantizer.embed(codes, finest).to(self.dtype))

    @torch.no_grad()
    def reconstruct(
        self, pixels: Tensor, *, tile: int | None = None, margin: int | None = None
    ) -> Tensor:
        """Pixels (B,C,H,W) in [-1,1] through the codes, or the posterior's mean, and back, of any
        size that the code grid divides.

        With `tile`, larger images go through in pieces of that many pixels per side, each with
        `margin` pixels around it. By default these are 16 codes, more than a pixel of the default
        networks depends on.

        Raises:
            ValueError: as `encode`.
        """
        self.check_size(pixels.shape)

        def through(piece: Tensor) -> Tensor:
            grid = (
                piece.shape[2] // self.own_config.downsample_factor,
                piece.shape[3] // self.own_config.downsample_factor,
            )
            if not self.own_config.has_codes:
                return self.decode_latents(self.posterior(piece).mean, grid)
            return self.decode(self.encode(piece), grid)

        if tile is None or max(pixels.shape[2:]) <= tile:
            return through(pixels)
        check_model_range(pixels)  # all of them: a tile alone may be bright
        return by_tiles(
            pixels,
            through,
            tile=tile,
            margin=16 * self.own_config.stride if margin is None else margin,
            stride=self.own_config.stride,
        )

    def to_codes(
        self, images: Sequence[Image.Image], value_range: ValueRange | None = None
    ) -> Tensor:
        """Images of one size -> codes, as `encode`. `value_range` is that of images with more than
        8 bits per value, as in `to_rgb`. Transparency is kept by a tokenizer of four channels, and
        laid on white for others."""
        values = from_pil(images, value_range, self.own_config.channels)
        return self.encode(to_model_range(values).to(self.device))

    def to_images(self, codes: Tensor, grid: tuple[int, int] | None = None) -> list[Image.Image]:
        """Codes -> images, as `decode`: RGBA of a tokenizer of four channels, otherwise RGB."""
        return to_pil(to_uint8(self.decode(codes.to(self.device), grid)))

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The kernels of the networks, which optimizers for matrices may step; a codebook is not
        among them."""
        modules = (
            m for network in (self.encoder, self.decoder, self.quantizer) for m in network.modules()
        )
        return [m.weight for m in modules if isinstance(m, nn.Conv2d | nn.Linear)]  # type: ignore[misc]

    def compile_networks(self) -> None:
        """Compiles encoder and decoder in place; parameter names stay as they are."""
        self.encoder.compile(dynamic=False)
        self.decoder.compile(dynamic=False)

    @classmethod
    def check_stored(cls, config: SavedTokenizerConfig, stored: Mapping[str, StoredTensor]) -> None:
        """Raises ValueError where there are more layers than stored tensors, or for images far
        beyond those of any tokenizer."""
        own = build_config(TokenizerConfig, config.model, "its model section")
        depths = (
            own.encoder_depth,
            own.decoder_depth,
            own.vqgan.blocks * len(own.vqgan.multipliers),
            own.hierarchical.levels,
        )
        refuse_larger("layers", max(depths), len(stored))
        refuse_larger("pixels along a side", own.downsample_factor * max(own.grid), _LARGEST_SIDE)

    @classmethod
    def from_external(cls, path: str | Path, kind: Kind) -> Self:
        """A tokenizer with published weights of another project, from a local file; see
        `convert_checkpoints.load_external` for the kinds of files.

        Raises:
            ValueError: the file is unsafe or corrupted, or holds another architecture's weights;
                names the first keys that differ.
            FileNotFoundError: there is no such file.
        """
        config, weights = load_external(path, kind)
        tokenizer = cls(config)
        tokenizer.load_state_dict(
            align_state_dict(config, weights, tokenizer.state_dict(), str(path))
        )
        if isinstance(tokenizer.quantizer, VectorQuantizer):
            # Or training would start by replacing the codebook.
            tokenizer.quantizer.initialized.fill_(True)
        return tokenizer.eval()
