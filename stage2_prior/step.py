"""One step of a table of rows: tokens in, codes out, whatever the request of each row. Knows
tensors; no requests, and no order of arrival.

Legend: R rows, I images, S positions of the stream, T text positions, N codes of an image, K
classes, W input tokens of a row in one step.

Tokens have a *position id* (what they are) and a *cache position* (when they come). Cache positions
0..T-1 hold the text, T+i the i-th code in that image's sampling order. A step's input is the codes
of the step before; its output is the next ones. To sample k > 1 codes at once, the last token is
repeated k times, each time with another target, at cache positions that the next step overwrites.
Each of these draft tokens attends to all earlier codes and to no other draft token, just as in
training. With k = 1 this is plain sequential sampling.

Draft tokens are sampled independently, so two of them may start the same object twice. The next
step verifies them with full context: it resamples each with the same uniform number. Most stay what
they are. From the first that changes on, the step after computes them again. So each step accepts
at least one token of the sequential sample of the same seed, and nearly all of them in practice.
What the last step samples is not verified (predictive sampling, Wiggers & Hoogeboom 2020,
arXiv:2002.09928, with draft tokens as forecasts). One more step feeds it with full context and
samples nothing, so that the log-likelihood is exact.

A guided image has two rows, one of its caption and one of the null caption. Both get the codes that
are sampled from the two. Each row has sampling options of its own, as numbers; an option that is
off has the number that changes nothing. A row that has fewer input tokens than W repeats its last
one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from stage2_prior.model import CodebookTables, PriorModule
from stage2_prior.sampling import (
    LEAST_TEMPERATURE,
    SamplingOptions,
    cumulative_sum,
    guide,
    keep_min_p,
    sample_from_uniform,
)
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
    broken: Tensor
    """(R,) position of the first step whose logits were not finite, 0 where there was none."""
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
    def empty(cls, prior: PriorModule, count: int) -> Rows:
        """Rows of no image."""
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
            broken=whole.clone(),
            noise=per_code.clone(),
            scales=torch.ones_like(per_code),
            temperature=torch.ones_like(number),
            top_k=torch.full_like(whole, stream.num_codes),
            top_p=torch.full_like(number, 2.0),
            min_p=number.clone(),
            log_p=per_code.clone(),
        )

    def part(self, rows: slice) -> Rows:
        """Some of the rows, sharing memory with these."""
        return Rows(*(one[rows] for one in self))


class Layout(NamedTuple):
    """Which rows belong to which image."""

    own: Tensor
    """(I,) the row of each image's caption."""
    null: Tensor | None
    """(I,) the row of the null caption, or the same as `own` where an image is not guided in this
    step; absent where none is."""
    image: Tensor
    """(R,) the image of each row."""

    @classmethod
    def empty(cls, prior: PriorModule, num_rows: int, num_images: int, *, guided: bool) -> Layout:
        """Every row is one of the first image's."""
        own = torch.zeros(num_images, dtype=torch.long, device=prior.device)
        image = torch.zeros(num_rows, dtype=torch.long, device=prior.device)
        return cls(own, own.clone() if guided else None, image)


Advance = Callable[[PriorModule, CodebookTables, KeyValueCache, Rows, Layout, Filters, int], None]
"""`advance`, or a compiled one."""
Prefill = Callable[[PriorModule, CodebookTables, KeyValueCache, Tensor], None]
"""`prefill`, or a compiled one."""


# Seven parameters: the state, what is constant, and what a compiled step is made for.
def advance(
    prior: PriorModule,
    tables: CodebookTables,
    cache: KeyValueCache,
    rows: Rows,
    layout: Layout,
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
        rows.ids.gather(1, before),
        rows.position_ids.gather(1, before),
        targets,
        tables,
        past,
        num_text=0,
    )
    logits = project(features, tables.head).float()
    outside = prior.stream.outside_level(targets - prior.stream.text_length, tables.level_edges)
    if outside is not None:
        logits = logits.masked_fill(outside, float("-inf"))
    step = at + 1 - prior.stream.text_length
    classes = _sampled(logits, outside, rows, layout, step, filters)[layout.image]
    there = rows.ids.gather(1, at + 1)
    ids = torch.where(position == after, there, prior.stream.class_ids(classes))
    log_p = logits.log_softmax(-1).gather(-1, prior.stream.classes_of(ids)[..., None])[..., 0]
    rows.ids.scatter_(1, at + 1, ids)
    rows.log_p.scatter_(1, step, log_p)
    finite = log_p.isfinite().all(1)
    both = finite[layout.own] if layout.null is None else finite[layout.own] & finite[layout.null]
    fine = both[layout.image] | (rows.broken != 0)
    rows.broken.copy_(torch.where(fine, rows.broken, rows.position))
    # Valid up to the first token that changed since it was an input of an earlier step.
    changed = (ids != there) & (at + 1 < position)
    valid = torch.where(changed, at + 1, position).amin(1)
    rows.filled.copy_(valid)
    rows.position.copy_(after[:, 0])


def prefill(prior: PriorModule, tables: CodebookTables, cache: KeyValueCache, ids: Tensor) -> None:
    """Fills an empty cache with captions (P,S)."""
    positions = torch.arange(ids.shape[1], device=ids.device)
    past = CacheView(cache, positions, attention_mask(positions, positions, cache.capacity))
    prior.features(ids, positions, positions + 1, tables, past, num_text=ids.shape[1])


def _sampled(
    logits: Tensor,
    outside: Tensor | None,
    rows: Rows,
    layout: Layout,
    step: Tensor,
    filters: Filters,
) -> Tensor:
    """Classes (I,W) from logits (R,W,K) by each image's options."""
    own = layout.own
    conditional = logits[own]
    chosen = conditional
    if layout.null is not None:
        scale = rows.scales[own].gather(1, step[own])[..., None]
        guided = guide(conditional, logits[layout.null], scale)
        if outside is not None:  # guidance made nan of inf - inf
            guided = guided.masked_fill(outside[own], float("-inf"))
        chosen = torch.where(scale == 1, conditional, guided)
    if filters.min_p:
        chosen = keep_min_p(chosen, conditional, rows.min_p[own][:, None, None])
    temperature = rows.temperature[own][:, None]
    greedy = temperature < LEAST_TEMPERATURE
    warped = chosen / torch.where(greedy, 1.0, temperature)[..., None]
    if filters.top_k or filters.top_p:
        warped = _keep_top(warped, rows.top_k[own], rows.top_p[own], filters)
    sampled = sample_from_uniform(warped, rows.noise[own].gather(1, step[own]))
    return torch.where(greedy, chosen.argmax(-1), sampled)


def _keep_top(logits: Tensor, top_k: Tensor, top_p: Tensor, filters: Filters) -> Tensor:
    """`keep_top_k`, then `keep_top_p`, each image (W,K) of logits (I,W,K) by its own numbers."""
    ordered, order = logits.sort(descending=True)
    if filters.top_k:
        last = (top_k - 1)[:, None, None].expand(-1, logits.shape[1], 1)
        least = ordered.gather(-1, last)
        logits = logits.masked_fill(logits < least, float("-inf"))
        ordered = ordered.masked_fill(ordered < least, float("-inf"))
    if filters.top_p:
        probabilities = ordered.softmax(-1)
        before = cumulative_sum(probabilities) - probabilities
        dropped = (before >= top_p[:, None, None]) & (before > 0)
        logits = logits.masked_fill(dropped.scatter(-1, order, dropped), float("-inf"))
    return logits
