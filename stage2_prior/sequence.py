"""The one stream of caption and codes. The only file that adds offsets; knows position ids and
token ids, nothing of networks.

Legend: B batch, T text positions, N codes of an image, S = T + N positions.

    position id  0        1 ... n    n+1    ... T-1 | T          ...  T+N-1
    token        <start>  caption    <end>  <pad>   | code 0     ...  code N-1
    predicts     the next token; position T-1 predicts code 0, and the last code is no input.

Codes may come in another order than raster: a position id says what a token is, its index in the
sequence when it comes. With codes first the sequence is code 0 ... code N-1, <start>, caption, ...:
the same position ids in another order.

The null caption is `<start> <end> <pad> ...`: what guidance subtracts. Pads are ordinary tokens
that every later token may attend to, so attention is plainly causal, but in a text encoder.
(DALL-E, Ramesh et al. 2021, section 2.2, with one pad for all positions.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stage2_prior.config import StreamConfig


class TokenSequence(NamedTuple):
    """Input of one pass over a caption and an image, S = T + N - 1 tokens."""

    ids: Tensor
    """(B,S) of the joint vocabulary."""
    position_ids: Tensor
    """(S,) or (B,S): what each token is."""
    targets: Tensor
    """(S,) or (B,S): the position id of the token that comes next."""


class Stream:
    """Position ids, offsets and targets of the stream that a `StreamConfig` describes."""

    def __init__(self, config: StreamConfig) -> None:
        self.config = config
        self.text_length = config.text_length
        self.text_vocab_size = config.text_vocab_size
        self.num_codes = sum(level.num_codes for level in config.levels)
        self.image_length = sum(level.length for level in config.levels)
        self.length = self.text_length + self.image_length
        self.vocab_size = self.text_vocab_size + self.num_codes
        code_offset = 0
        first: list[int] = []
        past: list[int] = []
        for level in config.levels:
            first += [code_offset] * level.length
            code_offset += level.num_codes
            past += [code_offset] * level.length
        # On the CPU whatever the default device is: transformers builds models on the meta device
        # and then fills their weights.
        self.level_edges = torch.tensor([first, past], device="cpu")
        """(2,N) first class of each image position's level, and the one past its last."""
        self._first_code = self.level_edges[0]

    def inputs(self, text_ids: Tensor, codes: Tensor) -> Tensor:
        """Input ids in raster order: (B,T) text ids and (B,n) leading codes, n <= N ->
        (B,T+n)."""
        return torch.cat([text_ids, self.code_ids(codes)], dim=1)

    def code_ids(self, codes: Tensor, positions: Tensor | None = None) -> Tensor:
        """Codes (B,n) that stand at image positions (n,) or (B,n), by default the first n -> ids of
        the joint vocabulary."""
        first = self._first_code.to(codes.device)
        return (
            codes
            + self.text_vocab_size
            + (first[: codes.shape[1]] if positions is None else first[positions])
        )

    def class_ids(self, classes: Tensor) -> Tensor:
        """Classes of the logits of codes -> ids of the joint vocabulary."""
        return classes + self.text_vocab_size

    def classes_of(self, ids: Tensor) -> Tensor:
        """The inverse of `class_ids`."""
        return ids - self.text_vocab_size

    def text_first(
        self, text_ids: Tensor, codes: Tensor, orders: Tensor | None = None
    ) -> TokenSequence:
        """Text ids (B,T), then all codes (B,N) but the last: in raster order, or in `orders` (B,N)
        of image positions."""
        if orders is None:
            positions = torch.arange(self.length, device=codes.device)
            inputs = self.inputs(text_ids, codes[:, :-1])
            return TokenSequence(inputs, positions[:-1], positions[1:])
        text = torch.arange(self.text_length, device=codes.device).expand(len(codes), -1)
        positions = torch.cat([text, orders + self.text_length], dim=1)
        code_ids = self.code_ids(codes.gather(1, orders), orders)
        inputs = torch.cat([text_ids, code_ids[:, :-1]], 1)
        return TokenSequence(inputs, positions[:, :-1], positions[:, 1:])

    def image_first(self, text_ids: Tensor, codes: Tensor) -> TokenSequence:
        """All codes (B,N) in raster order, then the text ids (B,T) but the last."""
        positions = torch.arange(self.length, device=codes.device).roll(self.image_length)
        inputs = torch.cat([self.code_ids(codes), text_ids[:, :-1]], 1)
        return TokenSequence(inputs, positions[:-1], positions[1:])

    def image_targets(self, codes: Tensor) -> Tensor:
        """Codes (B,N), each counted within its level -> classes (B,N) of the image logits, counted
        over all levels."""
        return codes + self._first_code.to(codes.device)

    def in_order(
        self, logits: Tensor, codes: Tensor, orders: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Image logits (B,N,K) in the order in which codes come, and codes (B,N) by image position
        -> logits with the classes of other levels ruled out, and the classes (B,N) in that order;
        raster where `orders` (B,N) is None."""
        classes = self.image_targets(codes)
        if orders is not None:
            classes = classes.gather(1, orders)
        if orders is None:
            orders = torch.arange(self.image_length, device=codes.device)
        outside = self.outside_level(orders)
        return logits if outside is None else logits.masked_fill(outside, float("-inf")), classes

    def outside_level(self, positions: Tensor, edges: Tensor | None = None) -> Tensor | None:
        """Image positions (...) -> (...,K) bool, true for classes of other levels; None where there
        is one level. `edges` are `level_edges` on the positions' device, if the caller has them."""
        if len(self.config.levels) == 1:
            return None
        classes = torch.arange(self.num_codes, device=positions.device)
        edges = self.level_edges.to(positions.device) if edges is None else edges
        first, past = edges[:, positions].unsqueeze(-1)
        return (classes < first) | (classes >= past)

    def within_level(self, classes: Tensor, positions: Tensor) -> Tensor:
        """Image classes, counted over all levels, that stand at image positions of the same shape
        -> codes counted within their level."""
        return classes - self._first_code.to(classes.device)[positions]

    def null_caption(self, batch: int, device: torch.device | str | None = None) -> Tensor:
        """The caption that says nothing: (B,T)."""
        ids = torch.full(
            (batch, self.text_length), self.config.pad_id, dtype=torch.long, device=device
        )
        ids[:, 0] = self.config.start_id
        ids[:, 1] = self.config.end_id
        return ids

    def text_targets(self, text_ids: Tensor) -> Tensor:
        """Next ids (B,T-1) for text positions 0..T-2; -100 (no loss) past the end token and for
        null captions."""
        targets = text_ids[:, 1:].clone()
        targets[targets == self.config.pad_id] = -100
        targets[text_ids[:, 1] == self.config.end_id] = -100
        return targets

    def coordinates(self) -> Tensor:
        """(S,2) row and column of each position: text position t is (t, t); codes lie past the
        text, on a unit grid.

        Levels of unlike size share the image: a code of a 4x4 level stands in the middle of the
        four codes of an 8x8 level that cover the same pixels.
        """
        finest = max(max(level.grid) for level in self.config.levels)
        diagonal = torch.arange(self.text_length, dtype=torch.float32)
        parts = [torch.stack([diagonal, diagonal], dim=1)]
        for level in self.config.levels:
            height, width = level.grid
            scale = finest / max(height, width)
            rows = (torch.arange(height) + 0.5) * scale - 0.5
            columns = (torch.arange(width) + 0.5) * scale - 0.5
            grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).reshape(-1, 2)
            parts.append(grid + self.text_length)
        return torch.cat(parts)

    def level_index(self) -> Tensor:
        """(S,) 0 for text positions, 1 + level for codes."""
        parts = [torch.zeros(self.text_length, dtype=torch.long)]
        parts += [torch.full((level.length,), 1 + i) for i, level in enumerate(self.config.levels)]
        return torch.cat(parts)
