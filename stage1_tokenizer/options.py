"""Options of each quantizer: a section of `tokenizer.model` each, read by the quantizers that
`OWNERS` names. Knows no tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

QuantizerName = Literal[
    "vq",
    "gumbel",
    "binary",
    "score_function",
    "fsq",
    "lfq",
    "bsq",
    "residual",
    "hierarchical",
    "gaussian",
]
STEP = 2 / 255
"""Between neighbours among the 256 values of 8-bit images, in the model's range [-1, 1]."""
LARGEST_CODE = 2**31 - 1
"""Codes are stored as 32-bit integers."""
MOST_LEVELS = 16
"""Grids of `quantizer: hierarchical`, each of which halves the one before."""
Architecture = Literal["patch", "transformer", "dalle", "vqgan"]
LikelihoodName = Literal[
    "l2", "calibrated_l2", "learned_l2", "l1", "logit_laplace", "discretized_logistic", "bernoulli"
]
OWNERS: dict[str, tuple[QuantizerName, ...]] = {
    "vq": ("vq", "residual", "hierarchical"),
    "gumbel": ("gumbel",),
    "binary": ("binary",),
    "score_function": ("score_function",),
    "fsq": ("fsq",),
    "sign": ("lfq", "bsq"),
    "residual": ("residual",),
    "hierarchical": ("hierarchical",),
    "gaussian": ("gaussian",),
}


def failed(*checks: tuple[bool, str]) -> list[str]:
    """The messages of those checks (whether a value is wrong, message) that fail."""
    return [message for wrong, message in checks if wrong]


def out_of_range(options: object, section: str, interval: str, *names: str) -> list[str]:
    """A message for each of these fields that is outside of an interval, as in "[0, 1)", or
    "[1, inf]", which is "at least 1"."""
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    least = low if interval[0] == "[" else math.nextafter(low, math.inf)
    most = high if interval[-1] == "]" else math.nextafter(high, -math.inf)
    needed = f"in {interval}"
    if high == math.inf:
        needed = f"above {low:g}" if interval[0] == "(" else f"at least {low:g}"
    values = {name: getattr(options, name) for name in names}
    return [
        f"{section}.{name} is {value}; it must be {needed.replace('at least 0', '0 or more')}"
        for name, value in values.items()
        if not least <= value <= most
    ]


@dataclass(kw_only=True)
class VqganOptions:
    """Sizes of `architecture: vqgan`, which has its own in place of width and depths."""

    channels: int = 128
    """Channels at the image's own resolution, before the multipliers."""
    multipliers: tuple[int, ...] = (1, 1, 2, 4)
    """Multiples of `channels` at each resolution, finest first; `downsample_factor` is 2 to the
    power of their number less one."""
    blocks: int = 2
    """Residual blocks at each resolution of the encoder; the decoder has one more."""
    latent_channels: int = 256
    """Channels at the codes' resolution, before and after the 1x1 convolutions around the
    quantizer."""
    attention: bool = True
    """Attention after each block of the lowest resolution; in the middle there always is."""

    def __post_init__(self) -> None:
        self.multipliers = tuple(self.multipliers)  # JSON and YAML know lists only

    def problems(self) -> list[str]:
        section = "tokenizer.model.vqgan"
        return out_of_range(self, section, "[1, inf]", "blocks", "latent_channels") + failed(
            (
                self.channels < 1 or self.channels % 32 > 0,
                f"{section}.channels is {self.channels}; it must be a multiple of 32, at least 32",
            ),
            (
                min(self.multipliers, default=0) < 1,
                f"{section}.multipliers is {list(self.multipliers)}; it must be a list of numbers "
                "of at least 1, one for each resolution",
            ),
        )


