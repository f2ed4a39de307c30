"""Blocks of a Llama-style decoder and its key-value cache. Knows tensors of features; nothing of text, codes or sampling.

Legend: B batch, S positions, C width, H heads, D width of a head (C = H D), M positions the cache can hold.

RMSNorm (Zhang & Sennrich 2019), SwiGLU (Shazeer 2020), rotary positions (Su et al. 2021), QK-norm (Henry et al. 2020).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def rotary_table(coordinates: Tensor, head_width: int, base: float) -> Tensor:
    """cos and sin for each slot: coordinates (S,2) -> (2,S,D/2). Half of the pairs turn with the row, half with the column;
    where both coordinates are equal (text) this is the one-dimensional rotary embedding."""
    pairs = head_width // 4
    frequencies = base ** (-torch.arange(pairs, dtype=torch.float32) / pairs)
    angles = coordinates[:, :, None] * frequencies
    angles = rearrange(angles, "s two pair -> s (two pair)")
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turns each pair (x[..., i], x[..., i + D/2]) by its angle: x (B,H,S,D), table (2,S,D/2) or (2,B,1,S,D/2)."""
    cos, sin = table[0].to(x.dtype), table[1].to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class RMSNorm(nn.RMSNorm):
    """RMSNorm in the dtype of its input: under autocast the fp32 gain would keep the fused kernel from being used."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class KeyValueCache:
    """Keys and values of past positions, allocated once: two tensors (depth,B,H,M,D). `length` positions are filled."""

    def __init__(self, depth: int, batch: int, heads: int, capacity: int, head_width: int, like: Tensor) -> None:
        self.keys = like.new_zeros(depth, batch, heads, capacity, head_width)
        self.values = torch.zeros_like(self.keys)
        self.length = 0

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores keys and values (B,H,S,D) of the next S positions; returns those of all positions so far."""
        start, stop = self.length, self.length + keys.shape[2]
        if stop > self.keys.shape[3]:
            raise ValueError(f"the cache holds {self.keys.shape[3]} positions; position {stop - 1} does not fit")
        self.keys[layer, :, :, start:stop] = keys
        self.values[layer, :, :, start:stop] = values
        return self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop]


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention: query (B,H,S,D) are the last S of the M positions of key and value (B,H,M,D) -> (B,H,S,D).

    On the CPU the plain product beats the fused kernel for the short sequences here (its backward most of all); elsewhere
    the fused kernel is used.
    """
    new, total = query.shape[2], key.shape[2]
    if query.device.type != "cpu":
        if new == total:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)
        if new == 1:
            return F.scaled_dot_product_attention(query, key, value)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if new > 1:
        future = torch.ones(new, total, dtype=torch.bool, device=query.device).triu(total - new + 1)
        scores = scores.masked_fill(future, float("-inf"))
    return scores.softmax(dim=-1) @ value


class Attention(nn.Module):
    """Multi-head causal self-attention with QK-norm and rotary positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.query_norm = RMSNorm(width // heads, eps=1e-6)
        self.key_norm = RMSNorm(width // heads, eps=1e-6)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, table: Tensor, cache: KeyValueCache | None, layer: int) -> Tensor:
        q, k, v = rearrange(self.query_key_value(x), "b s (three h d) -> three b h s d", three=3, h=self.heads)
        q = rotate(self.query_norm(q), table).to(v.dtype)
        k = rotate(self.key_norm(k), table).to(v.dtype)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        return self.output(rearrange(attend(q, k, v), "b h s d -> b s (h d)"))


class SwiGLU(nn.Module):
    """Gated feed-forward layer: down(silu(gate(x)) * up(x)), gate and up in one product."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

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

    def forward(self, x: Tensor, table: Tensor, cache: KeyValueCache | None, layer: int) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), table, cache, layer))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
