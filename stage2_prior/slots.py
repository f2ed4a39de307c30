"""The table of rows that an engine advances: one code per step in each of them, whatever its
request. Knows rows of tensors; knows no requests and no order of arrival.

Legend: R rows, S positions of the stream, T text positions, N codes of an image, K classes.

A guided image has two rows: that of its caption and that of the null caption, its *partner*. Both
read the codes that the first one samples; the partner's *owner* is the first row. Without guidance
a row is its own partner and owner. Each row has sampling options of its own, as numbers; an option
that is off has the number that changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from stage2_prior.model import CodebookTables, ImagePrior
from stage2_prior.sampling import (
    SamplingOptions,
    cumulative_sum,
    guide,
    keep_min_p,
    sample_from_uniform,
)
from stage2_prior.step import compile_step
from stage2_prior.transformer import CacheView, KeyValueCache, attention_mask, project


class Filters(NamedTuple):
    """Which filters any row uses; a step sorts the logits only for these."""

    top_k: bool
    top_p: bool
    min_p: bool

    @classmethod
    def of(cls, options: Iterable[SamplingOptions]) -> Filters:
        """The filters that any of these uses."""
        every = list(options)
        return cls(
            any(one.top_k is not None for one in every),
            any(one.top_p is not None and one.top_p < 1 for one in every),
            any(one.min_p is not None for one in every),
        )


class Rows(NamedTuple):
    """The state of R rows, changed in place."""

    ids: Tensor
    """(R,S) tokens by cache position: the caption's, then the codes in their order."""
    position_ids: Tensor
    """(R,S) what each of them is."""
    filled: Tensor
    """(R,) cache positions that hold their token; the token at the next one is the step's input."""
    active: Tensor
    """(R,) int64, 1 where a row advances; others compute, and nobody reads what they write."""
    owner: Tensor
    """(R,) the row whose sample this row reads."""
    partner: Tensor
    """(R,) the row of the null caption."""
    noise: Tensor
    """(R,N) uniform numbers, in the codes' order."""
    scales: Tensor
    """(R,N) guidance scales, in the codes' order."""
    temperature: Tensor
    """(R,), 0 for the likeliest code."""
    top_k: Tensor
    """(R,) int64, K where off."""
    top_p: Tensor
    """(R,), 2 where off: rounded sums of probabilities may exceed 1."""
    min_p: Tensor
    """(R,), 0 where off."""
    log_p: Tensor
    """(R,N) of what was sampled, given this row's caption, in the codes' order."""

    @classmethod
    def empty(cls, prior: ImagePrior, count: int) -> Rows:
        """Rows that do not advance."""
        stream = prior.stream
        device = prior.device
        own = torch.arange(count, device=device)
        whole = torch.zeros(count, dtype=torch.long, device=device)
        number = torch.zeros(count, device=device)
        per_code = torch.zeros(count, stream.image_length, device=device)
        per_position = torch.zeros(count, stream.length, dtype=torch.long, device=device)
        return cls(
            ids=per_position,
            position_ids=torch.arange(stream.length, device=device).repeat(count, 1),
            filled=torch.full_like(whole, stream.text_length - 1),
            active=whole.clone(),
            owner=own.clone(),
            partner=own.clone(),
            noise=per_code.clone(),
            scales=torch.ones_like(per_code),
            temperature=torch.ones_like(number),
            top_k=torch.full_like(whole, stream.num_codes),
            top_p=torch.full_like(number, 2.0),
            min_p=number.clone(),
            log_p=per_code.clone(),
        )

    def first(self, count: int) -> Rows:
        """The first rows, sharing memory with these."""
        return Rows(*(one[:count] for one in self))


Advance = Callable[[ImagePrior, CodebookTables, KeyValueCache, Rows, Filters], None]
"""`advance`, or a compiled one."""


def advance(
    prior: ImagePrior, tables: CodebookTables, cache: KeyValueCache, rows: Rows, filters: Filters
) -> None:
    """Samples the next code of each row, and stores it as the row's next token."""
    at = rows.filled[:, None]
    targets = rows.position_ids.gather(1, at + 1)
    past = CacheView(cache, at, attention_mask(at, at, cache.capacity)[:, None])
    features = prior.features(
        rows.ids.gather(1, at), rows.position_ids.gather(1, at), targets, tables, past
    )
    logits = project(features, tables.head).float()[:, 0]
    image_positions = targets[:, 0] - prior.stream.text_length
    outside = prior.stream.outside_level(image_positions, tables.level_edges)
    if outside is not None:
        logits = logits.masked_fill(outside, float("-inf"))
    step = at + 1 - prior.stream.text_length
    scale = rows.scales.gather(1, step)
    guided = guide(logits, logits[rows.partner], scale)
    if outside is not None:  # guidance made nan of inf - inf
        guided = guided.masked_fill(outside, float("-inf"))
    chosen = torch.where(scale == 1, logits, guided)
    classes = _sampled(chosen, logits, rows, step, filters)[rows.owner][:, None]
    rows.ids.scatter_(1, at + 1, prior.stream.class_ids(classes))
    rows.log_p.scatter_(1, step, logits.log_softmax(-1).gather(1, classes))
    rows.filled.add_(rows.active)


class CompiledSteps:
    """Steps of a prior that were compiled, by their number of rows and their filters."""

    def __init__(self, prior: ImagePrior) -> None:
        self.prior = prior
        self._ready: dict[tuple[int, Filters], Advance] = {}

    @torch.inference_mode()
    def compile(self, num_rows: int, filters: Filters) -> None:
        """Compiles the step for so many rows: seconds to a minute. No other thread may call modules
        meanwhile: torch's compiler replaces what calls them."""
        step = compile_step(self.prior, ("rows", filters, num_rows), advance)
        cache = self.prior.new_cache(num_rows)
        # Compiled at its first call, here on rows that stand still.
        step(self.prior, self.prior.tables(), cache, Rows.empty(self.prior, num_rows), filters)
        self._ready[num_rows, filters] = step

    def get(self, num_rows: int, filters: Filters) -> Advance:
        """The compiled step, or the plain one where none was compiled."""
        return self._ready.get((num_rows, filters), advance)


def _sampled(
    chosen: Tensor, conditional: Tensor, rows: Rows, step: Tensor, filters: Filters
) -> Tensor:
    """Classes (R,) from logits (R,K) by each row's options."""
    if filters.min_p:
        chosen = keep_min_p(chosen, conditional, rows.min_p[:, None])
    greedy = rows.temperature == 0
    warped = chosen / torch.where(greedy, 1.0, rows.temperature)[:, None]
    if filters.top_k or filters.top_p:
        warped = _keep_top(warped, rows.top_k, rows.top_p, filters)
    sampled = sample_from_uniform(warped, rows.noise.gather(1, step)[:, 0])
    return torch.where(greedy, chosen.argmax(-1), sampled)


def _keep_top(logits: Tensor, top_k: Tensor, top_p: Tensor, filters: Filters) -> Tensor:
    """`keep_top_k`, then `keep_top_p`, each row (K,) of logits (R,K) by its own numbers."""
    ordered, order = logits.sort(descending=True)
    if filters.top_k:
        least = ordered.gather(1, top_k[:, None] - 1)
        logits = logits.masked_fill(logits < least, float("-inf"))
        ordered = ordered.masked_fill(ordered < least, float("-inf"))
    if filters.top_p:
        probabilities = ordered.softmax(-1)
        before = cumulative_sum(probabilities) - probabilities
        dropped = before >= top_p[:, None]
        logits = logits.masked_fill(dropped.scatter(-1, order, dropped), float("-inf"))
    return logits
