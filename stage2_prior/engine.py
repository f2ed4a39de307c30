"""Samples images of many requests at a time: a request joins at any step, and leaves when its last
code is sampled. Knows requests, their queue and their rows; slots.py has a step's arithmetic.

Continuous batching (Orca, Yu et al. 2022) with classifier-free guidance: a guided image takes two
rows of the table, any other one. Requests are served in the order of their arrival. One that does
not fit yet makes those behind it wait, so that none starves.

Images of one code per step have the first rows, those of several the last ones: where one leaves,
the innermost rows of its kind take its place. A step computes each kind on its own, since each row
computes as many tokens as the widest one. Of the first kind it computes the fewest rows of a fixed
list of sizes that hold all active ones, or just these where so many are not free. What the second
kind may take together is bounded, since each token has logits.

The codes of an image are those of `sample` with its seed, whatever else is in the table, up to
rounding: products of matrices of other sizes round otherwise, and a uniform number that falls
within a rounding error of a boundary between two codes may choose the other one.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from stage2_prior.decoding import Samples, check_guidance, count_kept, sampling_orders
from stage2_prior.model import ImagePrior
from stage2_prior.order import cosine_step_sizes
from stage2_prior.sampling import SamplingOptions, guidance_at, per_seed_uniforms
from stage2_prior.slots import Advance, CompiledSteps, Filters, Rows, advance
from stage2_prior.step import prefill
from stage2_prior.transformer import CacheView, KeyValueCache, attention_mask

_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
"""Numbers of rows of one code per step that a step computes."""
_MOST_TOKENS = 2048
"""About the most tokens that one step computes for images of several codes per step, where there is
more than one such image."""
_CAPTIONS_KEPT = 16
"""Captions whose keys and values stay, for further images of them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleRequest:
    """One image to sample."""

    text_ids: Tensor
    """(T,) its caption."""
    seed: int
    options: SamplingOptions
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


