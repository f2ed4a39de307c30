"""`PriorModule`: ids and positions of the stream -> logits. Never sees text or an image; saving.py
has files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stage2_prior.config import PriorConfig, StreamConfig
from stage2_prior.file_checks import StoredTensor, build_config
from stage2_prior.saving import SavedConfig, SavedModule, refuse_larger
from stage2_prior.sequence import Stream
from stage2_prior.transformer import (
    Block,
    CacheView,
    KeyValueCache,
    Projection,
    RMSNorm,
    RotaryEmbedding,
    attention_mask,
    rotary_table,
)


@dataclass(kw_only=True)
class SavedPriorConfig(SavedConfig):
    """The two plain configurations as they are saved: `model` and `stream` are dictionaries."""

    model_type = "mini_dalle_prior"
    stream: dict[str, Any] | None = None
    trained_with_caption_dropout: bool = False
    trained_order: Literal["raster", "random", "annealed"] = "raster"
    trained_image_first: bool = False


@dataclass
class PriorLogits:
    """Logits of one forward pass, each part only where that kind of token is predicted."""

    text: Tensor
    """(B, tokens that predict text, V) for the next text id."""
    image: Tensor
    """(B, tokens that predict codes, K) for the next code, counted over all levels."""


class CodebookTables(NamedTuple):
    """What turns ids into features and features into codes' logits, computed once per pass or
    once per image."""

    embeddings: Tensor
    """(V + K, C): one row for each id of the joint vocabulary."""
    head: Tensor
    """(K,C): a code's logit is the product of its row and the features."""
    level_edges: Tensor
    """(2,N) `Stream.level_edges` on the prior's device."""


class CodebookProjection(nn.Module):
    """A row (C,) for each of K codes: linear in the code's vector, plus a small part of its own.

    In a tokenizer's codebook codes that look alike lie together, and the same change of colour is
    much the same step everywhere. Rows that are linear in it inherit this: what the prior learns of
    red stars serves green ones. Free rows would have to learn it from examples. Without vectors
    (`code_dim` 0) there is the own part alone.
    """

    def __init__(self, num_codes: int, width: int, code_dim: int) -> None:
        super().__init__()
        # The own part's gain also scales its steps: what codes have in common is learned first.
        self.own_gain = 0.1 if code_dim else 1.0
        self.own = nn.Parameter(torch.zeros(num_codes, width))
        self.shared = nn.Parameter(torch.zeros(code_dim, width)) if code_dim else None

    def forward(self, vectors: Tensor) -> Tensor:
        """Vectors (K,D) of the codes -> rows (K,C)."""
        rows = self.own_gain * self.own
        return rows if self.shared is None else rows + vectors @ self.shared