@dataclass(kw_only=True)
class PerceptualOptions:
    """How different real and decoded images look, in addition to their likelihood
    (`tokenizer.objective.perceptual`)."""

    weight: float = 0.0
    """Weight of the distance against nats per dimension; 0 leaves it out."""
    distance: str = "ms_ssim"
    """`ms_ssim` (1 - MS-SSIM, nothing to load), or a vision model of transformers by its folder or
    its name on the Hub."""
    layers: tuple[int, ...] = ()
    """Hidden states of that model to compare, 0 being the embedding; all others where empty."""

    def __post_init__(self) -> None:
        self.layers = tuple(self.layers)  # JSON and YAML know lists only

    def problems(self) -> list[str]:
        section = "tokenizer.objective.perceptual"
        misplaced = min(self.layers, default=0) < 0 or self.distance == "ms_ssim"
        return out_of_range(self, section, "[0, inf]", "weight") + failed(
            (
                bool(self.layers) and misplaced,
                f"{section}.layers are {list(self.layers)}; they are hidden "
                f"states, from 0, of a model that perceptual.distance names (now {self.distance})",
            )
        )


@dataclass(kw_only=True)
class DiscriminatorOptions:
    """A discriminator that the decoder learns to mislead (`tokenizer.objective.discriminator`)."""

    weight: float = 0.0
    """Weight of the decoder's loss against the discriminator; 0 leaves it out."""
    start: int = 1000
    """First step with it: earlier, real and decoded images differ too much."""
    adaptive: bool = True
    """Scale the weight so that at 1 the discriminator moves the image as much as its likelihood
    does."""
    lecam: float = 0.0
    """Weight of the LeCam penalty on the discriminator, which keeps it from memorising little
    data."""
    width: int = 64
    """Channels of the discriminator's first layer, a multiple of 16."""
    layers: int = 2
    """Further layers of the discriminator: each but the last halves the resolution (3 in PatchGAN,
    for 256 pixels)."""

    def problems(self) -> list[str]:
        section = "tokenizer.objective.discriminator"
        return [
            *out_of_range(self, section, "[0, inf]", "weight", "start", "lecam"),
            *out_of_range(self, section, "[1, inf]", "layers"),
            *failed(
                (
                    self.width < 1 or self.width % 16 > 0,
                    f"{section}.width is {self.width}; it must be a multiple of 16, at least 16",
                )
            ),
        ]


@dataclass(kw_only=True)
class VectorOptions:
    """Options of `quantizer: vq` (VQ-VAE), and of the codebooks inside `residual` and
    `hierarchical`."""

    codebook: Literal["ema", "gradient", "linear"] = "ema"
    """How the codebook learns: moving averages of the vectors assigned to each code; the gradient
    of the codebook loss; or that gradient through one linear map over a frozen codebook, which
    moves all codes at once (SimVQ)."""
    gradient: Literal["straight_through", "rotation"] = "straight_through"
    """The encoder's gradient: the decoder's, or the decoder's rotated as the vector is rotated onto
    its code."""
    decay: float = 0.99
    """Decay per step of the moving averages (`ema`), and of the usage counts (all)."""
    commitment: float = 0.25
    """Weight of the commitment loss, beta in the paper. The loss is a mean over vectors and their
    features, and the likelihood one over the dimensions of an image. In eq. 3, which sums, this
    weight is C H W / (h w D) times as large (D is `code_dim`)."""
    normalize: bool = True
    """Put vectors and codes on a sphere, so that the nearest code is the most similar direction
    (ViT-VQGAN). In `residual` the vectors alone: what is left of them after the first code lies on
    no sphere."""
    entropy_weight: float = 0.0
    """Weight of the entropy term: each vector certain of its code, all codes used by the batch."""
    kmeans_iterations: int = 0
    """Rounds of k-means over the first batch, whose centres start the codebook; with 0, vectors of
    the batch do."""
    dead_code_threshold: float = 0.1
    """A code used less than this fraction of the average is dead and restarts at a vector of the
    batch; 0 never restarts. It is all that moves a frozen codebook (`linear`)."""
    dead_code_check_every: int = 10
    """Steps between two searches for dead codes."""

    def problems(self) -> list[str]:
        section = "tokenizer.model.vq"
        weights = ("commitment", "entropy_weight", "kmeans_iterations")
        return [
            *out_of_range(self, section, "(0, 1)", "decay"),
            *out_of_range(self, section, "[0, inf]", *weights),
            *out_of_range(self, section, "[0, 1)", "dead_code_threshold"),
            *out_of_range(self, section, "[1, inf]", "dead_code_check_every"),
        ]


