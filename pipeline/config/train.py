"""`TrainConfig`: how a stage is trained (`tokenizer.train` and `prior.train` in a YAML). Knows
numbers and their relations alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.config.checks import out_of_range, problems, refuse
from stage2_prior import CodeOrder, OrderSchedule


@dataclass(kw_only=True)
class TrainConfig:
    """How one stage is trained (`tokenizer.train`, `prior.train`)."""

    steps: int = 1000
    """Optimizer steps in all."""
    batch_size: int | Literal["auto"] = 32
    """Images per step, over all processes together. `auto` is the largest power of two (times
    processes and micro-batches) that fits the memory, at most 1024. The number chosen is written
    down, and the stage resumes with it on any machine."""
    gradient_accumulation_steps: int | Literal["auto"] = 1
    """Each process splits its batch into this many micro-batches, which takes less memory. Means
    over text tokens are taken per micro-batch, and each updates a codebook's averages. `auto` is as
    few as fit the memory, so that a smaller machine trains the same."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon` steps convolutions and the matrices inside the transformer by their orthogonalised
    momentum (Jordan et al. 2024), at AdamW's scale of steps, and everything else by AdamW."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    warmup_steps: int = 50
    """Steps over which the rate rises from 0."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """How the rate falls after warm-up: by a cosine, or not at all until the last `decay_ratio` of
    the steps, then linearly (warm-up, stable, decay: Hu et al. 2024), so that a run can be
    extended."""
    decay_ratio: float = 0.2
    """Fraction of the steps over which `wsd` lets the rate fall."""
    min_lr_ratio: float = 0.05
    """Rate at the end of the schedule as a fraction of the peak."""
    weight_decay: float = 0.01
    """AdamW's, on matrices and kernels only (not on gains, biases, embeddings of one dimension)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's moment decays."""
    grad_clip: float = 1.0
    """Gradients are scaled down to this norm."""
    ema_decay: float = 0.995
    """Decay of the weights' EMA, which is evaluated and saved. It warms up over the first steps."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile: `auto` compiles on CUDA, and elsewhere where a stage takes long enough to win
    the minute it costs."""
    threads: int | Literal["auto"] = "auto"
    """CPU threads that torch computes with. `auto` follows the cores that other programs leave
    free; `OMP_NUM_THREADS` goes before it. A number gives the same weights on a busy machine, bit
    for bit."""
    log_every: int = 20
    """Steps between logged metrics."""
    eval_every: int = 500
    """Steps between evaluations on held-out images, each with a grid of images."""
    save_every: int = 500
    """Steps between checkpoints."""
    save_total_limit: int = 2
    """Number of checkpoints kept; older ones are removed."""
    max_nonfinite_steps: int = 0
    """Steps with a loss or gradient that is not finite are skipped, up to this many per training.
    One more stops it."""
    save_best: bool = False
    """Save the weights with the best held-out result in place of the last ones (against
    overfitting)."""

    def __post_init__(self) -> None:
        batch = self.batch_size
        micro = self.gradient_accumulation_steps
        uneven = batch != "auto" and micro != "auto" and micro > 0 and batch % micro
        sizes = ("steps", "batch_size", "gradient_accumulation_steps", "save_total_limit")
        refuse(
            out_of_range(
                self, "train", "[1, inf]", *sizes, "log_every", "eval_every", "save_every"
            ),
            out_of_range(self, "train", "(0, inf]", "learning_rate", "grad_clip"),
            out_of_range(
                self, "train", "[0, inf]", "warmup_steps", "weight_decay", "max_nonfinite_steps"
            ),
            out_of_range(self, "train", "[0, 1)", "ema_decay"),
            out_of_range(self, "train", "(0, 1]", "decay_ratio"),
            out_of_range(self, "train", "[1, inf]", "threads"),
            out_of_range(self, "train", "[0, 1]", "min_lr_ratio"),
            problems(
                (
                    not all(0 <= beta < 1 for beta in self.betas),
                    f"train.betas is {list(self.betas)}; both must be in [0, 1)",
                ),
                (
                    uneven,
                    f"train.batch_size is {batch}; it must be a multiple of "
                    f"train.gradient_accumulation_steps {micro}",
                ),
            ),
        )

    def resolved_batch(self, label: str) -> tuple[int, int]:
        """`batch_size` and `gradient_accumulation_steps`.

        Args:
            label: the stage of these settings, `tokenizer` or `prior`, for the message.

        Raises:
            ValueError: one is still `auto`.
        """
        if self.batch_size == "auto" or self.gradient_accumulation_steps == "auto":
            raise ValueError(
                f"{label}.train.batch_size or {label}.train.gradient_accumulation_steps is auto, "
                "which is for a run's own stages; give numbers here"
            )
        return self.batch_size, self.gradient_accumulation_steps

    def check_processes(self, label: str, processes: int) -> None:
        """Raises ValueError where the batch does not split evenly over this many processes, or a
        number is still `auto`; `label` as in `resolved_batch`."""
        batch_size, micro_batches = self.resolved_batch(label)
        if batch_size % (processes * micro_batches):
            over = f"{processes} processes" if processes > 1 else "1 process"
            micro = (
                f" with {label}.train.gradient_accumulation_steps {micro_batches}"
                if micro_batches > 1
                else ""
            )
            raise ValueError(
                f"{label}.train.batch_size {batch_size} does not split evenly over {over}{micro}; "
                f"choose a multiple of {processes * micro_batches}"
            )


@dataclass(kw_only=True)
class PriorTrainConfig(TrainConfig):
    """How a prior is trained (`prior.train`)."""

    code_order: CodeOrder = "raster"
    """In which order codes come: `raster`, row by row; `random`, from which editing, completing and
    decoding several codes at once follow; `annealed`, random orders that give way to raster order,
    for better images in raster order alone."""
    anneal_fraction: tuple[float, float] = (0.5, 0.75)
    """With `annealed`: the fractions of the steps at which raster order begins to come in and is
    alone."""
    activation_checkpointing: bool = False
    """Recompute activations for the gradient instead of keeping them: much less memory for a third
    more time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        first, last = self.anneal_fraction
        if not 0 <= first < last <= 1:
            raise ValueError(
                f"train.anneal_fraction is {first}, {last}; it must be two fractions of the steps, "
                "the second above the first"
            )

    @property
    def orders(self) -> OrderSchedule:
        """The schedule in steps."""
        first, last = (round(fraction * self.steps) for fraction in self.anneal_fraction)
        return OrderSchedule(order=self.code_order, first=first, last=max(last, first + 1))