class PriorModule(SavedModule):
    """Transformer over caption and codes, of which each code knows what comes before it; with an
    encoder of the caption in front, if `text_depth` is above 0.

    Args:
        model: architecture; or what `config_class` is, as loading passes it on.
        stream: the stream's shape.

    The weights of text and image logits are tied to nothing (DALL-E ties nothing either).
    """

    config_class = SavedPriorConfig
    transformers_name = "ImagePrior"
    noun = "prior"
    described_by = ("model", "stream")
    # Sampling refuses what the training did not allow.
    recorded = ("trained_with_caption_dropout", "trained_order", "trained_image_first")
    config: SavedPriorConfig
    rotary: Tensor
    slot_level: Tensor
    code_vectors: Tensor

    def __init__(
        self, model: PriorConfig | SavedPriorConfig, stream: StreamConfig | None = None
    ) -> None:
        if isinstance(model, SavedPriorConfig):
            saved = self.own_config_of(model)
        else:
            if stream is None:
                name = type(self).__name__
                raise ValueError(
                    f"{name} needs the stream's shape: {name}(PriorConfig(...), StreamConfig(...))"
                )
            saved = self.config_class(
                model=asdict(model), stream=json.loads(json.dumps(asdict(stream)))
            )
        super().__init__(saved)

    def _build(self) -> None:
        saved = self.config
        self.model_config = build_config(PriorConfig, saved.model or {}, "config.json")
        self.stream = Stream(build_config(StreamConfig, saved.stream or {}, "config.json"))
        width = self.model_config.width
        heads = self.model_config.heads
        self.text_embedding = nn.Embedding(self.stream.text_vocab_size, width)
        self.code_embedding = CodebookProjection(
            self.stream.num_codes, width, self.stream.config.code_dim
        )
        self.level_embedding = nn.Embedding(1 + len(self.stream.config.levels), width)
        # The rotation of queries encodes the next code's position; this encodes its level, where
        # levels share positions.
        self.target_embedding = (
            nn.Embedding(1 + len(self.stream.config.levels), width)
            if self.stream.config.any_order
            else None
        )
        self.kv_heads = self.model_config.kv_heads or heads
        hidden = self.model_config.hidden
        dropout = self.model_config.dropout

        def block(*, causal: bool) -> Block:
            return Block(width, heads, self.kv_heads, hidden, dropout, causal=causal)

        self.text_encoder = nn.ModuleList(
            block(causal=False) for _ in range(self.model_config.text_depth)
        )
        self.blocks = nn.ModuleList(block(causal=True) for _ in range(self.model_config.depth))
        self.norm = RMSNorm(width, eps=1e-6)
        self.text_head = nn.Linear(width, self.stream.text_vocab_size, bias=False)
        self.image_head = CodebookProjection(
            self.stream.num_codes, width, self.stream.config.code_dim
        )
        # Persistent, so that loading replaces them like any weight: models are built on the meta
        # device first, where there are no values to compute.
        length = self.stream.length
        self.register_buffer("rotary", torch.empty(2, length, width // heads))
        self.register_buffer("slot_level", torch.empty(length, dtype=torch.long))
        if not self.rotary.is_meta:
            places = self.stream.coordinates()
            self.rotary = rotary_table(places, width // heads, self.model_config.rope_base)
            self.slot_level = self.stream.level_index()
        self.register_buffer(
            "code_vectors", torch.zeros(self.stream.num_codes, self.stream.config.code_dim)
        )
        self.apply(self._initialize)

    @classmethod
    def check_stored(cls, config: SavedPriorConfig, stored: Mapping[str, StoredTensor]) -> None:
        """Raises ValueError where there are more blocks or positions than the weights have."""
        model = build_config(PriorConfig, config.model, "its model section")
        stream = build_config(StreamConfig, config.stream, "its stream section")
        refuse_larger("blocks", model.depth + model.text_depth, len(stored))
        length = stream.text_length + sum(level.length for level in stream.levels)
        slots = stored.get("slot_level")
        refuse_larger("positions", length, math.prod(slots.shape) if slots else 0)

    @torch.no_grad()
    def _initialize(self, module: nn.Module) -> None:
        """Normal with standard deviation width^-1/2. Projections back into the residual stream and
        heads start at zero."""
        if isinstance(module, Projection) and module.starts_at_zero:
            nn.init.zeros_(module.weight)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
        elif isinstance(module, CodebookProjection) and module is self.code_embedding:
            nn.init.normal_(module.own, std=0.5 if module.shared is None else 0.1)
            if module.shared is not None:
                nn.init.normal_(module.shared, std=0.5 * len(module.shared) ** -0.5)
        if module is self:
            nn.init.zeros_(self.text_head.weight)

    def set_codebook(self, vectors: Tensor) -> None:
        """Sets the codes' vectors (K,D) of their tokenizer, before training. They are stored
        centred, at standard deviation 1.

        Raises:
            ValueError: their shape is not (num_codes, code_dim) of the stream.
        """
        if vectors.shape != self.code_vectors.shape:
            raise ValueError(
                f"code vectors have shape {tuple(vectors.shape)} and must be "
                f"{tuple(self.code_vectors.shape)}, as in the stream"
            )
        centred = vectors.detach().float()
        centred = centred - centred.mean(0)
        self.code_vectors.copy_(centred / centred.std().clamp(min=1e-6))

    @torch.no_grad()
    def load_pretrained(self, origin: PriorModule, spelled: Sequence[Sequence[int]] = ()) -> None:
        """Copies the weights of a prior of the same architecture and codes, whose text may be
        shorter and vocabulary smaller. It may lack this one's text encoder, which then changes
        nothing at first.

        Args:
            spelled: for each new entry of the vocabulary the old text ids that spell it; it starts
                as their mean.

        Raises:
            ValueError: something else differs.
        """
        weights = origin.state_dict()
        own = self.state_dict()
        for name in ("text_embedding.weight", "text_head.weight"):
            rows = weights[name]
            weights[name] = torch.cat(
                [rows, *(rows[list(ids)].mean(0, keepdim=True) for ids in spelled)]
            )
        if not origin.text_encoder:
            weights |= {name: own[name] for name in own if name.startswith("text_encoder.")}
        # Codes lie past the text, and move with its end.
        if origin.stream.text_length < self.stream.text_length:
            weights |= {name: own[name] for name in ("rotary", "slot_level")}
        if differ := sorted(set(own) ^ set(weights)) or [
            name for name in own if own[name].shape != weights[name].shape
        ]:
            raise ValueError(
                "the prior to start from is of another architecture (first weights that differ: "
                f"{differ[:3]}); build this one with its settings"
            )
        self.load_state_dict(weights)

    def forward(
        self,
        ids: Tensor,
        position_ids: Tensor,
        cache: KeyValueCache | None = None,
        *,
        targets: Tensor | None = None,
        image_first: bool = False,
        text_logits: bool = True,
        activation_checkpointing: bool = False,
    ) -> PriorLogits:
        """Logits for the token after each of the given ones.

        Args:
            ids: (B,S) ids of the joint vocabulary (`Stream.text_first`, `Stream.image_first`).
            position_ids: (S,) or (B,S) what each id is.
            cache: keys and values of earlier tokens; those of the new ones are appended.
            targets: (S,) or (B,S) the position id of the token after each. A prior for any order
                needs it, others ignore it.
            image_first: whether the codes come before the text, all of them in this pass.
            text_logits: without them `text` of the result is (B,0,V), which spares the product with
                the whole vocabulary.
            activation_checkpointing: whether training stores each block's input alone and
                recomputes the rest for the gradient: less memory, a third more time.

        Raises:
            ValueError: there are more tokens than the cache holds, or a prior for any order is not
                given the targets. Or a prior with a text encoder is given the codes first, or a
                part of the caption.
        """
        first = 0 if cache is None else cache.filled
        length = ids.shape[1]
        past = None
        if cache is not None:
            if first + length > cache.capacity:
                raise ValueError(
                    f"the cache holds {cache.capacity} tokens, and {first} and {length} more do "
                    "not fit; "
                    "make it larger"
                )
            cached = torch.arange(first, first + length, device=ids.device)
            past = CacheView(cache, cached, attention_mask(cached, cached, cache.capacity))
        tables = self.tables()
        num_text = 0
        if not image_first:
            num_text = min(max(self.stream.text_length - 1 - first, 0), length)
        if self.text_encoder and (image_first or 0 < num_text < self.stream.text_length - 1):
            raise ValueError(
                "this prior has a text encoder, which reads a caption as a whole and before the "
                "codes; give all text at once, first"
            )
        features = self.features(
            ids,
            position_ids,
            targets,
            tables,
            past,
            num_text=num_text,
            activation_checkpointing=activation_checkpointing,
        )
        if cache is not None:
            cache.filled += length
        if image_first:
            codes = features[:, : self.stream.image_length - 1]
            text = features[:, self.stream.image_length :]
        else:
            text = features[:, :num_text]
            codes = features[:, num_text:]
        if not text_logits:
            text = text[:, :0]
        return PriorLogits(text=self.text_head(text), image=F.linear(codes, tables.head))

    def tables(self) -> CodebookTables:
        """Embeddings of all ids and rows of the image head, from the weights as they are now."""
        codes = self.code_embedding(self.code_vectors)
        edges = self.stream.level_edges.to(codes.device)
        return CodebookTables(
            torch.cat([self.text_embedding.weight, codes]),
            self.image_head(self.code_vectors),
            edges,
        )

    def features(
        self,
        ids: Tensor,
        position_ids: Tensor,
        targets: Tensor | None,
        tables: CodebookTables,
        past: CacheView | None = None,
        *,
        num_text: int,
        activation_checkpointing: bool = False,
    ) -> Tensor:
        """Normalised features (B,S,C), the input of both heads.

        Args: as of `forward`, and
            num_text: how many tokens at the front are the caption, all but its last one; the text
                encoder reads them.
        """
        levels = self.level_embedding(self.slot_level[position_ids])
        x = F.embedding(ids, tables.embeddings) + levels
        key = self._rotary(position_ids)
        rotary = RotaryEmbedding(key, key)
        if self.target_embedding is not None:
            if targets is None:
                raise ValueError(
                    "this prior takes codes in any order and needs the position of the next "
                    "one; give targets"
                )
            x = x + self.target_embedding(self.slot_level[targets])
            rotary = RotaryEmbedding(self._rotary(targets), key)
        recomputed = activation_checkpointing and self.training

        def through(
            block: nn.Module, x: Tensor, rotary: RotaryEmbedding, past: CacheView | None, layer: int
        ) -> Tensor:
            if recomputed:
                return checkpoint(block, x, rotary, past, layer, use_reentrant=False)
            return block(x, rotary, past, layer)

        if self.text_encoder and num_text:
            text, codes = x[:, :num_text], x[:, num_text:]
            of_text = self._rotary(position_ids[..., :num_text])
            for block in self.text_encoder:
                text = through(block, text, RotaryEmbedding(of_text, of_text), None, 0)
            x = torch.cat([text, codes], 1)
        for layer, block in enumerate(self.blocks):
            x = through(block, x, rotary, past, layer)
        return self.norm(x)

    def _rotary(self, position_ids: Tensor) -> Tensor:
        """What rotates queries or keys: (2,S,D) or, for position ids (B,S), (2,B,1,S,D)."""
        table = self.rotary[:, position_ids]
        return table if position_ids.ndim == 1 else table.unsqueeze(2)

    def new_cache(self, batch: int, capacity: int | None = None) -> KeyValueCache:
        """An empty cache, by default for whole streams, in the dtype and on the device of the
        weights."""
        c = self.model_config
        return KeyValueCache.empty(
            c.depth,
            batch,
            self.kv_heads,
            capacity or self.stream.length - 1,
            c.width // c.heads,
            self.text_head.weight,
        )

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The matrices inside the blocks, which optimizers for matrices may step; embeddings and
        heads are not among them."""
        blocks = (*self.text_encoder, *self.blocks)
        return [p for block in blocks for p in block.parameters() if p.ndim == 2]

    def shard_units(self) -> list[nn.Module]:
        """The parts that FSDP gathers one after another."""
        return [*self.text_encoder, *self.blocks]
