"""What a tokenizer is made of and what it minimises. Knows sizes and their relations; knows nothing
of tensors or data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from stage1_tokenizer.options import (
    LARGEST_CODE,
    MOST_LEVELS,
    OWNERS,
    STEP,
    Architecture,
    BinaryOptions,
    DiscriminatorOptions,
    FsqOptions,
    GaussianOptions,
    GumbelOptions,
    HierarchicalOptions,
    LikelihoodName,
    PerceptualOptions,
    QuantizerName,
    ResidualOptions,
    ScoreFunctionOptions,
    SignOptions,
    VectorOptions,
    VqganOptions,
    failed,
    out_of_range,
)


def nearest_multiple(size: int, step: int) -> int:
    """The multiple of `step` nearest to `size`, one step at least."""
    return max(round(size / step), 1) * step


ImageSize = int | tuple[int, int]
"""Height and width, in pixels; one number where they are equal."""


def height_and_width(image_size: int | Sequence[int]) -> tuple[int, int]:
    """Both sides of an `ImageSize`.

    Raises:
        ValueError: it is neither one number nor two.
    """
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        raise ValueError(
            f"image_size is {list(sides)}; it must be one number, or [height, width] in pixels"
        )
    return sides[0], sides[1]


@dataclass(frozen=True, kw_only=True)
class Level:
    """One code book's share of an image's codes: a grid, read row by row."""

    grid: tuple[int, int]
    """Height and width, in codes."""
    num_codes: int
    """Entries of this level's codebook."""

    @property
    def length(self) -> int:
        """Codes of an image at this level."""
        return math.prod(self.grid)