@dataclass(kw_only=True)
class GumbelOptions:
    """Options of `quantizer: gumbel` (dVAE)."""

    gradient: Literal["relaxed", "straight_through", "reinmax"] = "relaxed"
    """What the decoder sees while training, and the gradient to it: relaxed codes and their own;
    sampled one-hot codes with the relaxed ones' gradient; or sampled one-hot codes with a
    second-order estimate (ReinMax, for which a temperature of 1 or more is meant)."""

    diversity: float = 2.0
    """Weight of the KL of the batch's mean posterior to the uniform one (nats per code), which
    keeps codes from falling out of use."""

    def problems(self) -> list[str]:
        return out_of_range(self, "tokenizer.model.gumbel", "[0, inf]", "diversity")


@dataclass(kw_only=True)
class BinaryOptions:
    """Options of `quantizer: binary` (discrete VAE with Bernoulli latents); the inverse temperature
    is 1 / temperature."""

    smoothing: Literal[
        "spike_exponential",
        "spike_power",
        "spike_root",
        "exponential_pair",
        "power_pair",
        "two_sided_power",
    ] = "power_pair"
    """Continuous stand-in of a bit while training: a spike at 0 and an exponential (DVAE), a power
    function or a root; a pair of exponentials (DVAE++) or power functions (DVAE#), which are flat
    at 0 and 1; or a two-sided power function, also flat, with which the KL is that of hard bits.
    `power_pair` and `two_sided_power` need temperatures below 1: at 1 they carry nothing of the
    bit."""
    diversity: float = 1.0
    """As in `gumbel`, over whole codes: a table of vectors times codes per step, so 0 for
    vocabularies beyond some 16,000."""

    def problems(self) -> list[str]:
        return out_of_range(self, "tokenizer.model.binary", "[0, inf]", "diversity")


@dataclass(kw_only=True)
class ScoreFunctionOptions:
    """Options of `quantizer: score_function` (REINFORCE)."""

    credit_assignment: Literal["image", "neighbourhood"] = "neighbourhood"
    """What a code's cost is: that of the whole image, which is unbiased; or of the pixels at its
    place and the eight around it, which varies far less and is biased: a code also moves pixels
    farther away."""
    baseline_decay: float = 0.9
    """Decay per step of the running mean that is subtracted from the cost; 0 takes the mean of the
    step before."""
    diversity: float = 3.0
    """As in `gumbel`."""
    inverse_temperature: float = 8.0
    """Inverse temperature of the posterior whose mean `diversity` takes: while the noisy gradient
    leaves posteriors soft, their mean is even though few codes are ever the likeliest."""

    def problems(self) -> list[str]:
        section = "tokenizer.model.score_function"
        return [
            *out_of_range(self, section, "[0, 1)", "baseline_decay"),
            *out_of_range(self, section, "[0, inf]", "diversity"),
            *out_of_range(self, section, "(0, inf]", "inverse_temperature"),
        ]


@dataclass(kw_only=True)
class FsqOptions:
    """Options of `quantizer: fsq` (finite scalar quantization)."""

    levels: tuple[int, ...] = (4, 4, 4, 4, 4)
    """Values of each feature; their product is `num_codes`."""

    def __post_init__(self) -> None:
        self.levels = tuple(self.levels)  # JSON and YAML know lists only

    def problems(self) -> list[str]:
        message = (
            f"tokenizer.model.fsq.levels is {list(self.levels)}; each must be at least 3 (lfq "
            "has two values a feature), at most 1000"
        )
        return failed((not self.levels or min(self.levels) < 3 or max(self.levels) > 1000, message))


