"""`Experiment`: the YAML as dataclasses, and the relations of its sections. Knows numbers and
names; reads no file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.config.data import DataConfig
from pipeline.config.train import PriorTrainConfig, TrainConfig
from stage1_tokenizer import ObjectiveConfig, TokenizerConfig, joint_problems
from stage2_prior import PriorConfig, PriorObjectiveConfig, SamplingOptions, TextConfig


@dataclass(kw_only=True)
class SequenceConfig:
    """The stream of caption and codes (`sequence`)."""

    captioning_fraction: float = 0.0
    """Share of the prior's batches whose codes come before the caption: it learns to caption
    images, too."""

    def __post_init__(self) -> None:
        if not 0 <= self.captioning_fraction < 1:
            raise ValueError(
                f"sequence.captioning_fraction is {self.captioning_fraction}; it must be in [0, 1)"
            )


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
    """A bundle, a run's folder or a tokenizer's folder whose weights it starts from. Settings of
    `model` that are left out follow."""
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
    """Encodings a training image: the first is its centre, further ones are cropped and mirrored
    as `data` says, and shifted."""
    shift: int = 0
    """Largest shift of a further view, in pixels along either axis."""
    flip: bool = False
    """Mirror half of the further views; for captions that say nothing of left and right."""
    batch_size: int = 128
    """Images encoded at a time in a process."""
    images_per_shard: int = 10_000
    """Images a file of codes; a kill costs the file that is being written. It changes no code."""

    def __post_init__(self) -> None:
        problems = []
        for name in ("augmentations_per_image", "batch_size", "images_per_shard"):
            if getattr(self, name) < 1:
                problems.append(f"encode.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("max_val_images", "max_images"):
            if (limit := getattr(self, name)) is not None and limit < 1:
                problems.append(f"encode.{name} is {limit}; it must be at least 1, or null for all")
        if self.shift < 0 or (self.augmentations_per_image == 1 and (self.shift > 0 or self.flip)):
            problems.append(
                f"encode.shift is {self.shift} and encode.flip {self.flip} with "
                "encode.augmentations_per_image "
                f"{self.augmentations_per_image}; they are for further encodings"
            )
        if problems:
            raise ValueError("; ".join(problems))


@dataclass(kw_only=True)
class PriorSection:
    """Stage 2 (`prior`)."""

    model: PriorConfig = field(default_factory=PriorConfig)
    """Architecture."""
    objective: PriorObjectiveConfig = field(default_factory=PriorObjectiveConfig)
    """What is minimised."""
    train: PriorTrainConfig = field(default_factory=PriorTrainConfig)
    """How it is trained."""
    init_from: str | None = None
    """A bundle, a run's folder or a prior's folder whose weights and vocabulary it starts from;
    needs `tokenizer.frozen`. Settings of `model`, `text.max_length` and random orders follow where
    they are left out."""
    lora_rank: int = 0
    """Train so many directions beside each matrix of the blocks (LoRA, Hu et al. 2021), by peft,
    and nothing else; 0 trains everything."""
    lora_alpha: float = 16.0
    """What LoRA adds is multiplied by `lora_alpha / lora_rank`."""

    def __post_init__(self) -> None:
        problems = []
        if self.lora_rank < 0 or self.lora_alpha <= 0:
            problems.append(
                f"prior.lora_rank is {self.lora_rank} and lora_alpha {self.lora_alpha}; the rank "
                "must be 0 or more and alpha above 0"
            )
        if self.lora_rank and self.init_from is None:
            problems.append(
                f"prior.lora_rank is {self.lora_rank} and prior.init_from is absent; LoRA adapts a "
                "prior that is there"
            )
        if self.lora_rank and self.train.optimizer == "muon":
            problems.append(
                "prior.train.optimizer is muon and prior.lora_rank above 0; Muon is for whole "
                "matrices, choose adamw"
            )
        if problems:
            raise ValueError("; ".join(problems))


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
        if problems := _relations(dataclasses.asdict(self)):
            raise ValueError("; ".join(problems))

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.output_dir) / self.name


def _relations(values: dict[str, Any]) -> list[str]:
    """What is wrong between the sections of an experiment, or in none of them; on plain values, so
    that it can be said beside what is wrong inside a section."""
    problems = []
    name, data, model = values["name"], values["data"], values["tokenizer"]["model"]
    if not name or Path(name).name != name:
        problems.append(f"name is {name!r}; it must be a plain folder name")
    if not 0 <= values["seed"] < 2**31:
        problems.append(f"seed is {values['seed']}; it must be at least 0 and below 2147483648")
    if values["process_timeout"] < 1:
        problems.append(
            f"process_timeout is {values['process_timeout']}; it must be at least 1 minute"
        )
    if data["image_size"] != model["image_size"]:
        problems.append(
            f"data.image_size is {data['image_size']} and tokenizer.model.image_size is "
            f"{model['image_size']}; "
            "they must agree (leave tokenizer.model.image_size out and it follows)"
        )
    if model["channels"] != 3:
        problems.append(
            f"tokenizer.model.channels is {model['channels']}; every data source gives RGB, so it "
            "must be 3"
        )
    scale = values["sampling"]["guidance_scale"]
    if scale != 1 and not values["prior"]["objective"]["caption_dropout"]:
        problems.append(
            f"sampling.guidance_scale is {scale} but prior.objective.caption_dropout is 0; "
            "guidance needs caption dropout (0.1), or set sampling.guidance_scale to 1"
        )
    steps, order = values["sampling"]["num_inference_steps"], values["prior"]["train"]["code_order"]
    if steps is not None and order != "random":
        problems.append(
            f"sampling.num_inference_steps is {steps} but prior.train.code_order is {order}; "
            "several codes per step "
            "need prior.train.code_order=random"
        )
    tokenizer, prior, text = values["tokenizer"], values["prior"], values["text"]
    if tokenizer["frozen"] and tokenizer["init_from"] is None:
        problems.append(
            "tokenizer.frozen is on and tokenizer.init_from is absent; say which tokenizer to take "
            "as it is"
        )
    if prior["init_from"] is not None and not tokenizer["frozen"]:
        problems.append(
            f"prior.init_from is {prior['init_from']} and tokenizer.frozen is off; a prior knows "
            "the codes of one tokenizer, set "
            f"tokenizer.init_from={tokenizer['init_from'] or prior['init_from']} and "
            "tokenizer.frozen=true"
        )
    if prior["init_from"] is not None and text["pretrained"]:
        problems.append(
            f"text.pretrained is {text['pretrained']}; a prior that is started from keeps its own "
            "vocabulary, leave it out"
        )
    if text["num_new_tokens"] and (prior["init_from"] is None or prior["lora_rank"]):
        problems.append(
            f"text.num_new_tokens is {text['num_new_tokens']}, which needs prior.init_from, and "
            "prior.lora_rank=0: LoRA trains no "
            "embeddings"
        )
    problems += joint_problems(model, values["tokenizer"]["objective"])
    shapes = "shapes" in (data["source"], *(part["source"] for part in data["mix"]))
    if shapes and values["encode"]["max_images"] is None:
        problems.append(
            "encode.max_images is absent; the shapes are unlimited, say how many to encode (50000)"
        )
    varies = (
        data["crop"] == "random"
        or data["flip"]
        or values["encode"]["shift"]
        or values["encode"]["flip"]
    )
    if values["encode"]["augmentations_per_image"] > 1 and not varies:
        problems.append(
            f"encode.augmentations_per_image is {values['encode']['augmentations_per_image']} and "
            "nothing makes "
            "them differ; set encode.shift, encode.flip, data.crop=random or data.flip, or "
            "encode.augmentations_per_image=1"
        )
    if shapes and values["encode"]["flip"]:
        problems.append(
            "encode.flip is on, and captions of the shapes say what is left and right; set "
            "encode.flip=false"
        )
    return problems


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))
