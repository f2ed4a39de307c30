"""`Experiment`: the YAML as dataclasses, and the relations of its sections. Knows numbers and
names; reads no file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.config.checks import out_of_range, problems, refuse
from pipeline.config.data import DataConfig, canonical_size
from pipeline.config.train import PriorTrainConfig, TrainConfig
from stage1_tokenizer import ObjectiveConfig, TokenizerConfig, joint_problems
from stage2_prior import (
    LatentPriorConfig,
    PriorConfig,
    PriorObjectiveConfig,
    SamplingOptions,
    TextConfig,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_JOINT_KINDS = ("mixture", "realnvp", "maf")
"""Priors of Gaussian latents that can be trained together with the tokenizer."""


@dataclass(kw_only=True)
class SequenceConfig:
    """The stream of caption and codes (`sequence`)."""

    captioning_fraction: float = 0.0
    """Fraction of the prior's batches whose codes come before the caption: it learns to caption
    images, too."""

    def __post_init__(self) -> None:
        refuse(out_of_range(self, "sequence", "[0, 1)", "captioning_fraction"))


@dataclass(kw_only=True)
class TokenizerSection:
    """Stage 1 (`tokenizer`)."""

    model: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Architecture and quantizer."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What is minimised."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How it is trained."""
    init_from: str | None = None
    """A bundle, a run's folder or a tokenizer's folder whose weights it starts from; or `icons`,
    the bundle of the package. Settings of `model` that are left out follow."""
    frozen: bool = False
    """Take the tokenizer of `init_from` as it is: nothing is trained, and a prior that knows its
    codes can be started from."""


@dataclass(kw_only=True)
class EncodeConfig:
    """The codes dataset (`encode`)."""

    max_images: int | None = None
    """Training images to encode; all of the source when absent (an unlimited source needs a
    number)."""
    max_val_images: int | None = 500
    """Held-out images to encode, at most as many as there are; all when absent."""
    augmentations_per_image: int = 1
    """Encodings per training image: the first is its centre, further ones are cropped and mirrored
    as `data` says, and shifted."""
    shift: int = 0
    """Largest shift of a further view, in pixels along either axis."""
    flip: bool = False
    """Mirror half of the further views; for captions that say nothing of left and right."""
    batch_size: int = 128
    """Images encoded at a time, per process."""
    images_per_shard: int = 10_000
    """Images per file of codes; a kill costs the file that is being written. It changes no code."""

    def __post_init__(self) -> None:
        further = self.shift > 0 or self.flip
        at_least_one = (
            "max_val_images",
            "augmentations_per_image",
            "batch_size",
            "images_per_shard",
        )
        refuse(
            out_of_range(self, "encode", "[1, inf]", *at_least_one, "max_images"),
            out_of_range(self, "encode", "[0, inf]", "shift"),
            problems(
                (
                    further and self.augmentations_per_image == 1,
                    f"encode.shift is {self.shift} and encode.flip {self.flip} with "
                    "encode.augmentations_per_image 1; raise that, or set encode.shift=0 and "
                    "encode.flip=false",
                )
            ),
        )


