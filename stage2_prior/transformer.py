"""Blocks of a Llama-style decoder and its key-value cache. Knows tensors of features; nothing of
text, codes or sampling.

Legend: B batch, S tokens, C width, H query heads, G key-value heads (G divides H), D width of a
head (C = H D), M positions of the cache.

RMSNorm (Zhang & Sennrich 2019), SwiGLU (Shazeer 2020), rotary positions (Su et al. 2021), QK-norm
(Henry et al. 2020).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

_FEW_ROWS = 8
"""Rows up to which a product is compiled as sums (`project`): four images with their null
branches."""


def rotary_table(coordinates: Tensor, head_width: int, base: float) -> Tensor:
    """What `rotate` multiplies by at each position: coordinates (S,2) -> (2,S,D). Half of the pairs
    turn with the row, half with the column. Where both coordinates are equal (text) this is the
    one-dimensional rotary embedding."""
    pairs = head_width // 4
    frequencies = base ** (-torch.arange(pairs, dtype=torch.float32) / pairs)
    angles = coordinates[:, :, None] * frequencies
    angles = rearrange(angles, "s two pair -> s (two pair)")
    cos = angles.cos()
    sin = angles.sin()
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)])


class RotaryEmbedding(NamedTuple):
    """What turns queries and keys: each (2,S,D), or (2,B,1,S,D) where every row of the batch has
    positions of its own."""

    query: Tensor
    key: Tensor


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turns each pair (x[..., i], x[..., i + D/2]) by its angle: x (B,H,S,D), table (2,S,D) or
    (2,B,1,S,D)."""
    table = table.to(x.dtype)
    if torch.compiler.is_compiling():  # a roll would be compiled into reads of single numbers
        (cos, _), (_, sin) = (half.chunk(2, -1) for half in table)
        left, right = x.chunk(2, -1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)
    return torch.addcmul(x * table[0], x.roll(x.shape[-1] // 2, -1), table[1])


class RMSNorm(nn.RMSNorm):
    """RMSNorm in the dtype of its input: under autocast the fp32 gain would keep the fused kernel
    from being used."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def project(x: Tensor, weight: Tensor) -> Tensor:
    """x (B,S,C) times the rows of weight (R,C) -> (B,S,R)."""
    # Compared first: a comparison of the batch size would specialise programs that are compiled for
    # any number of captions.
    one_token = x.shape[-2] == 1
    if (
        one_token
        and x.shape[0] <= _FEW_ROWS
        and torch.compiler.is_compiling()
        and x.device.type == "cpu"
    ):
        return _summed(x, weight)
    return F.linear(x, weight)


def _summed(x: Tensor, weight: Tensor) -> Tensor:
    """`project` for one token (B,1,C), as sums, for compiling: one loop that reads each weight once
    for all rows. For few rows the library's product takes longer: with 5.9M weights on two cores
    with AVX512-BF16, 930 against 590 microseconds for 4 rows and 1,200 against 910 for 8. One row
    alone was four times as fast."""
    rows = x[:, 0].float()
    weight = weight.float()
    # The concatenation makes the compiler materialise x. Otherwise it recomputes x, mostly a norm,
    # for each row of the weights.
    rows = torch.cat(rows.chunk(2, 1), 1)
    return torch.stack([(row * weight).sum(-1) for row in rows.unbind(0)]).to(x.dtype)[:, None]


class Projection(nn.Linear):
    """A linear layer without bias, by `project`; `starts_at_zero` where its output is added to the
    residual stream."""

    def __init__(self, width: int, out: int, *, starts_at_zero: bool = False) -> None:
        super().__init__(width, out, bias=False)
        self.starts_at_zero = starts_at_zero

    def forward(self, x: Tensor) -> Tensor:
        return project(x, self.weight)


class KeyValueCache:
    """Keys and values of past tokens, allocated once: for each block two tensors (B,G,M,D).

    All M positions are read each time, under a mask. Every step has the same shapes, so one
    compiled step serves all.
    """

    def __init__(self, keys: list[Tensor], values: list[Tensor]) -> None:
        self.keys = keys
        self.values = values
        self.capacity = keys[0].shape[2]
        self.filled = 0
        """Positions that hold a token, counted by `PriorModule.forward`, which fills them in
        order."""

    @classmethod
    def empty(
        cls, depth: int, batch: int, heads: int, capacity: int, head_width: int, like: Tensor
    ) -> KeyValueCache:
        """An empty cache in the dtype and on the device of `like`."""
        shape = (batch, heads, capacity, head_width)
        # Masked positions have a weight of 0, and 0 times uninitialised memory may be nan. On the
        # CPU `attend` overwrites masked scores, so keys may be uninitialised. Kernels elsewhere
        # add the mask to the scores.
        keys = like.new_empty if like.device.type == "cpu" else like.new_zeros
        return cls(
            [keys(shape) for _ in range(depth)], [like.new_zeros(shape) for _ in range(depth)]
        )

    def rows(self, part: slice) -> KeyValueCache:
        """Some rows of the batch, sharing memory with this cache."""
        return self._like([key[part] for key in self.keys], [one[part] for one in self.values])

    def clone(self) -> KeyValueCache:
        """The same in memory of its own."""
        return self._like([one.clone() for one in self.keys], [one.clone() for one in self.values])

    def _like(self, keys: list[Tensor], values: list[Tensor]) -> KeyValueCache:
        other = KeyValueCache(keys, values)
        other.filled = self.filled
        return other

    def copy_from(self, other: KeyValueCache, rows: Tensor, to: Tensor) -> None:
        """Copies all positions of another cache, which has no more than this one: its row rows[i]
        (n,) to the row to[i] (n,)."""
        for own, theirs in zip(
            [*self.keys, *self.values], [*other.keys, *other.values], strict=True
        ):
            own[to, :, : other.capacity] = theirs[rows]

    def put(
        self, layer: int, positions: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Stores keys and values (B,G,S,D) at cache positions (S,), or (B,S) where each row has its
        own; returns those of all M."""
        for held, new in ((self.keys[layer], keys), (self.values[layer], values)):
            # Under autocast their dtype is not that of the weights.
            if positions.ndim == 1:
                held.index_copy_(2, positions, new.to(held.dtype))
            else:
                # Not `scatter_`, which would copy the whole cache in a compiled step.
                row, head = (torch.arange(n, device=held.device) for n in held.shape[:2])
                at = (row[:, None, None], head[:, None], positions[:, None])
                held.index_put_(at, new.to(held.dtype))
        return self.keys[layer], self.values[layer]


class CacheView(NamedTuple):
    """What a block needs to resume from a cache."""

    cache: KeyValueCache
    positions: Tensor
    """(S,) or (B,S) cache positions of the new tokens."""
    allowed: Tensor
    """(S,M) or (B,1,S,M) the cache positions that each of them may attend to
    (`attention_mask`)."""


def attention_mask(positions: Tensor, before: Tensor, capacity: int) -> Tensor:
    """(...,S,M): a token at cache position positions[...,s] attends to itself and to all positions
    below before[...,s]."""
    every = torch.arange(capacity, device=positions.device)
    return (every < before[..., None]) | (every == positions[..., None])


def fused_attention(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None) -> Tensor:
    """`attend` by torch's kernel."""
    # Not `enable_gqa=a != b`: compiled for dynamic shapes, a comparison is a symbol, which the
    # kernel refuses.
    if query.shape[1] == key.shape[1]:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=allowed, is_causal=allowed is None
        )
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=allowed, is_causal=allowed is None, enable_gqa=True
    )


