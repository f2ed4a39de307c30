"""Samples codes from a prior: the loop over steps and its cache. Knows ids, cache positions and
position ids; no text, no images.

Legend: B images, T text positions, N codes of an image, k codes first sampled in one step.

Tokens have a *position id* (what they are) and a *cache position* (when they come). Cache positions
0..T-1 hold the text, T+i the i-th code in that image's sampling order. A step's input is the codes
of the step before; its output is the next k. To sample k > 1 codes at once, the last token is
repeated k times, each time with another target, at cache positions that the next step overwrites.
Each of these draft tokens attends to all earlier codes and to no other draft token, just as in
training. With k = 1 this is plain sequential sampling.

Draft tokens are sampled independently, so two of them may start the same object twice. The next
step verifies them with full context: it resamples each with the same uniform number. Most stay what
they are. From the first that changes on, the step after computes them again. So each step accepts
at least one token of the sequential sample of the same seed, and nearly all of them in practice.
What the last step samples is not verified (predictive sampling, Wiggers & Hoogeboom 2020,
arXiv:2002.09928, with draft tokens as forecasts). One more pass feeds it with full context, so that
the log-likelihood is exact.

Guidance computes the null caption's branch as further rows of the batch, for guided steps alone.
Where guidance starts late, the branch first catches up in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stage2_prior.model import ImagePrior
from stage2_prior.order import cosine_step_sizes, kept_first, seeded_orders
from stage2_prior.sampling import SamplingOptions, guidance_at, per_seed_uniforms
from stage2_prior.step import (
    SamplingSpec,
    StepInput,
    StepOutput,
    capture_cuda_graph,
    compiled_decode_step,
    compiled_prefill,
    decode_step,
    prefill,
    score_step,
)
from stage2_prior.transformer import CacheView, KeyValueCache, attention_mask


@dataclass
class Samples:
    """What `sample` returns."""

    codes: Tensor
    """(B,N) int64 in raster order, each counted within its level."""
    log_likelihood: Tensor
    """(B,) log p(sampled codes | caption, given codes) in nats under the prior itself: no guidance,
    temperature 1, no filter. It is that of `code_log_likelihood` in `orders`, also where a step
    samples several codes."""
    null_log_likelihood: Tensor | None
    """(B,) the same given the null caption; None where its branch was not computed for every
    code."""
    orders: Tensor
    """(B,N) image positions in the order in which the codes came."""

    def rows(self, chosen: Tensor) -> Samples:
        """Some of the images, by number (n,)."""
        chosen = chosen.to(self.codes.device)
        null = None if self.null_log_likelihood is None else self.null_log_likelihood[chosen]
        return Samples(self.codes[chosen], self.log_likelihood[chosen], null, self.orders[chosen])


@dataclass(frozen=True)
class SamplingSchedule:
    """When the codes of B images are decided."""

    orders: Tensor
    """(B,N) image positions: kept codes, then those to sample."""
    step_sizes: list[int]
    """How many codes each step samples first."""


# Eight parameters: the four by keyword are independent of each other and have defaults.
@torch.inference_mode()
def sample(
    prior: ImagePrior,
    text_ids: Tensor,
    seeds: Sequence[int],
    options: SamplingOptions,
    *,
    known: Tensor | None = None,
    codes: Tensor | None = None,
    orders: Tensor | None = None,
    compiled: bool = False,
) -> Samples:
    """Samples one image's codes for each row of `text_ids` (B,T), row i with seeds[i].

    Args:
        known: (N,) or (B,N) bool, the image positions whose codes are given and kept, as many in
            every row; none by default.
        codes: (B,N) the given codes; other positions are ignored.
        orders: (B,N) the order of the sampled codes. By default raster order, or an order from each
            image's seed where the prior was trained on random ones.
        compiled: whether steps of a single code are compiled.

    Raises:
        ValueError: guidance was asked of a prior trained without caption dropout; its null caption
            means nothing. Or the order needs a prior that was trained on random orders, or there
            are more steps than codes to sample.
        FloatingPointError: the logits are not finite; names the step.
    """
    schedule = sampling_schedule(prior, seeds, options, known=known, codes=codes, orders=orders)
    noise = per_seed_uniforms(seeds, prior.stream.image_length)
    decoder = _Decoder(prior, text_ids, schedule, noise, options, compiled=compiled)
    if codes is not None and decoder.num_kept:
        decoder.keep(codes)
    return decoder.run()


def sampling_schedule(
    prior: ImagePrior,
    seeds: Sequence[int],
    options: SamplingOptions,
    *,
    known: Tensor | None = None,
    codes: Tensor | None = None,
    orders: Tensor | None = None,
) -> SamplingSchedule:
    """The schedule of `sample`, whose arguments these are. Takes no step.

    Raises:
        ValueError: as `sample`.
    """
    check_guidance(prior, options)
    count = prior.stream.image_length
    num_kept = count_kept(known, codes, count)
    step_sizes = cosine_step_sizes(count - num_kept, options.num_inference_steps)
    orders = sampling_orders(prior, seeds, known, orders, options.num_inference_steps)
    return SamplingSchedule(orders, step_sizes)


class _Decoder:
    """The state of one call of `sample`.

    Args:
        noise: (B,N) uniform numbers, in the schedule's order.
    """

    def __init__(
        self,
        prior: ImagePrior,
        text_ids: Tensor,
        schedule: SamplingSchedule,
        noise: Tensor,
        options: SamplingOptions,
        *,
        compiled: bool,
    ) -> None:
        stream = prior.stream
        device = prior.device
        self.prior = prior
        self.options = options
        self.orders = schedule.orders
        self.noise = noise.to(device)
        self.step_sizes = schedule.step_sizes
        self.compiled = compiled and max(self.step_sizes) == 1
        self.batch = len(text_ids)
        self.text_length = stream.text_length
        self.num_kept = stream.image_length - sum(self.step_sizes)
        scales = [guidance_at(i / stream.image_length, options) for i in range(stream.image_length)]
        self.scales = torch.tensor(scales, device=device)
        self.guided = [scale != 1 for scale in scales]
        self.branches = 2 if any(self.guided[self.num_kept :]) else 1
        self.fully_guided = all(self.guided[self.num_kept :])
        captions = text_ids.to(device)
        if self.branches == 2:
            captions = torch.cat([captions, stream.null_caption(self.batch, device)])
        self.ids = captions.new_zeros(len(captions), stream.length)
        self.ids[:, : self.text_length] = captions
        self.position_ids = self._position_ids().to(device)
        self.cache_positions = torch.arange(stream.length, device=device)
        self.log_p = torch.zeros(self.branches, self.batch, stream.image_length, device=device)
        self.numbers = torch.tensor(
            [options.temperature or 1.0, options.top_p or 1.0, options.min_p or 0.0], device=device
        )
        self.finite: list[Tensor] = []
        self.graphs: dict[SamplingSpec, Callable[[StepInput], StepOutput]] = {}
        self.started: set[SamplingSpec] = set()
        self.tables = prior.tables()
        self.cache = prior.new_cache(len(captions))
        self._prefill(captions[:, :-1])
        self.filled = [self.text_length - 1] * self.branches
        """Cache positions that hold their token already, per branch."""

    def _position_ids(self) -> Tensor:
        """The position id of each cache position: (S,) where all images have one order, which makes
        a step cheaper, else a row for each row of the batch."""
        shared = bool((self.orders == self.orders[0]).all())
        image = self.orders[0] if shared else self.orders
        text = torch.arange(self.text_length).expand(*image.shape[:-1], -1)
        position_ids = torch.cat([text, image + self.text_length], -1)
        return position_ids if shared else position_ids.repeat(self.branches, 1)

    def _prefill(self, captions: Tensor) -> None:
        """Fills the cache with all text but the last token, which is input of the first step. Each
        caption is computed once, however many images it has."""
        unique, row = torch.unique(captions, dim=0, return_inverse=True)
        cache = self.prior.new_cache(len(unique), captions.shape[1])
        fill = compiled_prefill(self.prior) if self.compiled else prefill
        fill(self.prior, self.tables, cache, unique)
        self.cache.copy_from(cache, row)

    def keep(self, codes: Tensor) -> None:
        """Takes the kept ones of the given codes (B,N)."""
        kept = self.orders[:, : self.num_kept]
        ids = self.prior.stream.code_ids(codes.cpu().gather(1, kept), kept).to(self.ids.device)
        end = self.text_length + self.num_kept
        self.ids[:, self.text_length : end] = ids.repeat(self.branches, 1)

    def run(self) -> Samples:
        """Takes all steps."""
        self._catch_up(0, self.text_length + self.num_kept - 1)
        position = self.text_length + self.num_kept
        for count in self.step_sizes:
            self._step(position, count)
            position += count
        self._score_drafts()
        return self._samples()

    def _catch_up(self, branch: int, end: int) -> None:
        """Fills a branch's cache up to position `end`, exclusive."""
        first = self.filled[branch]
        if first >= end:
            return
        rows = slice(branch * self.batch, (branch + 1) * self.batch)
        positions = self.cache_positions[first:end]
        cache = self.cache.rows(rows)
        past = CacheView(cache, positions, attention_mask(positions, positions, cache.capacity))
        position_ids = self.position_ids if self.position_ids.ndim == 1 else self.position_ids[rows]
        self.prior.features(
            self.ids[rows, first:end],
            position_ids[..., first:end],
            position_ids[..., first + 1 : end + 1],
            self.tables,
            past,
        )
        self.filled[branch] = end

    def _step(self, position: int, count: int) -> None:
        """Samples the codes of positions position .. position+count-1, and resamples the draft
        tokens before them."""
        first = self.filled[0]
        end = position + count - 1
        sampled = slice(first + 1 - self.text_length, end + 1 - self.text_length)
        guided = any(self.guided[sampled])
        if guided:
            self._catch_up(1, first)
        rows = slice(None) if guided or self.branches == 1 else slice(self.batch)
        position_ids = self.position_ids if self.position_ids.ndim == 1 else self.position_ids[rows]
        ids = self.ids[rows, first:position]
        own = position_ids[..., first:position]
        cache_positions = self.cache_positions[first:end]
        before = cache_positions
        if count > 1:  # the last token once for each further code
            drafts = count - 1
            ids = torch.cat([ids, ids[:, -1:].expand(-1, drafts)], 1)
            own = torch.cat([own, own[..., -1:].expand(*own.shape[:-1], drafts)], -1)
            before = cache_positions.clamp(max=position - 1)
        targets = position_ids[..., first + 1 : end + 1]
        noise = self.noise[:, sampled]
        inputs = StepInput(ids, own, targets, cache_positions, before, noise, self.scales[sampled])
        output = self._decode(self.cache.rows(rows), inputs, self._spec(guided))
        self.log_p[0, :, sampled] = output.log_p
        self.finite.append(output.log_p.isfinite().all())
        if output.null_log_p is not None:
            self.log_p[1, :, sampled] = output.null_log_p
        ids = self.prior.stream.class_ids(output.classes)
        self._accept(ids, first + 1, position, guided)

    def _score_drafts(self) -> None:
        """Computes log p of the codes that are still draft tokens after the last step: they were
        sampled without each other. With one code per step there are none."""
        first = self.filled[0]
        end = self.prior.stream.length - 1
        if first == end:
            return
        rows = slice(None) if self.fully_guided else slice(self.batch)
        position_ids = self.position_ids if self.position_ids.ndim == 1 else self.position_ids[rows]
        scored = slice(first + 1 - self.text_length, end + 1 - self.text_length)
        positions = self.cache_positions[first:end]
        inputs = StepInput(
            self.ids[rows, first:end],
            position_ids[..., first:end],
            position_ids[..., first + 1 : end + 1],
            positions,
            positions,
            self.noise[:, scored],
            self.scales[scored],
        )
        ids = self.ids[rows, first + 1 : end + 1]
        log_p = score_step(self.prior, self.tables, self.cache.rows(rows), inputs, ids)
        for branch, part in enumerate(log_p.split(self.batch)):
            self.log_p[branch, :, scored] = part

    def _spec(self, guided: bool) -> SamplingSpec:
        options = self.options
        top_p = options.top_p is not None and options.top_p < 1
        greedy = options.temperature == 0
        return SamplingSpec(guided, greedy, options.top_k, top_p, options.min_p is not None)

    def _decode(self, cache: KeyValueCache, inputs: StepInput, spec: SamplingSpec) -> StepOutput:
        if not self.compiled:
            return decode_step(self.prior, self.tables, cache, inputs, self.numbers, spec)
        if spec in self.graphs:
            return self.graphs[spec](inputs)
        step = compiled_decode_step(self.prior, inputs, spec)
        if self.prior.device.type == "cuda" and spec in self.started:  # it is compiled by now
            self.graphs[spec] = capture_cuda_graph(
                step, self.prior, self.tables, cache, inputs, self.numbers, spec
            )
            return self.graphs[spec](inputs)
        self.started.add(spec)
        return step(self.prior, self.tables, cache, inputs, self.numbers, spec)

    def _accept(self, ids: Tensor, first: int, position: int, guided: bool) -> None:
        """Stores the ids sampled for positions first, first+1, ... Those below `position` were
        draft tokens: the cache is valid up to the first of them that changed."""
        valid = position
        if first < position:
            drafts = self.ids[: self.batch, first:position]
            changed = (ids[:, : position - first] != drafts).any(0).nonzero()
            valid = first + int(changed[0]) if len(changed) else position
        self.ids.view(-1, self.batch, self.ids.shape[1])[:, :, first : first + ids.shape[1]] = ids
        self.filled = [
            valid if i == 0 or guided else filled for i, filled in enumerate(self.filled)
        ]

    def _samples(self) -> Samples:
        finite = torch.stack(self.finite).cpu()
        if not finite.all():
            step = int((~finite).nonzero()[0])
            raise FloatingPointError(
                f"the prior's logits are not finite at step {step}; its weights are corrupted, go "
                "back to an earlier checkpoint"
            )
        stream = self.prior.stream
        classes = stream.classes_of(self.ids[: self.batch, self.text_length :])
        orders = self.orders.to(classes.device)
        codes = torch.empty_like(classes).scatter_(1, orders, stream.within_level(classes, orders))
        totals = self.log_p.sum(2)
        return Samples(codes, totals[0], totals[1] if self.fully_guided else None, orders)


