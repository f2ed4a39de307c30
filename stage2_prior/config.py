"""What a prior is made of. Knows sizes and their relations; knows nothing of tensors, text or
images."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


def refuse(*checks: tuple[bool, str]) -> None:
    """Raises ValueError with the messages of all those checks (whether a value is wrong, message)
    that fail."""
    if problems := [message for wrong, message in checks if wrong]:
        raise ValueError("; ".join(problems))


@dataclass(frozen=True, kw_only=True)
class Level:
    """The part of the stream that one codebook has: a grid of codes, read row by row."""

    grid: tuple[int, int]
    """Height and width, in codes."""
    num_codes: int
    """Entries of this level's codebook."""

    @property
    def length(self) -> int:
        return math.prod(self.grid)


@dataclass(kw_only=True)
class PriorConfig:
    """Architecture of the transformer over caption and codes (`prior.model` in a YAML)."""

    width: int = 256
    """Features of a token inside the transformer."""
    depth: int = 6
    """Number of blocks."""
    text_depth: int = 0
    """Blocks of a text encoder, in which each word of the caption attends to all others, before the
    blocks that read caption and codes. Such a prior models no text: `prior.objective.text_weight`
    and `sequence.captioning_fraction` must be 0."""
    heads: int = 4
    """Attention heads; `width / heads` is a head's width and must be a multiple of 4 (rows and
    columns share it)."""
    kv_heads: int | None = None
    """Heads of keys and values, shared by equal groups of the attention heads (grouped-query
    attention): fewer make the key-value cache smaller. As many as `heads` when absent."""
    mlp_ratio: float = 8 / 3
    """Hidden features of the SwiGLU layer as a multiple of `width`, rounded up to a multiple of
    32."""
    dropout: float = 0.0
    """Fraction of features zeroed on each residual branch in training."""
    rope_base: float = 100.0
    """Base of the rotary frequencies. Streams are short (tens of positions per axis), so it is far
    below the usual 10,000."""

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("width", "depth", "heads")}
        positive = min(sizes.values()) >= 1
        refuse(
            *(
                (value < 1, f"prior.model.{name} is {value}; it must be at least 1")
                for name, value in sizes.items()
            ),
            (
                self.text_depth < 0,
                f"prior.model.text_depth is {self.text_depth}; it must be 0 or more",
            ),
            (
                positive and self.width % (4 * self.heads) > 0,
                f"prior.model.width {self.width} does not split into prior.model.heads "
                f"{self.heads} heads of a width that is a multiple of 4; choose, for example, "
                "heads = width / 64",
            ),
            (
                self.kv_heads is not None
                and (self.kv_heads < 1 or (self.heads > 0 and self.heads % self.kv_heads > 0)),
                f"prior.model.kv_heads is {self.kv_heads}; it must divide prior.model.heads "
                f"{self.heads}, or be absent",
            ),
            (
                not 0 <= self.dropout < 1,
                f"prior.model.dropout is {self.dropout}; it must be in [0, 1)",
            ),
            (self.mlp_ratio <= 0, f"prior.model.mlp_ratio is {self.mlp_ratio}; it must be above 0"),
            (self.rope_base <= 1, f"prior.model.rope_base is {self.rope_base}; it must be above 1"),
        )

    @property
    def hidden(self) -> int:
        """Hidden features of a SwiGLU layer."""
        return math.ceil(self.width * self.mlp_ratio / 32) * 32


@dataclass(kw_only=True)
class PriorObjectiveConfig:
    """What stage 2 minimises (`prior.objective` in a YAML)."""

    text_weight: float = 0.1
    """Weight of the text cross-entropy against the image cross-entropy (1). DALL-E used 1/7 of the
    image's."""
    caption_dropout: float = 0.1
    """Fraction of captions replaced by the null caption in training. Guidance needs it above 0."""
    code_corruption: float = 0.0
    """Mean fraction of the codes that the prior reads replaced by random ones in training; what it
    predicts stays. Each image has a rate of its own, even from 0 to twice this. The prior then
    relies less on the codes before and more on the caption, which helps new combinations."""
    label_smoothing: float = 0.0
    """Fraction of a code's target spread evenly over all codes in training; reported nats are
    without it."""

    def __post_init__(self) -> None:
        shares = {name: getattr(self, name) for name in ("caption_dropout", "label_smoothing")}
        refuse(
            (
                self.text_weight < 0,
                f"prior.objective.text_weight is {self.text_weight}; it must be 0 or more",
            ),
            *(
                (not 0 <= value < 1, f"prior.objective.{name} is {value}; it must be in [0, 1)")
                for name, value in shares.items()
            ),
            (
                not 0 <= self.code_corruption <= 0.5,
                f"prior.objective.code_corruption is {self.code_corruption}; it must be in "
                "[0, 0.5]",
            ),
        )


@dataclass(kw_only=True)
class StreamConfig:
    """The shape of the stream that a prior was built for; saved with it. The pipeline derives it
    from the tokenizers."""

    text_vocab_size: int
    """Entries of the text vocabulary, special tokens included."""
    text_length: int
    """Text positions of the stream, start and end token included."""
    levels: tuple[Level, ...] = field(default_factory=tuple)
    """The codes' levels, in the order in which the stream holds them."""
    code_dim: int = 0
    """Features of a code's vector (`PriorModule.set_codebook`); 0 where codes have none."""
    any_order: bool = False
    """Whether the position of the next code is an input, so that codes may come in any order."""
    pad_id: int = 0
    """Text id that fills unused text positions."""
    start_id: int = 1
    """Text id of the first position."""
    end_id: int = 2
    """Text id that ends a caption."""

    def __post_init__(self) -> None:
        self.levels = tuple(
            level
            if isinstance(level, Level)
            else Level(grid=tuple(level["grid"]), num_codes=level["num_codes"])
            for level in self.levels
        )
        refuse(
            (
                not self.levels,
                "a stream needs at least one level of codes; give levels=(Level(grid=(8, 8), "
                "num_codes=512),)",
            ),
            (
                any(min(*level.grid, level.num_codes) < 1 for level in self.levels),
                "a level of the stream has an empty grid or codebook; each needs at least 1 code",
            ),
            (
                not min(self.pad_id, self.start_id, self.end_id) >= 0
                or max(self.pad_id, self.start_id, self.end_id) >= self.text_vocab_size,
                f"pad_id {self.pad_id}, start_id {self.start_id} and end_id {self.end_id} of the "
                f"stream must be below text_vocab_size {self.text_vocab_size}, from 0",
            ),
            (self.code_dim < 0, f"code_dim of the stream is {self.code_dim}; it must be 0 or more"),
            (
                self.text_length < 3,
                f"text.max_length is {self.text_length}; it must be at least 3 (start, one token, "
                "end)",
            ),
        )
