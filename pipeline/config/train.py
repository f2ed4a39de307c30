"""`TrainConfig`: how a stage is trained (`tokenizer.train` and `prior.train` in a YAML). Knows numbers and their relations alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stage2_prior import CodeOrder, OrderSchedule


@dataclass(kw_only=True)
class TrainConfig:
    """How one stage is trained (`tokenizer.train`, `prior.train`)."""

    steps: int = 1000
    """Optimizer steps in all."""
    batch_size: int | Literal["auto"] = 32
    """Pictures a step, over all processes together; each takes an equal part. `auto` is the largest power of two (times processes and
    parts) that fits the memory, at most 1024; what was chosen is written down, and the stage goes on with it wherever it does."""
    accumulate: int | Literal["auto"] = 1
    """Parts that a process's share of the batch goes through the network in, one after another: a step in less memory. Means over text
    tokens are taken in each part, and a codebook's averages are moved by each. `auto` is as few as fit the memory, so that the batch
    stays what it is on a smaller machine."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon` steps convolutions and the matrices inside the transformer by their orthogonalised momentum (Jordan et al. 2024), at
    AdamW's scale of steps, and everything else by AdamW."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    warmup_steps: int = 50
    """Steps over which the rate rises from 0."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """How the rate falls after warm-up: by a cosine, or not at all until the last `decay_share` of the steps, then linearly (warm-up,
    stable, decay: Hu et al. 2024), so that a run can be made longer without beginning anew."""
    decay_share: float = 0.2
    """Share of the steps over which `wsd` lets the rate fall."""
    final_learning_rate: float = 0.05
    """Rate at the last step as a share of the peak."""
    weight_decay: float = 0.01
    """AdamW's, on matrices and kernels only (not on gains, biases, embeddings of one dimension)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's moment decays."""
    grad_clip: float = 1.0
    """Largest norm of a gradient; larger ones are scaled down."""
    ema_decay: float = 0.995
    """Decay of the weights' moving average, which is what is evaluated and saved; it warms up over the first steps."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile: `auto` compiles on CUDA, and elsewhere where a stage takes long enough to win the minute it costs."""
    log_every: int = 20
    """Steps between lines of scalars."""
    evaluate_every: int = 500
    """Steps between evaluations on held-out pictures, with a grid of pictures."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    skip_nonfinite: int = 0
    """Steps of the whole training that may be skipped because a loss or a gradient is not finite; at one more the training stops."""
    keep_best: bool = False
    """Deliver the weights with the best held-out result instead of the last ones (against overfitting)."""

    def __post_init__(self) -> None:
        problems = []
        for name in ("steps", "batch_size", "accumulate", "log_every", "evaluate_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) != "auto" and getattr(self, name) < 1:
                problems.append(f"train.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("learning_rate", "grad_clip"):
            if not getattr(self, name) > 0:
                problems.append(f"train.{name} is {getattr(self, name)}; it must be above 0")
        for name in ("warmup_steps", "weight_decay", "skip_nonfinite"):
            if getattr(self, name) < 0:
                problems.append(f"train.{name} is {getattr(self, name)}; it must be 0 or more")
        if not 0 <= self.ema_decay < 1:
            problems.append(f"train.ema_decay is {self.ema_decay}; it must be in [0, 1)")
        if self.batch_size != "auto" and self.accumulate != "auto" and self.accumulate >= 1 and self.batch_size % self.accumulate:
            problems.append(f"train.batch_size is {self.batch_size}; it must be a multiple of train.accumulate {self.accumulate}")
        if not 0 < self.decay_share <= 1:
            problems.append(f"train.decay_share is {self.decay_share}; it must be in (0, 1]")
        if not 0 <= self.final_learning_rate <= 1:
            problems.append(f"train.final_learning_rate is {self.final_learning_rate}; it is a share of the peak, in [0, 1]")
        if problems:
            raise ValueError("; ".join(problems))

    def resolved_batch(self) -> tuple[int, int]:
        """`batch_size` and `accumulate`.

        Raises:
            ValueError: one is still `auto`.
        """
        if self.batch_size == "auto" or self.accumulate == "auto":
            raise ValueError("train.batch_size or train.accumulate is auto, which is for a run's own stages; give numbers here")
        return self.batch_size, self.accumulate


@dataclass(kw_only=True)
class PriorTrainConfig(TrainConfig):
    """How a prior is trained (`prior.train`)."""

    order: CodeOrder = "raster"
    """In which order codes come: `raster`, row by row; `random`, from which editing, completing and decoding several codes at once follow;
    `annealed`, random orders that give way to raster order, for better pictures in raster order alone."""
    anneal: tuple[float, float] = (0.5, 0.75)
    """With `annealed`: the shares of the steps at which raster order begins to come in and is alone."""
    checkpoint_activations: bool = False
    """Work activations out again for the gradient instead of keeping them: much less memory for a third more time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        first, last = self.anneal
        if not 0 <= first < last <= 1:
            raise ValueError(f"train.anneal is {first}, {last}; it must be two shares of the steps, the second above the first")

    @property
    def orders(self) -> OrderSchedule:
        """The schedule in steps."""
        first, last = (round(share * self.steps) for share in self.anneal)
        return OrderSchedule(order=self.order, first=first, last=max(last, first + 1))