class Progress(NamedTuple):
    """Codes of an image that are there, known ones included."""

    before: int
    """Before its last step."""
    now: int


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
    sizes: list[int]
    """Codes that each of its steps samples first."""
    offsets: list[int] = field(default_factory=list)
    """Where among the rows of its kind its own is, then that of its null caption; none while it
    waits."""
    steps_taken: int = 0
    unverified: int = 0
    """Codes that the next step computes again."""

    def __post_init__(self) -> None:
        self.num_rows = 2 if any(scale != 1 for scale in self.scales[self.num_kept :]) else 1
        self.several = max(self.sizes) > 1
        """Whether any step samples several codes."""
        self.progress = Progress(self.num_kept, self.num_kept)

    @property
    def num_inputs(self) -> int:
        """Of its next step; none where it is done."""
        return self.unverified + self._next_size()

    @property
    def most_inputs(self) -> int:
        """About how many a step has at most: its own codes, and those of the step before."""
        return 2 * max(self.sizes)

    def count_step(self, unverified: int) -> None:
        """Counts a step, after which so many codes are to be computed again."""
        done = self.progress.now
        self.progress = Progress(done, done + self._next_size())
        self.steps_taken += 1
        self.unverified = unverified

    def _next_size(self) -> int:
        return self.sizes[self.steps_taken] if self.steps_taken < len(self.sizes) else 0


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
        self.num_sampled = 0
        """Codes that were sampled since the engine was made."""

    @property
    def num_active(self) -> int:
        """Images that advance at each step."""
        return len(self._images)

    @property
    def num_waiting(self) -> int:
        """Requests for which no row was free yet."""
        return len(self._queue)

    @property
    def progress(self) -> dict[int, Progress]:
        """How far each active image is, by its ticket."""
        return {image.ticket: image.progress for image in self._images}

    def submit(self, request: SampleRequest) -> int:
        """Queues a request; it joins at the next step that has rows for it. Returns its ticket.

        Raises:
            ValueError: as `sample`.
        """
        options = request.options
        length = self.prior.stream.image_length
        check_guidance(self.prior, options)
        known = None if request.known is None else request.known[None]
        codes = None if request.codes is None else request.codes[None]
        order = None if request.order is None else request.order[None]
        kept = count_kept(known, codes, length)
        steps = options.num_inference_steps
        sizes = cosine_step_sizes(length - kept, steps)
        orders = sampling_orders(self.prior, [request.seed], known, order, steps)
        scales = [guidance_at(i / length, options) for i in range(length)]
        self._tickets += 1
        self._queue.append(_Image(self._tickets, request, orders, kept, scales, sizes))
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
        Where a step samples several codes, those of the last steps may still change.

        Raises:
            KeyError: no active image has this ticket.
        """
        for image in self._images:
            if image.ticket == ticket:
                done = image.progress.now
                there = torch.zeros(self.prior.stream.image_length, dtype=torch.bool)
                there[image.order[0, :done]] = True
                codes = self._codes(image)
                return torch.where(there, codes, 0), there
        raise KeyError(f"no active image has the ticket {ticket}")

    @torch.inference_mode()
    def step(self) -> list[Finished]:
        """Lets requests join, takes a step of every active image, and returns the images that are
        done."""
        self._admit()
        self._step_single()
        self._step_several()
        self.num_sampled += sum(i.progress.now - i.progress.before for i in self._images)
        done = [image for image in self._images if not image.num_inputs]
        finished = [Finished(image.ticket, self._samples(image)) for image in done]
        for image in done:
            self._leave(image)
        return finished

    def _of_kind(self, several: bool) -> list[_Image]:
        return [image for image in self._images if image.several == several]

    def _used(self, several: bool) -> int:
        """Rows that active images of a kind have."""
        return sum(len(image.offsets) for image in self._of_kind(several))

    def _row(self, image: _Image, offset: int) -> int:
        """The row of the table at an offset among those of an image's kind."""
        return self.num_rows - 1 - offset if image.several else offset

    def _rows_of(self, image: _Image) -> list[int]:
        return [self._row(image, offset) for offset in image.offsets]

    def _step_single(self) -> None:
        """Takes a step of the images of one code per step."""
        images = self._of_kind(several=False)
        if not images:
            return
        used = self._used(several=False)
        free = self.num_rows - self._used(several=True)
        count = next(size for size in _SIZES if size >= used)
        count = count if count <= free else used
        filters = Filters.of(image.request.options for image in images)
        self._advance(slice(0, count), filters, 1, self.compiled.get(count, filters))
        for image in images:
            image.count_step(0)

    def _step_several(self) -> None:
        """Takes a step of the images of several codes per step."""
        images = self._of_kind(several=True)
        if not images:
            return
        part = slice(self.num_rows - self._used(several=True), self.num_rows)
        filters = Filters.of(image.request.options for image in images)
        self._advance(part, filters, max(image.num_inputs for image in images), advance)
        unverified = (self._rows.position - 1 - self._rows.filled).tolist()
        for image in images:
            image.count_step(max(unverified[self._rows_of(image)[0]], 0))

    def _advance(self, part: slice, filters: Filters, width: int, step: Advance) -> None:
        """Takes a step of some rows."""
        rows = self._rows.part(part)
        step(self.prior, self._tables, self._cache.rows(part), rows, filters, width)

    def _admit(self) -> None:
        """Gives rows to waiting requests, in order, while there are enough."""
        while self._queue:
            image = self._queue[0]
            used = self._used(image.several)
            if used + self._used(not image.several) + image.num_rows > self.num_rows:
                return
            together = [image, *self._of_kind(several=True)]
            tokens = (used + image.num_rows) * max(one.most_inputs for one in together)
            if image.several and used and tokens > _MOST_TOKENS:
                return
            self._queue.popleft()
            image.offsets = list(range(used, used + image.num_rows))
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
        first = stream.text_length + image.num_kept
        after = (torch.arange(stream.length + 1) + 1).clamp(max=stream.length)
        for size in image.sizes:
            after[first] = first + size
            first += size
        self._refer(image)
        for row, caption in zip(self._rows_of(image), captions, strict=False):
            rows.ids[row, : stream.text_length] = caption[0]
            rows.position_ids[row, stream.text_length :] = image.order[0] + stream.text_length
            rows.filled[row] = stream.text_length - 1 + image.num_kept
            rows.position[row] = stream.text_length + image.num_kept
            rows.after[row] = after
            rows.active[row] = 1
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

    def _refer(self, image: _Image) -> None:
        """Writes into an image's rows where its other one is."""
        own = self._rows_of(image)
        for row in own:
            self._rows.owner[row] = own[0] - row
            self._rows.partner[row] = own[-1] - row

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
        rows = self._rows_of(image)
        own = slice(min(rows), max(rows) + 1)
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
        """Frees an image's rows, and moves the innermost ones of its kind into their place."""
        self._images.remove(image)
        used = self._used(image.several)
        for row in self._rows_of(image):
            self._free(row)
        holes = [offset for offset in image.offsets if offset < used]
        inner = [
            (other, number)
            for other in self._of_kind(image.several)
            for number, offset in enumerate(other.offsets)
            if offset >= used
        ]
        for hole, (other, number) in zip(holes, inner, strict=True):
            self._move(other, number, hole)

    def _move(self, image: _Image, number: int, offset: int) -> None:
        """Moves one of an image's rows, with its keys and values, to a free offset of its kind."""
        row = self._row(image, image.offsets[number])
        hole = self._row(image, offset)
        image.offsets[number] = offset
        for one in (*self._rows, *self._cache.keys, *self._cache.values):
            one[hole] = one[row]
        self._free(row)
        self._refer(image)

    def _free(self, row: int) -> None:
        """Makes a row stand still, and refer to itself alone."""
        self._rows.active[row] = 0
        self._rows.filled[row] = self.prior.stream.text_length - 1
        self._rows.position[row] = self.prior.stream.text_length
        self._rows.owner[row] = 0
        self._rows.partner[row] = 0

    def _codes(self, image: _Image) -> Tensor:
        """(N,) of an image, in raster order; those to come are of no meaning."""
        stream = self.prior.stream
        ids = self._rows.ids[self._rows_of(image)[0], stream.text_length :].cpu()
        order = image.order[0]
        classes = stream.classes_of(ids)
        return torch.empty_like(classes).scatter_(0, order, stream.within_level(classes, order))

    def _samples(self, image: _Image) -> Samples | None:
        log_p = [self._rows.log_p[row].sum().cpu() for row in self._rows_of(image)]
        if not all(bool(one.isfinite()) for one in log_p):
            return None
        fully_guided = all(scale != 1 for scale in image.scales[image.num_kept :])
        null = log_p[-1][None] if fully_guided else None
        return Samples(self._codes(image)[None], log_p[0][None], null, image.order)
