"""What a prior is made of. Knows sizes and their relations; knows nothing of tensors, text or
images."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Level:
    """One code book's share of the stream: a grid of codes, read row by row."""

    grid: tuple[int, int]
    """Height and width, in codes."""
    num_codes: int
    """Entries of this level's codebook."""

    @property
    def length(self) -> int:
        return math.prod(self.grid)


@dataclass(kw_only=True)
class PriorConfig:
    """Architecture of the decoder-only transformer (`prior.model` in a YAML)."""

    width: int = 256
    """Features of a token inside the transformer."""
    depth: int = 6
    """Number of blocks."""
    heads: int = 4
    """Attention heads; `width / heads` is a head's width and must be a multiple of 4 (rows and
    columns share it)."""
    kv_heads: int | None = None
    """Heads of keys and values, shared by equal groups of the attention heads (grouped-query
    attention): fewer make the cache of sampling smaller. As many as `heads` when absent."""
    mlp_ratio: float = 8 / 3
    """Hidden features of the SwiGLU layer as a multiple of `width`, rounded up to a multiple of
    32."""
    dropout: float = 0.0
    """Share of features zeroed on each residual branch while training."""
    rope_base: float = 100.0
    """Base of the rotary frequencies. Streams are short (tens of positions an axis), so far below
    the usual 10,000."""

    def __post_init__(self) -> None:
        problems = []
        for name in ("width", "depth", "heads"):
            if getattr(self, name) < 1:
                problems.append(
                    f"prior.model.{name} is {getattr(self, name)}; it must be at least 1"
                )
        if not problems and (self.width % self.heads or (self.width // self.heads) % 4):
            problems.append(
                f"prior.model.width {self.width} does not split into prior.model.heads "
                f"{self.heads} heads of a width that is "
                "a multiple of 4; choose, for example, heads = width / 64"
            )
        if self.kv_heads is not None and (
            self.kv_heads < 1 or (self.heads > 0 and self.heads % self.kv_heads)
        ):
            problems.append(
                f"prior.model.kv_heads is {self.kv_heads}; it must divide prior.model.heads "
                f"{self.heads}, or be absent"
            )
        if not 0 <= self.dropout < 1:
            problems.append(f"prior.model.dropout is {self.dropout}; it must be in [0, 1)")
        if self.mlp_ratio <= 0 or self.rope_base <= 1:
            problems.append(
                "prior.model.mlp_ratio must be above 0 and prior.model.rope_base above 1"
            )
        if problems:
            raise ValueError("; ".join(problems))

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
    """Share of captions replaced by the null caption while training. Guidance needs it above 0."""
    label_smoothing: float = 0.0
    """Share of a code's target spread evenly over all codes while training; reported nats are
    without it."""

    def __post_init__(self) -> None:
        problems = []
        if self.text_weight < 0:
            problems.append(
                f"prior.objective.text_weight is {self.text_weight}; it must be 0 or more"
            )
        for name in ("caption_dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                problems.append(
                    f"prior.objective.{name} is {getattr(self, name)}; it must be in [0, 1)"
                )
        if problems:
            raise ValueError("; ".join(problems))


@dataclass(kw_only=True)
class StreamConfig:
    """The shape of the stream a prior was built for; saved with it. The pipeline fills it in from
    the tokenizers."""

    text_vocab_size: int
    """Entries of the text vocabulary, special tokens included."""
    text_length: int
    """Text slots of the stream, start and end token included."""
    levels: tuple[Level, ...] = field(default_factory=tuple)
    """The codes' levels, in the order in which the stream holds them."""
    code_dim: int = 0
    """Features of a code's vector, of which the prior is told (`ImagePrior.set_codebook`); 0 where
    codes are bare numbers."""
    any_order: bool = False
    """Whether each token is told the position of the code that comes next, so that codes may come
    in any order."""
    pad_id: int = 0
    """Text id that fills unused text slots."""
    start_id: int = 1
    """Text id of the first slot."""
    end_id: int = 2
    """Text id that ends a caption."""

    def __post_init__(self) -> None:
        self.levels = tuple(
            level
            if isinstance(level, Level)
            else Level(grid=tuple(level["grid"]), num_codes=level["num_codes"])
            for level in self.levels
        )
        if not self.levels:
            raise ValueError(
                "a stream needs at least one level of codes; give levels=(Level(grid=(8, 8), "
                "num_codes=512),)"
            )
        if self.text_length < 3:
            raise ValueError(
                f"text.max_length is {self.text_length}; it must be at least 3 (start, one token, "
                "end)"
            )