@dataclass(kw_only=True)
class PriorSection:
    """Stage 2 (`prior`): a transformer over captions and codes, or a density of Gaussian latents.
    The latter reads `latent`, `joint`, `objective.caption_dropout` and `train` alone."""

    model: PriorConfig = field(default_factory=PriorConfig)
    """Architecture over codes."""
    latent: LatentPriorConfig = field(default_factory=LatentPriorConfig)
    """Density of Gaussian latents; read only where `tokenizer.model.quantizer` is gaussian."""
    joint: bool = False
    """Train the prior of Gaussian latents together with the tokenizer, in place of N(0, I) in its
    evidence lower bound; otherwise it is trained afterwards. Only where `tokenizer.model.quantizer`
    is gaussian."""
    objective: PriorObjectiveConfig = field(default_factory=PriorObjectiveConfig)
    """What is minimised."""
    train: PriorTrainConfig = field(default_factory=PriorTrainConfig)
    """How it is trained."""
    init_from: str | None = None
    """A bundle, a run's folder or a prior's folder whose weights and vocabulary it starts from; or
    `icons`, the bundle of the package; needs `tokenizer.frozen`. Settings of `model`,
    `text.max_length` and random orders follow where they are left out."""
    lora_rank: int = 0
    """Rank of the matrices that LoRA trains next to each matrix of the blocks (Hu et al. 2021), by
    peft, and nothing else; 0 trains everything."""
    lora_alpha: float = 16.0
    """What LoRA adds is multiplied by `lora_alpha / lora_rank`."""

    def __post_init__(self) -> None:
        refuse(
            out_of_range(self, "prior", "[0, inf]", "lora_rank"),
            out_of_range(self, "prior", "(0, inf]", "lora_alpha"),
            problems(
                (
                    self.lora_rank and self.init_from is None,
                    f"prior.lora_rank is {self.lora_rank} and prior.init_from is absent; LoRA "
                    "adapts a prior that is there, so set that, or prior.lora_rank=0",
                ),
                (
                    self.lora_rank and self.train.optimizer == "muon",
                    "prior.train.optimizer is muon and prior.lora_rank above 0; Muon is for whole "
                    "matrices, choose adamw",
                ),
            ),
        )