@dataclass(kw_only=True)
class SignOptions:
    """Options of `quantizer: lfq` (lookup-free, MAGVIT-v2) and `bsq` (binary spherical): codes are
    the signs of the features."""

    commitment: float = 0.25
    """Weight of the commitment loss, a mean over vectors and features as in `vq`."""
    entropy_weight: float = 0.1
    """Weight of the entropy penalty: each vector sure of its signs, all codes used by the batch."""
    diversity: float = 1.0
    """Weight, within that penalty, of the batch's entropy (gamma in the paper)."""
    inverse_temperature: float = 100.0
    """Inverse temperature of the probabilities whose entropy is taken."""

    def problems(self) -> list[str]:
        section = "tokenizer.model.sign"
        return [
            *out_of_range(self, section, "[0, inf]", "commitment", "entropy_weight", "diversity"),
            *out_of_range(self, section, "(0, inf]", "inverse_temperature"),
        ]


@dataclass(kw_only=True)
class ResidualOptions:
    """Options of `quantizer: residual` (RQ-VAE)."""

    depth: int = 2
    """Codes per position: each one quantizes the residual of those before it."""
    shared: bool = False
    """One codebook for all depths, instead of one each."""

    def problems(self) -> list[str]:
        section = "tokenizer.model.residual"
        too_few = out_of_range(self, section, "[1, inf]", "depth")
        return too_few or out_of_range(self, section, "[1, 1024]", "depth")


@dataclass(kw_only=True)
class HierarchicalOptions:
    """Options of `quantizer: hierarchical` (VQ-VAE-2)."""

    levels: int = 2
    """Grids of codes, each half as fine as the next; the finest is `image_size / factor`."""
    width: int = 128
    """Channels of the layers between the levels."""
    coarse_codes: tuple[int, ...] = ()
    """Entries of the codebooks above the finest, coarsest first; as many as `num_codes` where
    empty. A coarse grid has few places, so that it fills fewer codes."""

    def __post_init__(self) -> None:
        self.coarse_codes = tuple(self.coarse_codes)  # JSON and YAML know lists only

    def problems(self) -> list[str]:
        section = "tokenizer.model.hierarchical"
        levels = out_of_range(self, section, "[2, inf]", "levels")
        levels = levels or out_of_range(self, section, f"[2, {MOST_LEVELS}]", "levels")
        width = out_of_range(self, section, "[1, inf]", "width")
        codes = bool(self.coarse_codes) and (
            len(self.coarse_codes) != self.levels - 1
            or not 2 <= min(self.coarse_codes) <= max(self.coarse_codes) <= LARGEST_CODE
        )
        return (
            levels
            + width
            + failed(
                (
                    codes and not levels,
                    f"{section}.coarse_codes is {list(self.coarse_codes)}; with {self.levels} "
                    f"levels it needs {self.levels - 1} numbers from 2 to {LARGEST_CODE}, one for "
                    "each level above the finest",
                )
            )
        )


@dataclass(kw_only=True)
class GaussianOptions:
    """Options of `quantizer: gaussian` (VAE)."""

    latents: Literal["grid", "vector"] = "grid"
    """`code_dim` latent dimensions at each position of the grid, or one vector per image. A vector
    fixes the size of the images."""
    vector_features: int = 64
    """Latent dimensions of an image with `latents: vector`."""
    free_bits: float = 0.0
    """Nats of each latent dimension that cost nothing: a dimension whose mean KL over the batch is
    lower is not pushed down (Kingma et al. 2016). It keeps dimensions from collapsing."""

    def problems(self) -> list[str]:
        section = "tokenizer.model.gaussian"
        default = GaussianOptions.vector_features
        return [
            *out_of_range(self, section, "[1, inf]", "vector_features"),
            *out_of_range(self, section, "[0, inf]", "free_bits"),
            *failed(
                (
                    self.latents == "grid" and self.vector_features != default,
                    f"{section}.vector_features is {self.vector_features} and {section}.latents is "
                    "grid; set latents to vector, or leave vector_features out (a grid has "
                    "tokenizer.model.code_dim features per position)",
                )
            ),
        ]