@dataclass(kw_only=True)
class TokenizerConfig:
    """Architecture, quantizer and likelihood (`tokenizer.model` in a YAML)."""

    image_size: ImageSize = 64
    """Height and width of an image, in pixels; `[height, width]` where they differ."""
    channels: int = 3
    """Values of a pixel: 3 for RGB; 4 keeps transparency, as premultiplied RGBA."""
    downsample_factor: int = 8
    """Pixels a code covers along each axis; a power of two."""
    width: int = 192
    """Channels at the code grid's resolution; each finer resolution has half as many, 32 at
    least."""
    encoder_depth: int = 1
    """Residual blocks at each resolution of the encoder; in a transformer, its blocks."""
    encoder_kernel: Literal[1, 3] = 1
    """1: a code sees the pixels it covers alone, which makes it easiest for a prior to explain; 3:
    its surroundings too, which makes images a little sharper."""
    decoder_depth: int = 3
    """The same of the decoder, which has the harder task."""
    architecture: Architecture = "patch"
    """Networks: convolutions over folded patches; a transformer over patches; DALL-E's dVAE
    (`width` is its widest, 8 times its base at factor 8); or VQ-GAN's."""
    attention: bool = False
    """Self-attention at the codes' resolution (`architecture: patch`)."""
    vqgan: VqganOptions = field(default_factory=VqganOptions)
    """Sizes of `architecture: vqgan`, in place of width and depths. The logits of categorical
    quantizers come from `code_dim` features there."""
    quantizer: QuantizerName = "vq"
    """How features become codes."""
    num_codes: int = 1024
    """Entries of the codebook (of each one where there are several). `gaussian` has no codes,
    whatever this is."""
    code_dim: int = 16
    """Features of a code's vector. `binary`, `lfq` and `bsq` have one for each bit of `num_codes`
    and `fsq` one for each of its levels, whatever this is. With `gaussian`, features of a position
    of the grid."""
    vq: VectorOptions = field(default_factory=VectorOptions)
    """Options of `quantizer: vq`, `residual` and `hierarchical`."""
    gumbel: GumbelOptions = field(default_factory=GumbelOptions)
    """Options of `quantizer: gumbel`."""
    binary: BinaryOptions = field(default_factory=BinaryOptions)
    """Options of `quantizer: binary`."""
    score_function: ScoreFunctionOptions = field(default_factory=ScoreFunctionOptions)
    """Options of `quantizer: score_function`."""
    fsq: FsqOptions = field(default_factory=FsqOptions)
    """Options of `quantizer: fsq`."""
    sign: SignOptions = field(default_factory=SignOptions)
    """Options of `quantizer: lfq` and `bsq`."""
    residual: ResidualOptions = field(default_factory=ResidualOptions)
    """Options of `quantizer: residual`."""
    hierarchical: HierarchicalOptions = field(default_factory=HierarchicalOptions)
    """Options of `quantizer: hierarchical`."""
    gaussian: GaussianOptions = field(default_factory=GaussianOptions)
    """Options of `quantizer: gaussian`."""
    likelihood: LikelihoodName = "l2"
    """p(image given codes): a Gaussian whose standard deviation is fixed, the best of each image
    (highest PSNR) or learned per pixel; a Laplace; DALL-E's logit-Laplace; PixelCNN++'s discretized
    logistic (fewest bits per dimension); or a coin per dimension."""
    likelihood_scale: float = 0.1
    """Deviation of the Gaussian or scale of the Laplace, in units of the model's range [-1, 1]; the
    least scale that logit-Laplace may learn, in units of its logit (the larger, the less flat
    backgrounds outweigh the rest); the others have none."""
    likelihood_mixtures: int = 1
    """Components of `discretized_logistic`: logistics that are mixed at each pixel."""

    def __post_init__(self) -> None:
        height, width = height_and_width(self.image_size)
        self.image_size = height if height == width else (height, width)
        problems = [
            f"tokenizer.model.{name} is {getattr(self, name)}; it must be at least 1"
            for name in ("channels", "width", "encoder_depth", "decoder_depth", "code_dim")
            if getattr(self, name) < 1
        ]
        if min(self.size) < 1:
            problems.append(
                f"tokenizer.model.image_size is {self._given_size}; it must be at least 1"
            )
        if self.downsample_factor < 1 or self.downsample_factor & (self.downsample_factor - 1):
            problems.append(
                f"tokenizer.model.downsample_factor is {self.downsample_factor}; it must be a "
                "power of two (8)"
            )
        elif height % self.stride or width % self.stride:
            needed = (
                f"{self.stride}, which tokenizer.model.downsample_factor "
                f"{self.downsample_factor} needs"
            )
            if self.quantizer == "hierarchical":
                needed += f" with tokenizer.model.hierarchical.levels {self.hierarchical.levels}"
            nearest = [nearest_multiple(side, self.stride) for side in self.size]
            problems.append(
                f"tokenizer.model.image_size {self._given_size} is not a multiple of {needed}; the "
                f"nearest size that fits is {nearest[0] if height == width else nearest}"
            )
        # Well below the step of 8-bit images a density of fixed scale gives fewer than 0 bits per
        # dimension.
        least = STEP if self.likelihood in ("l2", "l1") else 0.0
        hint = f"{least:.4f}, the step of 8-bit images (or choose likelihood calibrated_l2)"
        problems += out_of_range(self, "tokenizer.model", "[1, inf]", "likelihood_mixtures")
        problems += failed(
            (
                self.likelihood_mixtures > 1 and self.likelihood != "discretized_logistic",
                f"tokenizer.model.likelihood_mixtures is {self.likelihood_mixtures}, which belongs "
                "to likelihood discretized_logistic, and tokenizer.model.likelihood is "
                f"{self.likelihood}; leave it out or choose that likelihood",
            ),
            (
                self.width % 16 > 0,
                f"tokenizer.model.width is {self.width}; it must be a multiple of 16",
            ),
            (
                self.likelihood_scale <= least,
                f"tokenizer.model.likelihood_scale is {self.likelihood_scale}; it must be above "
                f"{hint if least else 0}",
            ),
        )
        problems += self._network_problems() + self._quantizer_problems()
        if problems:
            raise ValueError("; ".join(problems))

    def _network_problems(self) -> list[str]:
        architecture = self.architecture
        factor = self.downsample_factor
        sizes = self.vqgan.problems()
        made = 2 ** (len(self.vqgan.multipliers) - 1)
        return sizes + failed(
            (
                architecture != "patch" and (self.attention or self.encoder_kernel != 1),
                "tokenizer.model.attention and encoder_kernel belong to architecture patch, and "
                f"tokenizer.model.architecture is {architecture}; leave them out",
            ),
            (
                architecture != "vqgan" and self.vqgan != VqganOptions(),
                "tokenizer.model.vqgan belongs to architecture vqgan, and "
                f"tokenizer.model.architecture is {architecture}; remove the section",
            ),
            (
                architecture == "vqgan" and not sizes and factor != made,
                f"tokenizer.model.vqgan.multipliers are {len(self.vqgan.multipliers)}, which makes "
                f"a factor of {made}, and tokenizer.model.downsample_factor is {factor}; make them "
                "agree",
            ),
            (
                architecture == "transformer" and self.width % 32 > 0,
                f"tokenizer.model.width is {self.width}; architecture transformer needs a multiple "
                "of 32",
            ),
            (
                architecture == "dalle" and factor >= 1 and self.width % (4 * factor) > 0,
                f"tokenizer.model.width is {self.width}; architecture dalle needs 4 times factor "
                f"{factor} or a multiple of that",
            ),
        )

    def _quantizer_problems(self) -> list[str]:
        problems: list[str] = []
        for section, owners in OWNERS.items():
            options = getattr(self, section)
            problems += options.problems()
            if self.quantizer not in owners and options != type(options)():
                chosen = {
                    f.name: getattr(options, f.name)
                    for f in fields(options)
                    if getattr(options, f.name) != f.default
                }
                problems.append(
                    f"tokenizer.model.{section} is {chosen}, which belongs to quantizer "
                    f"{' or '.join(owners)}, and "
                    f"tokenizer.model.quantizer is {self.quantizer}; remove the section or choose "
                    "that quantizer"
                )
        if not 2 <= self.num_codes <= LARGEST_CODE:
            problems.append(
                f"tokenizer.model.num_codes is {self.num_codes}; it must be at least 2, and at "
                f"most {LARGEST_CODE} (32 bits)"
            )
        elif self.quantizer in ("binary", "lfq", "bsq") and self.num_codes & (self.num_codes - 1):
            problems.append(
                f"tokenizer.model.num_codes is {self.num_codes} and the codes of {self.quantizer} "
                "are bits, so it must be a power of two; "
                f"the nearest is {2 ** round(math.log2(self.num_codes))}"
            )
        elif self.quantizer == "fsq" and math.prod(self.fsq.levels) != self.num_codes:
            problems.append(
                f"tokenizer.model.fsq.levels {list(self.fsq.levels)} make "
                f"{math.prod(self.fsq.levels)} codes and "
                f"tokenizer.model.num_codes is {self.num_codes}; make them agree"
            )
        return problems

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image, in pixels."""
        return height_and_width(self.image_size)

    @property
    def _given_size(self) -> int | list[int]:
        """`image_size` as a YAML has it, for messages."""
        return self.image_size if isinstance(self.image_size, int) else list(self.image_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the code grid."""
        height, width = self.size
        return height // self.downsample_factor, width // self.downsample_factor

    @property
    def stride(self) -> int:
        """Pixels a code of the coarsest level covers along each axis; an image's sides are
        multiples of it."""
        return (
            self.downsample_factor * 2 ** (min(max(self.hierarchical.levels, 1), MOST_LEVELS) - 1)
            if self.quantizer == "hierarchical"
            else self.downsample_factor
        )

    @property
    def has_codes(self) -> bool:
        """Whether images become codes; otherwise they become Gaussian latents."""
        return self.quantizer != "gaussian"

    @property
    def fixes_size(self) -> bool:
        """Whether all images must have `image_size`."""
        return not self.has_codes and self.gaussian.latents == "vector"

    def check_pixels(self, shape: Sequence[int]) -> None:
        """Raises ValueError for pixels of a shape that cannot be encoded; names the nearest that
        can."""
        if len(shape) != 4 or shape[1] != self.channels:
            last = len(shape) == 4 and shape[3] == self.channels
            hint = "; pixels.permute(0, 3, 1, 2) puts channels first" if last else ""
            raise ValueError(
                f"pixels have shape {tuple(shape)} and must be (batch, {self.channels}, height, "
                f"width){hint}"
            )
        stride = self.stride
        height, width = shape[2:]
        if not height or not width or height % stride or width % stride:
            raise ValueError(
                f"pixels are {width}x{height} (width x height) and both must be multiples of "
                f"{stride}; the nearest that fits is "
                f"{nearest_multiple(width, stride)}x{nearest_multiple(height, stride)}, crop or "
                "resize to it first"
            )
        if self.fixes_size and (height, width) != self.size:
            raise ValueError(
                f"pixels are {width}x{height} (width x height) and this tokenizer's one latent "
                f"vector is for {self.size[1]}x{self.size[0]}; crop or resize to it first"
            )

    def require_resizable(self, image_size: ImageSize) -> None:
        """Raises ValueError where trained weights are for one size, and it is not this one."""
        size = height_and_width(image_size)
        if self.fixes_size and size != self.size:
            raise ValueError(
                f"the tokenizer's one latent vector is for images of {self.size[1]}x{self.size[0]} "
                f"(width x height), and {size[1]}x{size[0]} are asked for; set data.image_size="
                f"{self._given_size}, or train another tokenizer with "
                "tokenizer.model.gaussian.latents=grid"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels at each resolution, finest first: after a patch of min(factor, 4) pixels, down
        to the code grid."""
        halvings = max(int(math.log2(self.downsample_factor)) - 2, 0)
        return tuple(max(self.width >> i, 32) for i in reversed(range(halvings + 1)))


@dataclass(kw_only=True)
class ObjectiveConfig:
    """What stage 1 minimises (`tokenizer.objective` in a YAML). Steps count from the start of
    training."""

    kl_weight: float = 1.0
    """Weight of the KL to the uniform prior (`gumbel`, `binary`, `score_function`) or to N(0, I)
    (`gaussian`, where it is beta of the beta-VAE), in the units of the likelihood. At 1 the loss is
    the negative evidence lower bound, if `diversity`, `gaussian.free_bits`, `perceptual.weight` and
    `discriminator.weight` are 0; relaxed codes approximate it."""
    kl_ramp_steps: int = 1000
    """Steps over which the KL's weight rises from 0 (cosine, DALL-E): the KL warm-up of VAEs."""
    temperature_start: float = 1.0
    """Temperature of the relaxation (`gumbel`, `binary`) at the first step."""
    temperature_end: float = 1 / 16
    """Temperature after the annealing (DALL-E: 1/16)."""
    temperature_steps: int = 2000
    """Steps over which the temperature falls (cosine)."""
    reencoding_weight: float = 0.0
    """Weight of the negative log-probability of each code after its image is encoded again, in nats
    per code (`vq`). Above 0, more codes survive decoding and encoding, and a step takes one more
    pass of the encoder."""
    perceptual: PerceptualOptions = field(default_factory=PerceptualOptions)
    """A distance of how images look."""
    discriminator: DiscriminatorOptions = field(default_factory=DiscriminatorOptions)
    """A discriminator (VQ-GAN)."""

    def __post_init__(self) -> None:
        problems = [
            f"tokenizer.objective.{name} is {getattr(self, name)}; it must be 0 or more"
            for name in ("kl_weight", "kl_ramp_steps", "temperature_steps", "reencoding_weight")
            if getattr(self, name) < 0
        ]
        problems += [
            f"tokenizer.objective.{name} is {getattr(self, name)}; it must be above 0"
            for name in ("temperature_start", "temperature_end")
            if getattr(self, name) <= 0
        ]
        problems += self.perceptual.problems() + self.discriminator.problems()
        if problems:
            raise ValueError("; ".join(problems))


def joint_problems(model: Mapping[str, Any], objective: Mapping[str, Any]) -> list[str]:
    """What is wrong between a `TokenizerConfig` and an `ObjectiveConfig`, both as plain values."""
    problems = []
    if objective["reencoding_weight"] and model["quantizer"] != "vq":
        problems.append(
            f"tokenizer.objective.reencoding_weight is {objective['reencoding_weight']:g}, which "
            f"needs tokenizer.model.quantizer vq; it is {model['quantizer']}, so set it to 0"
        )
    discriminator = objective["discriminator"]
    heats = {name: objective[name] for name in ("temperature_start", "temperature_end")}
    if (
        discriminator["weight"]
        and discriminator["layers"] >= 1
        and min(height_and_width(model["image_size"])) >> discriminator["layers"] < 3
    ):
        problems.append(
            f"tokenizer.objective.discriminator.layers is {discriminator['layers']}, which leaves "
            "no patch of images of "
            f"{min(height_and_width(model['image_size']))} pixels; set it lower"
        )
    if (
        model["quantizer"] == "binary"
        and model["binary"]["smoothing"] in ("power_pair", "two_sided_power")
        and max(heats.values()) >= 1
    ):
        worst = max(heats, key=lambda name: heats[name])
        problems.append(
            f"tokenizer.objective.{worst} is {heats[worst]}, at which "
            f"tokenizer.model.binary.smoothing {model['binary']['smoothing']} carries nothing of "
            "a bit; set it below 1 (start at 0.2 and end at 0.1), or choose exponential_pair"
        )
    if (
        model["quantizer"] == "gumbel"
        and model["gumbel"]["gradient"] == "reinmax"
        and min(heats.values()) < 1
    ):
        worst = min(heats, key=lambda name: heats[name])
        problems.append(
            f"tokenizer.objective.{worst} is {heats[worst]:g}, and tokenizer.model.gumbel.gradient "
            "reinmax loses its gradient below 1; "
            "set temperature_start and temperature_end to 1"
        )
    return problems