@dataclass(kw_only=True)
class Experiment:
    """Everything that `minidalle run` needs to know."""

    name: str
    """Names the run folder: OUTPUT_DIR/NAME."""
    seed: int = 0
    """Start of every random number of the run."""
    output_dir: str = "runs"
    """Folder of all runs."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of training: `auto` is bf16 where the device computes it natively. Parameters stay
    fp32."""
    bundle_dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of the weights in the bundle; bf16 halves its size."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Trackers of accelerate by name (tensorboard, wandb, ...); [] for none."""
    process_timeout: int = 30
    """Minutes that processes wait for one another before they give up: longer than the longest
    evaluation, which one of them does."""
    data: DataConfig
    """Images and captions."""
    tokenizer: TokenizerSection = field(default_factory=TokenizerSection)
    """Stage 1."""
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    """The codes dataset between the stages."""
    text: TextConfig = field(default_factory=TextConfig)
    """Captions as ids."""
    sequence: SequenceConfig = field(default_factory=SequenceConfig)
    """How caption and codes follow each other."""
    prior: PriorSection = field(default_factory=PriorSection)
    """Stage 2."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    """How images are sampled by default."""

    def __post_init__(self) -> None:
        refuse(relation_problems(dataclasses.asdict(self)))

    @property
    def sees_captions(self) -> bool:
        """Whether the prior is conditional."""
        return self.tokenizer.model.has_codes or self.prior.latent.context_features > 0

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.output_dir).expanduser() / self.name

    def require_codes(self, command: str) -> None:
        """Raises ValueError where the tokenizer has no codes, which a command needs."""
        if not self.tokenizer.model.has_codes:
            raise ValueError(
                f"tokenizer.model.quantizer is {self.tokenizer.model.quantizer}, which has "
                f"Gaussian latents, and `minidalle {command}` needs codes; choose another "
                "quantizer (vq), or use `minidalle run`, which trains a prior of the latents"
            )


def relation_problems(values: Mapping[str, Any]) -> list[str]:
    """What is wrong between the sections of an experiment, or in none of them; on plain values, so
    that it can be reported with what is wrong inside a section."""
    model = values["tokenizer"]["model"]
    return [
        *_run_problems(values),
        *_image_problems(values["data"], model),
        *_sampling_problems(values["sampling"], values["prior"]),
        *_text_problems(values["prior"], values["sequence"]),
        *_init_problems(values["tokenizer"], values["prior"], values["text"]),
        *_latent_prior_problems(values["tokenizer"], values["prior"]),
        *joint_problems(model, values["tokenizer"]["objective"]),
        # Gaussian latents are not encoded beforehand.
        *(_encode_problems(values["encode"], values["data"]) if _has_codes(model) else []),
    ]


def _has_codes(model: Mapping[str, Any]) -> bool:
    return bool(model["quantizer"] != "gaussian")


def _run_problems(values: Mapping[str, Any]) -> list[str]:
    name = values["name"]
    return problems(
        (
            name in ("", "..") or Path(name).name != name,
            f"name is {name!r}; it must be a plain folder name",
        ),
        (
            not 0 <= values["seed"] < 2**31,
            f"seed is {values['seed']}; it must be at least 0 and below 2147483648",
        ),
        (
            values["process_timeout"] < 1,
            f"process_timeout is {values['process_timeout']}; it must be at least 1 minute",
        ),
    )


def _image_problems(data: Mapping[str, Any], model: Mapping[str, Any]) -> list[str]:
    own, of_model = (
        size if isinstance(size, int) else list(size)
        for size in (canonical_size(data["image_size"]), canonical_size(model["image_size"]))
    )
    channels = 4 if data["alpha"] == "keep" else 3
    return problems(
        (
            own != of_model,
            f"data.image_size is {own} and tokenizer.model.image_size is {of_model}; they must "
            "agree (leave tokenizer.model.image_size out and it follows)",
        ),
        (
            channels != model["channels"],
            f"data.alpha is {data['alpha']}, which gives images of {channels} channels, and "
            f"tokenizer.model.channels is {model['channels']}; transparency needs "
            "data.alpha=keep and tokenizer.model.channels=4, images without it data.alpha=white "
            "and tokenizer.model.channels=3",
        ),
    )


def _sampling_problems(sampling: Mapping[str, Any], prior: Mapping[str, Any]) -> list[str]:
    scale = sampling["guidance_scale"]
    steps = sampling["num_inference_steps"]
    order = prior["train"]["code_order"]
    return problems(
        (
            scale != 1 and not prior["objective"]["caption_dropout"],
            f"sampling.guidance_scale is {scale} but prior.objective.caption_dropout is 0; "
            "guidance needs caption dropout (0.1), or set sampling.guidance_scale to 1",
        ),
        (
            steps is not None and order != "random",
            f"sampling.num_inference_steps is {steps} but prior.train.code_order is {order}; "
            "several codes per step need prior.train.code_order=random",
        ),
    )


def _text_problems(prior: Mapping[str, Any], sequence: Mapping[str, Any]) -> list[str]:
    depth = prior["model"]["text_depth"]
    weight = prior["objective"]["text_weight"]
    fraction = sequence["captioning_fraction"]
    return problems(
        (
            depth > 0 and weight > 0,
            f"prior.model.text_depth is {depth} and prior.objective.text_weight is {weight}; in a "
            "text encoder each word knows the next, so that there is none to predict; set "
            "prior.objective.text_weight=0, or prior.model.text_depth=0",
        ),
        (
            depth > 0 and fraction > 0,
            f"prior.model.text_depth is {depth} and sequence.captioning_fraction is {fraction}; a "
            "prior with a text encoder samples no captions; set sequence.captioning_fraction=0, or "
            "prior.model.text_depth=0",
        ),
    )


def _init_problems(
    tokenizer: Mapping[str, Any], prior: Mapping[str, Any], text: Mapping[str, Any]
) -> list[str]:
    start = prior["init_from"]
    return problems(
        (
            tokenizer["frozen"] and tokenizer["init_from"] is None,
            "tokenizer.frozen is on and tokenizer.init_from is absent; say which tokenizer to take "
            "as it is",
        ),
        (
            start is not None and not tokenizer["frozen"] and _has_codes(tokenizer["model"]),
            f"prior.init_from is {start} and tokenizer.frozen is off; a prior knows the codes of "
            f"one tokenizer, set tokenizer.init_from={tokenizer['init_from'] or start} and "
            "tokenizer.frozen=true",
        ),
        (
            start is not None and text["pretrained"],
            f"text.pretrained is {text['pretrained']}; a prior that is started from keeps its own "
            "vocabulary, leave it out",
        ),
        (
            text["num_new_tokens"] and start is None,
            f"text.num_new_tokens is {text['num_new_tokens']}, which needs prior.init_from; set "
            "that, or leave it out",
        ),
    )


def _latent_prior_problems(tokenizer: Mapping[str, Any], prior: Mapping[str, Any]) -> list[str]:
    quantizer = tokenizer["model"]["quantizer"]
    has_codes = _has_codes(tokenizer["model"])
    kind = prior["latent"]["kind"]
    context = prior["latent"]["context_features"]
    free_bits = tokenizer["model"]["gaussian"]["free_bits"]
    joint = prior["joint"]
    return problems(
        (
            joint and has_codes,
            f"prior.joint is on and tokenizer.model.quantizer is {quantizer}; only a prior of "
            "Gaussian latents is trained together with the tokenizer, set prior.joint=false",
        ),
        (
            not has_codes and prior["init_from"] is not None,
            f"prior.init_from is {prior['init_from']} and tokenizer.model.quantizer is gaussian; a "
            "prior of Gaussian latents starts from random weights, leave it out",
        ),
        (
            joint and tokenizer["frozen"],
            "prior.joint and tokenizer.frozen are both on; a frozen tokenizer is not trained, set "
            "prior.joint=false to train the prior afterwards",
        ),
        (
            joint and kind not in _JOINT_KINDS,
            f"prior.joint is on and prior.latent.kind is {kind}, which is not trained together "
            f"with the tokenizer; choose one of {', '.join(_JOINT_KINDS)}, or set "
            "prior.joint=false",
        ),
        (
            joint and context > 0,
            f"prior.joint is on and prior.latent.context_features is {context}; a prior that is "
            "trained together with the tokenizer is unconditional, set context_features to 0 or "
            "prior.joint=false",
        ),
        (
            joint and free_bits,
            f"prior.joint is on and tokenizer.model.gaussian.free_bits is {free_bits:g}; free bits "
            "need the analytic KL to N(0, I), set them to 0 or prior.joint=false",
        ),
    )


def _encode_problems(encode: Mapping[str, Any], data: Mapping[str, Any]) -> list[str]:
    shapes = "shapes" in (data["source"], *(part["source"] for part in data["mix"]))
    several = encode["augmentations_per_image"]
    varies = data["crop"] == "random" or data["flip"] or encode["shift"] or encode["flip"]
    return problems(
        (
            shapes and encode["max_images"] is None,
            "encode.max_images is absent; the shapes are unlimited, say how many to encode (50000)",
        ),
        (
            several > 1 and not varies,
            f"encode.augmentations_per_image is {several} and nothing makes them differ; set "
            "encode.shift, encode.flip, data.crop=random or data.flip, or "
            "encode.augmentations_per_image=1",
        ),
        (
            shapes and encode["flip"],
            "encode.flip is on, and captions of the shapes say what is left and right; set "
            "encode.flip=false",
        ),
    )


def to_dict(config: DataclassInstance) -> dict[str, Any]:
    """A configuration as plain JSON values (tuples become lists)."""
    return dict(json.loads(json.dumps(dataclasses.asdict(config))))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name; a section without settings stays {}."""
    by_name: dict[str, Any] = {}
    for key, value in values.items():
        by_name |= (
            flat(value, f"{prefix}{key}.")
            if isinstance(value, Mapping) and value
            else {f"{prefix}{key}": value}
        )
    return by_name


def with_defaults(written: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Saved settings, with the defaults of those that are newer than the file."""
    filled = dict(defaults) | dict(written)
    for key, default in defaults.items():
        if isinstance(default, Mapping) and isinstance(filled[key], Mapping):
            filled[key] = with_defaults(filled[key], default)
    return filled


def with_section_defaults(written: Mapping[str, Any]) -> dict[str, Any]:
    """Saved settings by section, as `with_defaults`; a section that is not there stays away."""
    defaults = {"tokenizer": to_dict(TokenizerSection()), "prior": to_dict(PriorSection())}
    return with_defaults(written, {name: own for name, own in defaults.items() if name in written})
