"""Samples images of many requests at a time: a request joins at any step, and leaves when its last
code is sampled. Knows requests, their queue and their rows; slots.py has a step's arithmetic.

Continuous batching (Orca, Yu et al. 2022) with classifier-free guidance: a guided image takes two
rows of the table, any other one. Requests are served in the order of their arrival. One that does
not fit yet makes those behind it wait, so that none starves.

The active rows are the first ones: where a request leaves, rows from the end take its place. A step
computes the fewest rows of a fixed list of sizes that hold all active ones. The codes of an image
are those of `sample` with its seed, whatever else is in the table, up to rounding: products of
matrices of other sizes round otherwise, and a uniform number that falls within a rounding error of
a boundary between two codes may choose the other one.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass

import torch
from torch import Tensor

from stage2_prior.decoding import Samples, check_guidance, count_kept, sampling_orders
from stage2_prior.model import ImagePrior
from stage2_prior.sampling import SamplingOptions, guidance_at, per_seed_uniforms
from stage2_prior.slots import CompiledSteps, Filters, Rows
from stage2_prior.step import prefill
from stage2_prior.transformer import CacheView, KeyValueCache, attention_mask

_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
"""Numbers of rows that a step computes."""
_CAPTIONS_KEPT = 16
"""Captions whose keys and values stay, for further images of them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleRequest:
    """One image to sample."""

    text_ids: Tensor
    """(T,) its caption."""
    seed: int
    options: SamplingOptions
    """One code per step: `num_inference_steps` is absent."""
    known: Tensor | None = None
    """(N,) bool, the image positions whose codes are given and kept."""
    codes: Tensor | None = None
    """(N,) the given codes; other positions are ignored."""
    order: Tensor | None = None
    """(N,) the order of the codes; as of `sample` where absent."""


@dataclass(frozen=True)
class Finished:
    """A request whose codes are there."""

    ticket: int
    """What `Engine.submit` returned."""
    samples: Samples | None
    """Of one image; None where the logits were not finite."""


@dataclass(eq=False)
class _Image:
    """A request and where it is."""

    ticket: int
    request: SampleRequest
    order: Tensor
    """(1,N)"""
    num_kept: int
    scales: list[float]
    """Of each code, in the codes' order."""
    rows: list[int]
    """Its row of the table, then that of its null caption; none while it waits."""
    codes_left: int

    @property
    def num_rows(self) -> int:
        return 2 if any(scale != 1 for scale in self.scales[self.num_kept :]) else 1


