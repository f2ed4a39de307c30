"""Samples images of many requests at a time: a request joins at any step, and leaves when its last
code is sampled. Knows requests, their queue and their rows; step.py has a step's arithmetic.

Continuous batching (Orca, Yu et al. 2022) with classifier-free guidance. An image has a row of the
table, and another one for the null caption while its codes are guided. Where guidance starts late,
that row first catches up in one pass. Requests are served in the order of their arrival. One that
does not fit yet makes those behind it wait, so that none starves.

Images of one code per step have the first rows, those of several the last ones: where one leaves,
the innermost rows of its kind take its place. A step computes each kind on its own, since each row
computes as many tokens as the widest one. What the second kind may take together is bounded, since
each token has logits.

The codes of an image are the same whatever else is in the table, up to rounding: products of
matrices of other sizes round otherwise, and a uniform number that falls within a rounding error of
a boundary between two codes may choose the other one.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from stage2_prior.compilation import Steps, StepShape
from stage2_prior.model import PriorModule
from stage2_prior.sampling import SamplingOptions, per_seed_uniforms
from stage2_prior.schedule import SamplingSchedule, sampling_schedule
from stage2_prior.step import Filters, Rows
from stage2_prior.table import Table

_MOST_TOKENS = 2048
"""About the most tokens that one step computes for images of several codes per step, where there is
more than one such image."""


@dataclass
class Samples:
    """Images that were sampled."""

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
    failed_step: int | None = None
    """The first step whose logits were not finite."""


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
    schedule: SamplingSchedule
    """Of one image."""
    offsets: list[int] = field(default_factory=list)
    """Where among the rows of its kind its own is, then that of the null caption where it has one
    now; none while it waits."""
    steps_taken: int = 0
    unverified: int = 0
    """Codes that the next step computes again."""

    def __post_init__(self) -> None:
        self.order = self.schedule.orders[0]
        self.num_kept = self.schedule.num_kept
        self.sizes = self.schedule.step_sizes
        self.num_rows = self.schedule.num_rows
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

    @property
    def num_verified(self) -> int:
        """Codes that the next step does not compute again."""
        return self.progress.now - self.unverified

    @property
    def is_guided(self) -> bool:
        """Whether any code of the next step is."""
        scales = self.schedule.scales[self.num_verified : self.progress.now + self._next_size()]
        return any(scale != 1 for scale in scales)

    @property
    def is_fully_guided(self) -> bool:
        return all(scale != 1 for scale in self.schedule.scales[self.num_kept :])

    def count_step(self, unverified: int) -> None:
        """Counts a step, after which so many codes are to be computed again."""
        done = self.progress.now
        self.progress = Progress(done, done + self._next_size())
        self.steps_taken += 1
        self.unverified = unverified

    def step_at(self, num_codes: int) -> int:
        """The step that comes where there are so many codes."""
        done = self.num_kept
        for step, size in enumerate(self.sizes):
            if done == num_codes:
                return step
            done += size
        return len(self.sizes)

    def _next_size(self) -> int:
        return self.sizes[self.steps_taken] if self.steps_taken < len(self.sizes) else 0


class Engine:
    """A table of rows and a queue of requests. `step` does all work; nothing runs by itself, and
    one thread at a time may call it.

    Args:
        prior: evaluated as it is, on its device.
        num_rows: rows of the table: half as many guided images.
        steps: what is compiled; nothing by default.

    Raises:
        ValueError: `num_rows` is below 1.
    """

    def __init__(
        self, prior: PriorModule, num_rows: int = 64, *, steps: Steps | None = None
    ) -> None:
        if num_rows < 1:
            raise ValueError(f"num_rows is {num_rows}; it must be at least 1")
        self.prior = prior
        self.num_rows = num_rows
        with torch.inference_mode():
            self._table = Table(prior, num_rows, steps or Steps())
        self._images: list[_Image] = []
        self._queue: deque[_Image] = deque()
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
            ValueError: as `sample`. Or the caption has not T ids, or the table has one row and the
                image is guided.
        """
        stream = self.prior.stream
        if request.text_ids.shape != (stream.text_length,):
            raise ValueError(
                f"the caption has the shape {tuple(request.text_ids.shape)}, and it must be "
                f"({stream.text_length},)"
            )
        vocabulary = stream.text_vocab_size
        if not ((request.text_ids >= 0) & (request.text_ids < vocabulary)).all():
            raise ValueError(
                f"the caption has ids out of range; they must be 0 to {vocabulary - 1}"
            )
        schedule = sampling_schedule(
            self.prior,
            [request.seed],
            request.options,
            known=None if request.known is None else request.known[None],
            codes=None if request.codes is None else request.codes[None],
            orders=None if request.order is None else request.order[None],
        )
        if schedule.num_rows > self.num_rows:
            raise ValueError(
                f"num_rows is {self.num_rows}, and a guided image needs {schedule.num_rows}; make "
                "an engine of more rows"
            )
        self._tickets += 1
        self._queue.append(_Image(self._tickets, request, schedule))
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
                self._leave([image])
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
                there = torch.zeros(self.prior.stream.image_length, dtype=torch.bool)
                there[image.order[: image.progress.now]] = True
                codes = self._codes([image])[0].cpu()
                return torch.where(there, codes, 0), there
        raise KeyError(f"no active image has the ticket {ticket}")

    @torch.inference_mode()
    def step(self) -> list[Finished]:
        """Lets requests join, takes a step of every active image, and returns the images that are
        done."""
        self._admit()
        kinds = [images for kind in (False, True) if (images := self._of_kind(kind))]
        for images in kinds:
            self._match_null_rows(images)
        for images in kinds:
            self._step(images)
        self.num_sampled += sum(i.progress.now - i.progress.before for i in self._images)
        done = [image for image in self._images if not image.num_inputs]
        finished = self._finished(done) if done else []
        self._leave(done)
        return finished

    def _of_kind(self, several: bool) -> list[_Image]:
        return [image for image in self._images if image.several == several]

    def _used(self, several: bool) -> int:
        """Rows that active images of a kind have now."""
        return sum(len(image.offsets) for image in self._of_kind(several))

    def _row(self, image: _Image, number: int) -> int:
        """The row of the table of an image's own caption (0), or its last one (-1)."""
        return self._at(image.offsets[number], image.several)

    def _at(self, offset: int, several: bool) -> int:
        """The row of the table at an offset among those of a kind."""
        return self.num_rows - 1 - offset if several else offset

    def _step(self, images: list[_Image]) -> None:
        """Takes a step of all images of a kind."""
        several = images[0].several
        used = self._used(several)
        first = self.num_rows - used if several else 0
        filters = Filters.of(image.request.options for image in images)
        shape = StepShape(used, len(images), used > len(images), filters)
        own = [self._row(image, 0) for image in images]
        layout = self._table.layout(first, shape, own, [self._row(image, -1) for image in images])
        if not several:
            self._table.advance_single(layout, shape)
            for image in images:
                image.count_step(0)
            return
        self._table.advance(first, layout, filters, max(image.num_inputs for image in images))
        rows = self._table.rows
        unverified = (rows.position - 1 - rows.filled).tolist()
        for image, row in zip(images, own, strict=True):
            image.count_step(max(unverified[row], 0))

    def _admit(self) -> None:
        """Gives rows to waiting requests, in order, while there are enough."""
        reserved = {
            kind: sum(image.num_rows for image in self._of_kind(kind)) for kind in (False, True)
        }
        used = {kind: self._used(kind) for kind in (False, True)}
        widest = max((image.most_inputs for image in self._of_kind(True)), default=0)
        joining: list[_Image] = []
        while self._queue:
            image = self._queue[0]
            kind = image.several
            if sum(reserved.values()) + image.num_rows > self.num_rows:
                break
            if kind:
                tokens = (reserved[kind] + image.num_rows) * max(widest, image.most_inputs)
                if reserved[kind] and tokens > _MOST_TOKENS:
                    break
                widest = max(widest, image.most_inputs)
            self._queue.popleft()
            image.offsets = [used[kind]]
            used[kind] += 1
            reserved[kind] += image.num_rows
            joining.append(image)
        if joining:
            try:
                self._start(joining)
            except BaseException:  # an interrupt, too, keeps the requests
                self._queue.extendleft(reversed(joining))
                raise
            self._images += joining

    def _start(self, images: list[_Image]) -> None:
        """Writes images into their rows, and reads their captions and known codes."""
        with torch.device("cpu"):  # whatever the default device is
            values = self._values(images)
        null = any(image.num_rows == 2 for image in images)
        self._table.write([self._row(image, 0) for image in images], values, also_null=null)

    def _values(self, images: list[_Image]) -> Rows:
        """The rows of images before their first step, on the CPU."""
        stream = self.prior.stream
        options = [image.request.options for image in images]
        captions = torch.stack([image.request.text_ids.cpu() for image in images])
        orders = torch.stack([image.order for image in images])
        kept = torch.tensor([image.num_kept for image in images])
        length = stream.text_length
        ids = torch.zeros(len(images), stream.length, dtype=torch.long)
        ids[:, :length] = captions
        for row, image in zip(ids, images, strict=True):
            if image.request.codes is not None:
                known = image.order[: image.num_kept]
                codes = image.request.codes.cpu().long()[known]
                row[length : length + image.num_kept] = stream.code_ids(codes[None], known[None])[0]
        text = torch.arange(length).expand(len(images), -1)
        return Rows(
            ids=ids,
            position_ids=torch.cat([text, orders + length], 1),
            filled=length - 1 + kept,
            position=length + kept,
            after=_positions_after(images, length, stream.length),
            broken=torch.zeros_like(kept),
            noise=per_seed_uniforms([i.request.seed for i in images], stream.image_length),
            scales=torch.tensor([image.schedule.scales for image in images]),
            temperature=torch.tensor([float(one.temperature) for one in options]),
            top_k=torch.tensor(
                [min(one.top_k or stream.num_codes, stream.num_codes) for one in options]
            ),
            top_p=torch.tensor(
                [one.top_p if one.top_p and one.top_p < 1 else 2.0 for one in options]
            ),
            min_p=torch.tensor([one.min_p or 0.0 for one in options]),
            log_p=torch.zeros(len(images), stream.image_length),
        )

    def _match_null_rows(self, images: list[_Image]) -> None:
        """Gives images of a kind that the next step guides a row for the null caption, and takes it
        from the others."""
        several = images[0].several
        leaving = [i for i in images if not i.is_guided and len(i.offsets) == 2]
        self._free(several, [image.offsets.pop() for image in leaving])
        joining = [i for i in images if i.is_guided and len(i.offsets) == 1]
        if not joining:
            return
        used = self._used(several)
        offsets = range(used, used + len(joining))
        own = [self._row(image, 0) for image in joining]
        self._table.copy_as_null(own, [self._at(offset, several) for offset in offsets])
        for image, offset in zip(joining, offsets, strict=True):
            image.offsets.append(offset)

    def _leave(self, images: list[_Image]) -> None:
        """Frees the rows of images."""
        self._images = [image for image in self._images if image not in images]
        for several in (False, True):
            offsets = [o for image in images if image.several == several for o in image.offsets]
            self._free(several, offsets)

    def _free(self, several: bool, offsets: list[int]) -> None:
        """Frees rows at offsets that no image of their kind has any more, and moves its innermost
        ones into their place."""
        if not offsets:
            return
        used = self._used(several)
        holes = [offset for offset in offsets if offset < used]
        inner = [
            (image, number, offset)
            for image in self._of_kind(several)
            for number, offset in enumerate(image.offsets)
            if offset >= used
        ]
        if not holes:
            return
        self._table.move(
            [self._at(offset, several) for _, _, offset in inner],
            [self._at(hole, several) for hole in holes],
        )
        for hole, (image, number, _) in zip(holes, inner, strict=True):
            image.offsets[number] = hole

    def _codes(self, images: list[_Image]) -> Tensor:
        """(n,N) of images, in raster order; those to come, and those of logits that were not
        finite, are of no meaning."""
        stream = self.prior.stream
        rows = self._table.index([self._row(image, 0) for image in images])
        classes = stream.classes_of(self._table.rows.ids[rows, stream.text_length :])
        orders = torch.stack([image.order for image in images]).to(classes.device)
        codes = stream.within_level(classes, orders).clamp(min=0)
        return torch.empty_like(classes).scatter_(1, orders, codes)

    def _finished(self, images: list[_Image]) -> list[Finished]:
        """What images that are done have sampled."""
        rows = self._table.rows
        totals = rows.log_p.sum(1)
        broken = rows.broken.tolist()
        codes = self._codes(images)
        finished = []
        for image, own_codes in zip(images, codes, strict=True):
            own = self._row(image, 0)
            if broken[own]:
                step = image.step_at(broken[own] - self.prior.stream.text_length)
                finished.append(Finished(image.ticket, None, step))
                continue
            null = totals[self._row(image, -1)][None] if image.is_fully_guided else None
            order = image.order[None].to(codes.device)
            samples = Samples(own_codes[None], totals[own][None], null, order)
            finished.append(Finished(image.ticket, _plain(samples)))
        return finished


def _plain(samples: Samples) -> Samples:
    """The same as tensors that can be changed and be part of a gradient."""
    null = samples.null_log_likelihood
    with torch.inference_mode(False):
        return Samples(
            samples.codes.clone(),
            samples.log_likelihood.clone(),
            None if null is None else null.clone(),
            samples.orders.clone(),
        )


def _positions_after(images: list[_Image], first: int, length: int) -> Tensor:
    """(n,S+1) by position of the next code: the position after that step. `first` is the position
    of an image's first code."""
    after = (torch.arange(length + 1) + 1).clamp(max=length).repeat(len(images), 1)
    for row, image in zip(after, images, strict=True):
        if image.several:  # others have the next position
            ends = first + image.num_kept + torch.tensor(image.sizes).cumsum(0)
            row[ends - torch.tensor(image.sizes)] = ends
    return after
