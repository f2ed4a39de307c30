"""What a tokenizer is made of and what it minimises. Knows sizes and their relations; knows nothing of tensors or data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Level:
    """One code book's share of a picture's codes: a grid, read row by row."""

    grid: tuple[int, int]
    """Height and width, in codes."""
    num_codes: int
    """Entries of this level's codebook."""


@dataclass(kw_only=True)
class VectorOptions:
    """Options of `quantizer: vq` (VQ-VAE)."""

    codebook: Literal["ema", "gradient"] = "ema"
    """How the codebook learns: moving averages of the vectors assigned to each code, or the gradient of the codebook loss."""
    decay: float = 0.99
    """Decay of the moving averages, a step (`ema`), and of the usage counts (both)."""
    commitment: float = 0.25
    """Weight of the commitment loss, beta in the paper."""
    normalize: bool = True
    """Put vectors and codes on a sphere, so that the nearest code is the most similar direction (ViT-VQGAN)."""
    restart_below: float = 0.1
    """A code used less than this share of the average use is dead and restarts at a vector of the batch; 0 never restarts."""
    restart_every: int = 10
    """Steps between two looks for dead codes."""


@dataclass(kw_only=True)
class GumbelOptions:
    """Options of `quantizer: gumbel` (dVAE)."""

    straight_through: bool = False
    """Feed the decoder hard one-hot codes while training, with the relaxed ones' gradient."""


@dataclass(kw_only=True)
class TokenizerConfig:
    """Architecture, quantizer and likelihood (`tokenizer.model` in a YAML)."""

    image_size: int = 64
    """Height and width of a picture, in pixels."""
    channels: int = 3
    """Colours of a pixel."""
    factor: int = 8
    """Pixels a code covers along each axis; a power of two."""
    width: int = 192
    """Channels at the code grid's resolution; each finer resolution has half as many, 32 at least."""
    encoder_depth: int = 1
    """Residual blocks at each resolution of the encoder."""
    encoder_kernel: Literal[1, 3] = 1
    """1: a code sees the pixels it covers alone, which makes it easiest for a prior to explain; 3: its surroundings too, which makes
    pictures a little sharper."""
    decoder_depth: int = 3
    """Residual blocks at each resolution of the decoder, which has the harder task."""
    quantizer: Literal["vq", "gumbel"] = "vq"
    """How features become codes."""
    num_codes: int = 1024
    """Entries of the codebook."""
    code_dim: int = 16
    """Features of a code's vector."""
    vq: VectorOptions = field(default_factory=VectorOptions)
    """Options of `quantizer: vq`."""
    gumbel: GumbelOptions = field(default_factory=GumbelOptions)
    """Options of `quantizer: gumbel`."""
    likelihood: Literal["l2", "l1", "logit_laplace"] = "l2"
    """p(picture given codes): Gaussian, Laplace, or DALL-E's logit-Laplace."""
    likelihood_scale: float = 0.1
    """Deviation of the Gaussian or scale of the Laplace, in units of the model's range [-1, 1] (logit-Laplace learns its own)."""

    def __post_init__(self) -> None:
        problems = []
        for name in ("image_size", "channels", "width", "encoder_depth", "decoder_depth", "code_dim"):
            if getattr(self, name) < 1:
                problems.append(f"tokenizer.model.{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_codes < 2:
            problems.append(f"tokenizer.model.num_codes is {self.num_codes}; it must be at least 2")
        if self.factor < 1 or self.factor & (self.factor - 1):
            problems.append(f"tokenizer.model.factor is {self.factor}; it must be a power of two (8)")
        elif self.image_size % self.factor:
            near = max(round(self.image_size / self.factor), 1) * self.factor
            problems.append(
                f"tokenizer.model.image_size {self.image_size} is not a multiple of tokenizer.model.factor {self.factor}; "
                f"the nearest size that fits is {near}"
            )
        if self.width % 16:
            problems.append(f"tokenizer.model.width is {self.width}; it must be a multiple of 16")
        if self.likelihood_scale <= 0:
            problems.append(f"tokenizer.model.likelihood_scale is {self.likelihood_scale}; it must be above 0")
        if not 0 < self.vq.decay < 1 or self.vq.commitment < 0 or self.vq.restart_every < 1 or not 0 <= self.vq.restart_below < 1:
            problems.append(
                "tokenizer.model.vq needs decay in (0, 1), commitment of 0 or more, restart_below in [0, 1) and restart_every of "
                f"at least 1; given were {self.vq}"
            )
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the code grid."""
        return self.image_size // self.factor, self.image_size // self.factor

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels at each resolution, finest first: after a patch of min(factor, 4) pixels, down to the code grid."""
        halvings = max(int(math.log2(self.factor)) - 2, 0)
        return tuple(max(self.width >> i, 32) for i in reversed(range(halvings + 1)))


@dataclass(kw_only=True)
class ObjectiveConfig:
    """What stage 1 minimises (`tokenizer.objective` in a YAML). Steps count from the start of training."""

    kl_weight: float = 1.0
    """Weight of the KL to the uniform prior (`gumbel`), in the units of the likelihood: 1 is the evidence lower bound."""
    kl_ramp_steps: int = 1000
    """Steps over which the KL's weight rises from 0 (cosine, DALL-E)."""
    temperature_start: float = 1.0
    """Temperature of the Gumbel-softmax at the first step."""
    temperature_end: float = 1 / 16
    """Temperature after the annealing (DALL-E: 1/16)."""
    temperature_steps: int = 2000
    """Steps over which the temperature falls (cosine)."""

    def __post_init__(self) -> None:
        problems = []
        if self.kl_weight < 0:
            problems.append(f"tokenizer.objective.kl_weight is {self.kl_weight}; it must be 0 or more")
        for name in ("temperature_start", "temperature_end"):
            if getattr(self, name) <= 0:
                problems.append(f"tokenizer.objective.{name} is {getattr(self, name)}; it must be above 0")
        for name in ("kl_ramp_steps", "temperature_steps"):
            if getattr(self, name) < 0:
                problems.append(f"tokenizer.objective.{name} is {getattr(self, name)}; it must be 0 or more")
        if problems:
            raise ValueError("; ".join(problems))