class Engine:
    """A table of rows and a queue of requests. `step` does all work; nothing runs by itself, and
    one thread at a time may call it.

    Args:
        prior: evaluated as it is, on its device.
        num_rows: rows of the table, a power of two from 2 to 128: half as many guided images.
        compiled: steps that were compiled; the others are not.

    Raises:
        ValueError: `num_rows` is another number.
    """

    def __init__(
        self, prior: ImagePrior, num_rows: int = 64, *, compiled: CompiledSteps | None = None
    ) -> None:
        if num_rows not in _SIZES[1:]:
            raise ValueError(f"num_rows is {num_rows}; it must be one of {list(_SIZES[1:])}")
        self.prior = prior
        self.num_rows = num_rows
        self.compiled = compiled or CompiledSteps(prior)
        with torch.inference_mode():
            self._tables = prior.tables()
            self._cache = prior.new_cache(num_rows)
            self._rows = Rows.empty(prior, num_rows)
        self._images: list[_Image] = []
        self._queue: deque[_Image] = deque()
        self._captions: OrderedDict[tuple[int, ...], KeyValueCache] = OrderedDict()
        self._tickets = 0

    @property
    def num_active(self) -> int:
        """Images that advance by a code at each step."""
        return len(self._images)

    @property
    def num_waiting(self) -> int:
        """Requests for which no row was free yet."""
        return len(self._queue)

    @property
    def codes_left(self) -> dict[int, int]:
        """Codes that each active image still needs, by its ticket."""
        return {image.ticket: image.codes_left for image in self._images}

    def submit(self, request: SampleRequest) -> int:
        """Queues a request; it joins at the next step that has rows for it. Returns its ticket.

        Raises:
            ValueError: as `sample`; or it asks for several codes per step.
        """
        options = request.options
        stream = self.prior.stream
        if options.num_inference_steps not in (None, stream.image_length):
            raise ValueError(
                f"num_inference_steps is {options.num_inference_steps}, and an engine samples one "
                "code per step; leave it out, or call sample"
            )
        check_guidance(self.prior, options)
        known = None if request.known is None else request.known[None]
        codes = None if request.codes is None else request.codes[None]
        order = None if request.order is None else request.order[None]
        kept = count_kept(known, codes, stream.image_length)
        orders = sampling_orders(self.prior, [request.seed], known, order, None)
        length = stream.image_length
        scales = [guidance_at(i / length, options) for i in range(length)]
        self._tickets += 1
        self._queue.append(_Image(self._tickets, request, orders, kept, scales, [], length - kept))
        return self._tickets

    @torch.inference_mode()
    def cancel(self, ticket: int) -> bool:
        """Forgets a request; its rows are free at the next step. Returns whether it was there."""
        for image in self._queue:
            if image.ticket == ticket:
                self._queue.remove(image)
                return True
        for image in self._images:
            if image.ticket == ticket:
                self._leave(image)
                return True
        return False

    @torch.inference_mode()
    def codes_so_far(self, ticket: int) -> tuple[Tensor, Tensor]:
        """The codes (N,) of an active image, 0 where there is none yet, and which are there (N,).

        Raises:
            KeyError: no active image has this ticket.
        """
        for image in self._images:
            if image.ticket == ticket:
                done = self.prior.stream.image_length - image.codes_left
                there = torch.zeros(self.prior.stream.image_length, dtype=torch.bool)
                there[image.order[0, :done]] = True
                codes = self._codes(image)
                return torch.where(there, codes, 0), there
        raise KeyError(f"no active image has the ticket {ticket}")

    @torch.inference_mode()
    def step(self) -> list[Finished]:
        """Lets requests join, advances every active image by one code, and returns the images that
        are done."""
        self._admit()
        if not self._images:
            return []
        used = sum(len(image.rows) for image in self._images)
        count = next(size for size in _SIZES if size >= used)
        filters = Filters.of(image.request.options for image in self._images)
        advance = self.compiled.get(count, filters)
        cache = self._cache.rows(slice(0, count))
        advance(self.prior, self._tables, cache, self._rows.first(count), filters)
        for image in self._images:
            image.codes_left -= 1
        done = [image for image in self._images if not image.codes_left]
        finished = [Finished(image.ticket, self._samples(image)) for image in done]
        for image in done:
            self._leave(image)
        return finished

    def _admit(self) -> None:
        """Gives rows to waiting requests, in order, while there are enough."""
        used = sum(len(image.rows) for image in self._images)
        while self._queue and used + self._queue[0].num_rows <= self.num_rows:
            image = self._queue.popleft()
            image.rows = list(range(used, used + image.num_rows))
            used += image.num_rows
            self._images.append(image)
            self._start(image)

    def _start(self, image: _Image) -> None:
        """Writes an image into its rows, and reads its caption and known codes."""
        stream = self.prior.stream
        rows = self._rows
        request = image.request
        options = request.options
        captions = [request.text_ids[None].to(self.prior.device), stream.null_caption(1)]
        # The same numbers as by `sample`.
        noise = per_seed_uniforms([request.seed], stream.image_length)[0]
        for row, caption in zip(image.rows, captions, strict=False):
            rows.ids[row, : stream.text_length] = caption[0]
            rows.position_ids[row, stream.text_length :] = image.order[0] + stream.text_length
            rows.filled[row] = stream.text_length - 1 + image.num_kept
            rows.active[row] = 1
            rows.owner[row] = image.rows[0]
            rows.partner[row] = image.rows[-1]
            rows.noise[row] = noise
            rows.scales[row] = torch.tensor(image.scales)
            rows.temperature[row] = options.temperature
            rows.top_k[row] = min(options.top_k or stream.num_codes, stream.num_codes)
            rows.top_p[row] = options.top_p if options.top_p and options.top_p < 1 else 2.0
            rows.min_p[row] = options.min_p or 0.0
            rows.log_p[row] = 0.0
            for value in self._cache.values:
                value[row] = 0  # a masked nan of an earlier image would make nan
            self._cache.rows(slice(row, row + 1)).copy_from(
                self._read(caption), torch.zeros(1, dtype=torch.long, device=self.prior.device)
            )
        if image.num_kept:
            self._keep(image)

    def _read(self, caption: Tensor) -> KeyValueCache:
        """Keys and values of all but the last token of a caption (1,T)."""
        key = tuple(caption[0].tolist())
        if key not in self._captions:
            ids = caption[:, :-1].to(self.prior.device)
            cache = self.prior.new_cache(1, ids.shape[1])
            prefill(self.prior, self._tables, cache, ids)
            self._captions[key] = cache
        self._captions.move_to_end(key)
        if len(self._captions) > _CAPTIONS_KEPT:
            self._captions.popitem(last=False)
        return self._captions[key]

    def _keep(self, image: _Image) -> None:
        """Writes known codes into an image's rows, and reads all of them but the last, which is the
        first step's input."""
        stream = self.prior.stream
        assert image.request.codes is not None
        first = stream.text_length - 1
        end = first + image.num_kept
        kept = image.order[:, : image.num_kept]
        ids = stream.code_ids(image.request.codes.cpu()[None].gather(1, kept), kept)
        own = slice(image.rows[0], image.rows[-1] + 1)
        self._rows.ids[own, first + 1 : end + 1] = ids.to(self.prior.device)
        positions = torch.arange(first, end, device=self.prior.device)
        allowed = attention_mask(positions, positions, self._cache.capacity)
        self.prior.features(
            self._rows.ids[own, first:end],
            self._rows.position_ids[own, first:end],
            self._rows.position_ids[own, first + 1 : end + 1],
            self._tables,
            CacheView(self._cache.rows(own), positions, allowed),
        )

    def _leave(self, image: _Image) -> None:
        """Frees an image's rows, and moves the last active ones into their place."""
        self._images.remove(image)
        used = sum(len(other.rows) for other in self._images)
        for row in image.rows:
            self._free(row)
        holes = [row for row in image.rows if row < used]
        last = [row for other in self._images for row in other.rows if row >= used]
        for hole, row in zip(holes, last, strict=True):
            self._move(row, hole)

    def _move(self, row: int, hole: int) -> None:
        """Moves an image's row, with its keys and values."""
        image = next(image for image in self._images if row in image.rows)
        image.rows[image.rows.index(row)] = hole
        for one in (*self._rows, *self._cache.keys, *self._cache.values):
            one[hole] = one[row]
        self._free(row)
        for own in image.rows:
            self._rows.owner[own] = image.rows[0]
            self._rows.partner[own] = image.rows[-1]

    def _free(self, row: int) -> None:
        """Makes a row stand still, and refer to itself alone."""
        self._rows.active[row] = 0
        self._rows.filled[row] = self.prior.stream.text_length - 1
        self._rows.owner[row] = row
        self._rows.partner[row] = row

    def _codes(self, image: _Image) -> Tensor:
        """(N,) of an image, in raster order; those to come are of no meaning."""
        stream = self.prior.stream
        ids = self._rows.ids[image.rows[0], stream.text_length :].cpu()
        order = image.order[0]
        classes = stream.classes_of(ids)
        return torch.empty_like(classes).scatter_(0, order, stream.within_level(classes, order))

    def _samples(self, image: _Image) -> Samples | None:
        log_p = [self._rows.log_p[row].sum().cpu() for row in image.rows]
        if not all(bool(one.isfinite()) for one in log_p):
            return None
        fully_guided = all(scale != 1 for scale in image.scales[image.num_kept :])
        null = log_p[-1][None] if fully_guided else None
        return Samples(self._codes(image)[None], log_p[0][None], null, image.order)
