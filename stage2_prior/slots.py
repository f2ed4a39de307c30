"""The table of rows that an engine advances, whatever the request of each. Knows rows of tensors;
knows no requests and no order of arrival.

Legend: R rows, S positions of the stream, T text positions, N codes of an image, K classes, W input
tokens of a row in one step.

A guided image has two rows: that of its caption and that of the null caption, its *partner*. Both
read the codes that the first one samples; the partner's *owner* is the first row. Without guidance
a row is its own partner and owner. Each row has sampling options of its own, as numbers; an option
that is off has the number that changes nothing.

A row may sample several codes in one step; decoding.py says how they are verified. A row that has
fewer input tokens than W repeats its last one. After its last code, a row has one step more that
samples nothing, where codes are left that were not verified: it computes their log p.
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
    """(R,) cache positions that hold their token; the token at the next one is the first input."""
    position: Tensor
    """(R,) cache position of the next code to sample, S after the last."""
    after: Tensor
    """(R,S+1) by position: the position after that step."""
    active: Tensor
    """(R,) int64, 1 where a row advances; others compute, and nobody reads what they write."""
    owner: Tensor
    """(R,) how many rows further down is the row whose sample this row reads."""
    partner: Tensor
    """(R,) how many rows further down is the row of the null caption."""
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
        positions = torch.arange(stream.length + 1, device=device)
        whole = torch.zeros(count, dtype=torch.long, device=device)
        number = torch.zeros(count, device=device)
        per_code = torch.zeros(count, stream.image_length, device=device)
        per_position = torch.zeros(count, stream.length, dtype=torch.long, device=device)
        return cls(
            ids=per_position,
            position_ids=positions[:-1].repeat(count, 1),
            filled=torch.full_like(whole, stream.text_length - 1),
            position=torch.full_like(whole, stream.text_length),
            after=(positions + 1).clamp(max=stream.length).repeat(count, 1),
            active=whole.clone(),
            owner=whole.clone(),
            partner=whole.clone(),
            noise=per_code.clone(),
            scales=torch.ones_like(per_code),
            temperature=torch.ones_like(number),
            top_k=torch.full_like(whole, stream.num_codes),
            top_p=torch.full_like(number, 2.0),
            min_p=number.clone(),
            log_p=per_code.clone(),
        )

    def part(self, rows: slice) -> Rows:
        """Some of the rows, sharing memory with these; partners and owners must be among them."""
        return Rows(*(one[rows] for one in self))


Advance = Callable[[ImagePrior, CodebookTables, KeyValueCache, Rows, Filters, int], None]
"""`advance`, or a compiled one."""


# Six parameters: the state, what is constant, and what a compiled step is made for.
def advance(
    prior: ImagePrior,
    tables: CodebookTables,
    cache: KeyValueCache,
    rows: Rows,
    filters: Filters,
    width: int,
) -> None:
    """Takes the next step of each row: samples its codes, and stores them as its next tokens.

    Args:
        width: W, at least as many as any row has inputs. With 1, each row samples one code.
    """
    position = rows.position[:, None]
    after = rows.after.gather(1, position)
    at = rows.filled[:, None] + torch.arange(width, device=rows.filled.device)
    at = torch.minimum(at, after - 2)
    # Codes that are sampled together repeat the last token, and do not attend to each other.
    before = torch.minimum(at, position - 1)
    targets = rows.position_ids.gather(1, at + 1)
    past = CacheView(cache, at, attention_mask(at, before, cache.capacity)[:, None])
    features = prior.features(
        rows.ids.gather(1, before), rows.position_ids.gather(1, before), targets, tables, past
    )
    logits = project(features, tables.head).float()
    outside = prior.stream.outside_level(targets - prior.stream.text_length, tables.level_edges)
    if outside is not None:
        logits = logits.masked_fill(outside, float("-inf"))
    own = torch.arange(len(rows.filled), device=rows.filled.device)
    step = at + 1 - prior.stream.text_length
    scale = rows.scales.gather(1, step)[..., None]
    guided = guide(logits, logits[own + rows.partner], scale)
    if outside is not None:  # guidance made nan of inf - inf
        guided = guided.masked_fill(outside, float("-inf"))
    chosen = torch.where(scale == 1, logits, guided)
    classes = _sampled(chosen, logits, rows, step, filters)[own + rows.owner]
    there = rows.ids.gather(1, at + 1)
    ids = torch.where(position == after, there, prior.stream.class_ids(classes))
    log_p = logits.log_softmax(-1).gather(-1, prior.stream.classes_of(ids)[..., None])[..., 0]
    rows.ids.scatter_(1, at + 1, ids)
    rows.log_p.scatter_(1, step, log_p)
    # Valid up to the first token that changed since it was an input of an earlier step.
    changed = (ids != there) & (at + 1 < position)
    valid = torch.where(changed, at + 1, position).amin(1)
    active = rows.active == 1
    rows.filled.copy_(torch.where(active, valid, rows.filled))
    rows.position.copy_(torch.where(active, after[:, 0], rows.position))


class CompiledSteps:
    """Steps of one code that were compiled, by their number of rows and their filters."""

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
        step(self.prior, self.prior.tables(), cache, Rows.empty(self.prior, num_rows), filters, 1)
        self._ready[num_rows, filters] = step

    def get(self, num_rows: int, filters: Filters) -> Advance:
        """The compiled step, or the plain one where none was compiled."""
        return self._ready.get((num_rows, filters), advance)


def _sampled(
    chosen: Tensor, conditional: Tensor, rows: Rows, step: Tensor, filters: Filters
) -> Tensor:
    """Classes (R,W) from logits (R,W,K) by each row's options."""
    if filters.min_p:
        chosen = keep_min_p(chosen, conditional, rows.min_p[:, None, None])
    greedy = (rows.temperature == 0)[:, None]
    warped = chosen / torch.where(greedy, 1.0, rows.temperature[:, None])[..., None]
    if filters.top_k or filters.top_p:
        warped = _keep_top(warped, rows.top_k, rows.top_p, filters)
    sampled = sample_from_uniform(warped, rows.noise.gather(1, step))
    return torch.where(greedy, chosen.argmax(-1), sampled)


def _keep_top(logits: Tensor, top_k: Tensor, top_p: Tensor, filters: Filters) -> Tensor:
    """`keep_top_k`, then `keep_top_p`, each row (W,K) of logits (R,W,K) by its own numbers."""
    ordered, order = logits.sort(descending=True)
    if filters.top_k:
        last = (top_k - 1)[:, None, None].expand(-1, logits.shape[1], 1)
        least = ordered.gather(-1, last)
        logits = logits.masked_fill(logits < least, float("-inf"))
        ordered = ordered.masked_fill(ordered < least, float("-inf"))
    if filters.top_p:
        probabilities = ordered.softmax(-1)
        before = cumulative_sum(probabilities) - probabilities
        dropped = before >= top_p[:, None, None]
        logits = logits.masked_fill(dropped.scatter(-1, order, dropped), float("-inf"))
    return logits