def attend(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Attention of queries (B,H,S,D) to keys and values (B,G,M,D) where `allowed` (S,M) or
    (B,1,S,M) is true; by default causal, S = M.

    Query head h looks at key-value head h // (H/G) (grouped-query attention, Ainslie et al. 2023).
    On the CPU the plain product beats the fused kernel for the short sequences here (its backward
    most of all); elsewhere the fused kernel is used.
    """
    if query.device.type != "cpu":
        return fused_attention(query, key, value, allowed)
    groups = key.shape[1]
    length = query.shape[2]
    if allowed is None:
        allowed = torch.ones(length, length, dtype=torch.bool).tril()
    shared = query.shape[1] // groups
    if shared > 1:  # all queries of one key-value head in a row, so that its keys are read once
        query = query.unflatten(1, (groups, shared)).flatten(2, 3)
        allowed = torch.cat([allowed] * shared, -2)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    seen = scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1) @ value
    return seen.unflatten(2, (shared, length)).flatten(1, 2) if shared > 1 else seen


class Attention(nn.Module):
    """Multi-head self-attention with QK-norm and rotary positions; without `causal`, of every token
    to every other one."""

    def __init__(self, width: int, heads: int, kv_heads: int, *, causal: bool = True) -> None:
        super().__init__()
        self.causal = causal
        self.heads = heads
        self.kv_heads = kv_heads
        head_width = width // heads
        self.query_key_value = Projection(width, (heads + 2 * kv_heads) * head_width)
        self.query_key_gain = nn.Parameter(torch.ones(2 * head_width))
        self.output = Projection(width, width, starts_at_zero=True)

    def forward(
        self, x: Tensor, rotary: RotaryEmbedding, past: CacheView | None, layer: int
    ) -> Tensor:
        batch, length, width = x.shape
        # Views, no einops: torch.compile takes a pattern's sizes for constants, and the number of
        # tokens varies.
        three = self.query_key_value(x).unflatten(-1, (-1, width // self.heads)).transpose(1, 2)
        q, k, v = three.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        query_gain, key_gain = self.query_key_gain.to(three.dtype).chunk(2)
        q = rotate(F.rms_norm(q, q.shape[-1:], query_gain, 1e-6), rotary.query)
        k = rotate(F.rms_norm(k, k.shape[-1:], key_gain, 1e-6), rotary.key)
        if past is not None:
            k, v = past.cache.put(layer, past.positions, k, v)
        allowed = past.allowed if past else None
        if not self.causal:
            allowed = torch.ones(length, length, dtype=torch.bool, device=x.device)
        attended = attend(q, k, v, allowed)
        return self.output(attended.transpose(1, 2).reshape(batch, length, width))


class SwiGLU(nn.Module):
    """Gated feed-forward layer: down(silu(gate(x)) * up(x)), gate and up in one product."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = Projection(width, 2 * hidden)
        self.down = Projection(hidden, width, starts_at_zero=True)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm residual block: attention, then SwiGLU."""

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        hidden: int,
        dropout: float,
        *,
        causal: bool = True,
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(width, eps=1e-6)
        self.attention = Attention(width, heads, kv_heads, causal=causal)
        self.feed_forward_norm = RMSNorm(width, eps=1e-6)
        self.feed_forward = SwiGLU(width, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, rotary: RotaryEmbedding, past: CacheView | None, layer: int
    ) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), rotary, past, layer))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