def check_guidance(prior: ImagePrior, options: SamplingOptions) -> None:
    """Raises ValueError where guidance is asked of a prior trained without caption dropout."""
    if options.guidance_scale != 1 and not prior.config.trained_with_caption_dropout:
        raise ValueError(
            f"guidance_scale {options.guidance_scale} needs a prior trained with caption dropout, "
            "and this one was not; "
            "sample with guidance_scale=1 or train with prior.objective.caption_dropout=0.1"
        )


def count_kept(keep_mask: Tensor | None, codes: Tensor | None, count: int) -> int:
    """How many of the `count` codes of each image are kept.

    Raises:
        ValueError: not as many in each, all of them, or no codes are given.
    """
    if keep_mask is None:
        return 0
    numbers = set(keep_mask.reshape(-1, count).sum(1).tolist())
    if len(numbers) > 1:
        raise ValueError(
            f"the images of a batch keep {sorted(numbers)} codes; they must all keep as many"
        )
    number = int(numbers.pop())
    if number and codes is None:
        raise ValueError(f"{number} codes are known and none is given; give codes")
    if number == count:
        raise ValueError(f"all {count} codes are known; there is nothing to sample")
    return number


def sampling_orders(
    prior: ImagePrior,
    seeds: Sequence[int],
    keep_mask: Tensor | None,
    orders: Tensor | None,
    steps: int | None,
) -> Tensor:
    """(B,N): the kept codes, then the others.

    Raises:
        ValueError: a prior in raster order is asked for another.
    """
    count = prior.stream.image_length
    raster = torch.arange(count).expand(len(seeds), count)
    random = prior.config.trained_order == "random"
    if orders is None:
        orders = seeded_orders(seeds, count) if random else raster
    orders = orders.cpu()
    if keep_mask is not None:
        orders = kept_first(orders, keep_mask.cpu())
    if not random and (steps not in (None, count) or not torch.equal(orders, raster)):
        what = (
            "several codes per step"
            if torch.equal(orders, raster)
            else "codes in any order (editing, known codes but the first rows)"
        )
        raise ValueError(
            f"{what} need a prior that was trained on random orders, and this one knows "
            f"{prior.config.trained_order}; train one with "
            "prior.train.code_order=random"
        )
    return orders
