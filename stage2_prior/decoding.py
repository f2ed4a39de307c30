"""Draws codes from a prior: the loop over steps and its cache. Knows ids, places and slots; no
text, no images.

Legend: B images, T text slots, N codes of an image, k codes first drawn in one step.

Tokens have a *slot* (what they are) and a *place* (when they come). Places 0..T-1 hold the text,
place T+i the i-th code in the order of the image. A step feeds the codes of the step before and
reads off the next k. To draw k > 1 codes at once, the last token is fed k times, each time told
another target, at places that the next step overwrites: every one of them sees all codes drawn so
far and none of its siblings, just as in training. With k = 1 this is plain sequential sampling.

Siblings do not know each other, so two of them may begin the same object twice. But the next step
feeds them one after another anyway, and so works out what each would be drawn from had it known
those before it. It is drawn from that anew, with the same uniform number: most stay what they are,
and where one does not, the tokens from it on are fed again by the step after. Each step settles at
least one code on what sequential sampling draws from the same seed, and nearly all of them in
practice; what the last step draws or changes is not looked at again (predictive sampling, Wiggers &
Hoogeboom 2020, arXiv:2002.09928, with the siblings as forecasts).

Guidance keeps the null caption's branch as further rows of one batch. It is computed only for steps
that are guided; where guidance comes in late, the branch first catches up in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stage2_prior.model import ImagePrior
from stage2_prior.order import cosine_step_sizes, known_first, seeded_orders
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
)
from stage2_prior.transformer import CacheView, KeyValueCache, attention_mask


@dataclass
class Samples:
    """What `sample` returns."""

    codes: Tensor
    """(B,N) int64 in raster order, each counted within its level."""
    log_likelihood: Tensor
    """(B,) log p(codes decided | caption, codes known) in nats under the prior itself: no guidance,
    temperature 1, no filter. Where a step draws several codes it is near that only: codes are
    counted as they were last drawn, some of them given codes that were changed at the same time.
    `code_log_likelihood` is exact."""
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
    """Draws one image's codes for each row of `text_ids` (B,T), row i with seeds[i].

    Args:
        known: (N,) or (B,N) bool, the image positions whose codes are given and kept, as many in
            every row; none by default.
        codes: (B,N) the given codes; the others in it are not looked at.
        orders: (B,N) in which order the unknown codes come. By default raster order where the prior
            knows no other, and an order from each image's seed where it was trained on random
            ones.
        compiled: whether steps of a single code are compiled.

    Raises:
        ValueError: guidance was asked of a prior trained without caption dropout; its null caption
            means nothing. Or what is asked needs a prior that was trained on random orders, or
            there are more steps than codes to decide.
        FloatingPointError: the logits are not finite, naming the step at which it happened.
    """
    if options.guidance_scale != 1 and not prior.config.trained_with_caption_dropout:
        raise ValueError(
            f"guidance_scale {options.guidance_scale} needs a prior trained with caption dropout, "
            "and this one was not; "
            "sample with guidance_scale=1 or train with prior.objective.caption_dropout=0.1"
        )
    return _Sampling(prior, text_ids, seeds, options, known, codes, orders, compiled).run()


class _Sampling:
    """The state of one call of `sample`."""

    def __init__(
        self,
        prior: ImagePrior,
        text_ids: Tensor,
        seeds: Sequence[int],
        options: SamplingOptions,
        known: Tensor | None,
        codes: Tensor | None,
        orders: Tensor | None,
        compiled: bool,
    ) -> None:
        self.prior, self.options = prior, options
        stream, device = prior.stream, prior.device
        self.batch, self.text_length, self.image_length = (
            len(text_ids),
            stream.text_length,
            stream.image_length,
        )
        self.num_known = _number_known(known, codes, self.image_length)
        self.counts = cosine_step_sizes(
            self.image_length - self.num_known, options.num_inference_steps
        )
        self.compiled = compiled and max(self.counts) == 1
        scales = [guidance_at(i / self.image_length, options) for i in range(self.image_length)]
        self.scales, self.guided = (
            torch.tensor(scales, device=device),
            [scale != 1 for scale in scales],
        )
        self.finite: list[Tensor] = []
        self.graphs: dict[SamplingSpec, Callable[[StepInput], StepOutput]] = {}
        self.begun: set[SamplingSpec] = set()
        self.orders = _orders(prior, seeds, known, orders, options.num_inference_steps)
        shared = (self.orders == self.orders[0]).all()
        place = self.orders[0] if shared else self.orders
        text = torch.arange(self.text_length).expand(*place.shape[:-1], -1)
        # What stands at each place: shared by all rows where all images have one order, which
        # costs a step less.
        self.slots = torch.cat([text, place + self.text_length], -1).to(device)
        self.noise = per_seed_uniforms(seeds, self.image_length).to(device)
        branches = 2 if any(self.guided[self.num_known :]) else 1
        captions = (
            torch.cat([text_ids.to(device), stream.null_caption(self.batch, device)])
            if branches == 2
            else text_ids.to(device)
        )
        if not shared and branches == 2:
            self.slots = self.slots.repeat(2, 1)
        self.ids = captions.new_zeros(len(captions), stream.length)
        self.ids[:, : self.text_length] = captions
        if codes is not None and self.num_known:
            first = self.orders[:, : self.num_known]
            ids = stream.code_ids(codes.cpu().gather(1, first), first).to(device)
            self.ids[:, self.text_length : self.text_length + self.num_known] = ids.repeat(
                branches, 1
            )
        self.log_p = torch.zeros(branches, self.batch, self.image_length, device=device)
        # Siblings of a step lie at the places of the codes that it decides, which the next step
        # fills anew.
        self.places = torch.arange(stream.length, device=device)
        self.cache = prior.new_cache(len(captions))
        self.numbers = torch.tensor(
            [options.temperature or 1.0, options.top_p or 1.0, options.min_p or 0.0], device=device
        )
        self.tables = prior.tables()
        self._read_captions(captions[:, :-1])
        self.filled = [self.text_length - 1] * branches
        """Places that hold their token already, in either branch."""

    def _read_captions(self, captions: Tensor) -> None:
        """Fills the cache with all text but the last slot, which is told the image's own first
        code: each caption is read once, however many images it has."""
        unique, row = torch.unique(captions, dim=0, return_inverse=True)
        cache = self.prior.new_cache(len(unique), captions.shape[1])
        read = compiled_prefill(self.prior) if self.compiled else prefill
        read(self.prior, self.tables, cache, unique)
        self.cache.copy_from(cache, row)

    def run(self) -> Samples:
        place = self.text_length + self.num_known
        self._catch_up(0, place - 1)
        for count in self.counts:
            self._step(place, count)
            place += count
        return self._samples()

    def _catch_up(self, branch: int, place: int) -> None:
        """Feeds a branch what it has not been fed of the tokens below `place`."""
        first = self.filled[branch]
        if first >= place:
            return
        rows, part = slice(branch * self.batch, (branch + 1) * self.batch), slice(first, place)
        places = self.places[part]
        cache = self.cache.rows(rows)
        past = CacheView(cache, places, attention_mask(places, places, cache.capacity))
        slots = self.slots if self.slots.ndim == 1 else self.slots[rows]
        self.prior.features(
            self.ids[rows, part],
            slots[..., part],
            slots[..., first + 1 : place + 1],
            self.tables,
            past,
        )
        self.filled[branch] = place

    def _step(self, place: int, count: int) -> None:
        """Draws the codes of places place .. place+count-1, and those anew that were drawn without
        knowing all before them."""
        first, end, options = self.filled[0], place + count - 1, self.options
        drawn_now = slice(first + 1 - self.text_length, end + 1 - self.text_length)
        guided = any(self.guided[drawn_now])
        if guided:
            self._catch_up(1, first)
        rows = slice(None) if guided or len(self.filled) == 1 else slice(self.batch)
        slots = self.slots if self.slots.ndim == 1 else self.slots[rows]
        ids, own = self.ids[rows, first:place], slots[..., first:place]
        places = self.places[first:end]
        before = places
        if count > 1:  # the last token once for each further code
            siblings = count - 1
            ids = torch.cat([ids, ids[:, -1:].expand(-1, siblings)], 1)
            own = torch.cat([own, own[..., -1:].expand(*own.shape[:-1], siblings)], -1)
            before = places.clamp(max=place - 1)
        fed = StepInput(
            ids,
            own,
            slots[..., first + 1 : end + 1],
            places,
            before,
            self.noise[:, drawn_now],
            self.scales[drawn_now],
        )
        top_p = options.top_p is not None and options.top_p < 1
        choice = SamplingSpec(
            guided, options.temperature == 0, options.top_k, top_p, options.min_p is not None
        )
        cache = self.cache.rows(rows)
        drawn = self._drawn(cache, fed, choice)
        self.log_p[0, :, drawn_now] = drawn.log_p
        self.finite.append(drawn.log_p.isfinite().all())
        if drawn.null_log_p is not None:
            self.log_p[1, :, drawn_now] = drawn.null_log_p
        self._keep(drawn.classes + self.prior.stream.text_vocab_size, first + 1, place, guided)

    def _drawn(self, cache: KeyValueCache, fed: StepInput, choice: SamplingSpec) -> StepOutput:
        if not self.compiled:
            return decode_step(self.prior, self.tables, cache, fed, self.numbers, choice)
        if choice in self.graphs:
            return self.graphs[choice](fed)
        step = compiled_decode_step(self.prior, fed, choice)
        if (
            self.prior.device.type == "cuda" and choice in self.begun
        ):  # its first step has compiled it
            self.graphs[choice] = capture_cuda_graph(
                step, self.prior, self.tables, cache, fed, self.numbers, choice
            )
            return self.graphs[choice](fed)
        self.begun.add(choice)
        return step(self.prior, self.tables, cache, fed, self.numbers, choice)

    def _keep(self, ids: Tensor, first: int, place: int, guided: bool) -> None:
        """Takes over the ids drawn for places first, first+1, ..., of which those below `place`
        were drawn before: the tokens from the first on that is now another were fed in vain."""
        right = place
        if first < place:
            changed = (
                (ids[:, : place - first] != self.ids[: self.batch, first:place]).any(0).nonzero()
            )
            right = first + int(changed[0]) if len(changed) else place
        self.ids.view(-1, self.batch, self.ids.shape[1])[:, :, first : first + ids.shape[1]] = ids
        self.filled = [
            right if i == 0 or guided else filled for i, filled in enumerate(self.filled)
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
        classes = self.ids[: self.batch, self.text_length :] - stream.text_vocab_size
        orders = self.orders.to(classes.device)
        codes = torch.empty_like(classes).scatter_(1, orders, stream.within_level(classes, orders))
        totals = self.log_p.sum(2)
        complete = all(self.guided[self.num_known :])
        return Samples(codes, totals[0], totals[1] if complete else None, orders)


def _number_known(known: Tensor | None, codes: Tensor | None, count: int) -> int:
    """How many codes of each image are known.

    Raises:
        ValueError: not as many in each, all of them, or no codes are given.
    """
    if known is None:
        return 0
    numbers = set(known.reshape(-1, count).sum(1).tolist())
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


def _orders(
    prior: ImagePrior,
    seeds: Sequence[int],
    known: Tensor | None,
    orders: Tensor | None,
    steps: int | None,
) -> Tensor:
    """(B,N): the known codes, then the others.

    Raises:
        ValueError: a prior in raster order is asked for another.
    """
    count = prior.stream.image_length
    raster = torch.arange(count).expand(len(seeds), count)
    random = prior.config.trained_order == "random"
    if orders is None:
        orders = seeded_orders(seeds, count) if random else raster
    orders = orders.cpu() if known is None else known_first(orders.cpu(), known.cpu())
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
