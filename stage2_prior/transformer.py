"""Blocks of a Llama-style decoder and its key-value cache. Knows tensors of features; nothing of text, codes or sampling.

Legend: B batch, S positions, C width, H heads, D width of a head (C = H D), M positions the cache can hold.

RMSNorm (Zhang & Sennrich 2019), SwiGLU (Shazeer 2020), rotary positions (Su et al. 2021), QK-norm (Henry et al. 2020).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

_FEW_ROWS = 2
"""Rows up to which a product is compiled as a sum (`project`): a picture alone, with its null branch."""


def rotary_table(coordinates: Tensor, head_width: int, base: float) -> Tensor:
    """What `rotate` multiplies by at each slot: coordinates (S,2) -> (2,S,D). Half of the pairs turn with the row, half with the
    column; where both coordinates are equal (text) this is the one-dimensional rotary embedding."""
    pairs = head_width // 4
    frequencies = base ** (-torch.arange(pairs, dtype=torch.float32) / pairs)
    angles = coordinates[:, :, None] * frequencies
    angles = rearrange(angles, "s two pair -> s (two pair)")
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turns each pair (x[..., i], x[..., i + D/2]) by its angle: x (...,S,D), table (2,S,D)."""
    table = table.to(x.dtype)
    return torch.addcmul(x * table[0], x.roll(x.shape[-1] // 2, -1), table[1])


class RMSNorm(nn.RMSNorm):
    """RMSNorm in the dtype of its input: under autocast the fp32 gain would keep the fused kernel from being used."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def project(x: Tensor, weight: Tensor) -> Tensor:
    """x (...,C) times the rows of weight (R,C) -> (...,R)."""
    if torch.compiler.is_compiling() and x.device.type == "cpu" and x.numel() <= _FEW_ROWS * x.shape[-1]:
        # For so few rows the library's product takes about four times as long as a sum, which is compiled into one loop over the
        # weights (24 matrices of 256 features, AVX512-BF16: 980 against 250 microseconds).
        return (x.float()[..., None, :] * weight.float()).sum(-1).to(x.dtype)
    return F.linear(x, weight)


class Projection(nn.Linear):
    """A linear layer without bias, by `project`."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__(width, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return project(x, self.weight)


class KeyValueCache:
    """Keys and values of past positions, allocated once: for each block two tensors (B,H,M,D).

    All M positions are read each time, under a mask: every step has the same shapes, so that one compiled step serves all.
    """

    def __init__(self, depth: int, batch: int, heads: int, capacity: int, head_width: int, like: Tensor) -> None:
        self.keys = [like.new_zeros(batch, heads, capacity, head_width) for _ in range(depth)]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        self.capacity = capacity

    def put(self, layer: int, positions: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores keys and values (B,H,S,D) at positions (S,); returns those of all M positions."""
        for held, new in ((self.keys[layer], keys), (self.values[layer], values)):
            held.index_copy_(2, positions, new.to(held.dtype))  # autocast makes them of another type than the weights
        return self.keys[layer], self.values[layer]

    def past(self, positions: Tensor) -> Tensor:
        """(S,M): which of the M positions each of these (S,) may look at."""
        return torch.arange(self.capacity, device=positions.device) <= positions[:, None]


def attend(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Attention of queries (B,H,S,D) to keys and values (B,H,M,D) where `allowed` (S,M) is true; by default causal, S = M.

    On the CPU the plain product beats the fused kernel for the short sequences here (its backward most of all); elsewhere
    the fused kernel is used.
    """
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, is_causal=allowed is None)
    if allowed is None:
        allowed = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).tril()
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    return scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1) @ value


class Past(NamedTuple):
    """What a block needs to go on from a cache."""

    cache: KeyValueCache
    positions: Tensor
    """(S,) of the new tokens."""
    allowed: Tensor
    """`cache.past(positions)`."""


class Attention(nn.Module):
    """Multi-head causal self-attention with QK-norm and rotary positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = Projection(width, 3 * width)
        self.query_key_gain = nn.Parameter(torch.ones(2 * width // heads))
        self.output = Projection(width, width)

    def forward(self, x: Tensor, table: Tensor, past: Past | None, layer: int) -> Tensor:
        batch, length, width = x.shape
        # Queries and keys side by side (2,B,H,S,D): a code costs so few operations that their number is what takes time.
        three = self.query_key_value(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        both = F.rms_norm(three[:2], three.shape[-1:], eps=1e-6) * self.query_key_gain.view(2, 1, 1, 1, -1).to(three.dtype)
        q, k = rotate(both, table).to(three.dtype)
        v = three[2]
        if past is not None:
            k, v = past.cache.put(layer, past.positions, k, v)
        return self.output(attend(q, k, v, past.allowed if past else None).transpose(1, 2).reshape(batch, length, width))


class SwiGLU(nn.Module):
    """Gated feed-forward layer: down(silu(gate(x)) * up(x)), gate and up in one product."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = Projection(width, 2 * hidden)
        self.down = Projection(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm residual block: attention, then SwiGLU."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.feed_forward_norm = RMSNorm(width, eps=1e-6)
        self.feed_forward = SwiGLU(width, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, table: Tensor, past: Past | None, layer: int) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), table, past, layer))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
