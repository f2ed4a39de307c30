"""The thread that samples: an engine of the prior, and what its jobs report to an event loop. Knows
plans and codes; no HTTP, no prompts, no images.

The event loop hands commands to the thread; the thread hands updates back. A job keeps the newest
preview of each image alone, so a client that reads slowly costs no memory. Previews are codes; who
shows them decodes them.
"""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.inference.batching import checked_compile
from pipeline.inference.plan import SamplingPlan
from pipeline.runtime.devices import is_out_of_memory
from pipeline.runtime.threads import FreeThreads
from stage2_prior import (
    CompiledSteps,
    Engine,
    Filters,
    Finished,
    PriorModule,
    Samples,
    SamplingOptions,
    StepShape,
)

_log = logging.getLogger(__name__)


class QueueFull(Exception):
    """There is no room for a job's images.

    Args:
        pending: images that are sampled or wait.
        retry_after: seconds until there may be.
    """

    def __init__(self, pending: int, retry_after: int) -> None:
        super().__init__(
            f"{pending} images are being sampled or wait, and this server has no room for those of "
            f"this request; try again in {retry_after} seconds"
        )
        self.retry_after = retry_after


class ShuttingDown(Exception):
    """The server stops, or cannot sample any more, and does not sample the rest."""

    def __init__(
        self, message: str = "the server is shutting down; send the request to another one"
    ) -> None:
        super().__init__(message)


class SamplingFailed(Exception):
    """The images of a job cannot be sampled, for a reason that is not the client's."""


NOT_FINITE = "the prior's logits were not finite, so the bundle is damaged; copy it again"
"""A reason."""


@dataclass(frozen=True)
class Preview:
    """An image in the making."""

    image: int
    """Its place in the plan."""
    codes: Tensor
    """(N,) 0 where there is none yet."""
    known: Tensor
    """(N,) bool, which codes are there."""


@dataclass(frozen=True)
class Sampled:
    """An image whose codes are complete."""

    image: int
    samples: Samples


@dataclass(eq=False)
class Job:
    """A plan that is being sampled.

    Args:
        plan: its images.
        preview_every: sampled codes between two previews of an image; None for none.
        num_known: codes of each image that are given.
    """

    plan: SamplingPlan
    preview_every: int | None
    num_known: int
    _loop: asyncio.AbstractEventLoop
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _previews: dict[int, Preview] = field(default_factory=dict)
    _sampled: list[Sampled] = field(default_factory=list)
    _error: Exception | None = None
    left: int = 0
    """Images whose end was not reported yet."""

    def __post_init__(self) -> None:
        self.left = len(self.plan.seeds)

    async def updates(self) -> AsyncIterator[Preview | Sampled]:
        """What happens to the images, until all are complete.

        Raises:
            SamplingFailed: the logits were not finite, the memory is too small, or a step failed;
                has its cause.
            ShuttingDown: the server stops.
        """
        remaining = len(self.plan.seeds)
        while remaining:
            await self._changed.wait()
            self._changed.clear()
            previews, self._previews = self._previews, {}
            sampled, self._sampled = self._sampled, []
            for preview in previews.values():
                yield preview
            for one in sampled:
                remaining -= 1
                yield one
            if self._error is not None:
                raise self._error

    # Called in the event loop

    def _receive(self, update: Preview | Sampled | Exception) -> None:
        if isinstance(update, Exception):
            self._error = self._error or update
        elif isinstance(update, Preview):
            self._previews[update.image] = update
        else:
            self._previews.pop(update.image, None)
            self._sampled.append(update)
        self._changed.set()

    # Called in the sampling thread

    def report(self, update: Preview | Sampled | Exception) -> None:
        """Hands an update to the event loop."""
        try:
            self._loop.call_soon_threadsafe(self._receive, update)
        except RuntimeError:  # the loop is closed, and nobody waits
            _log.debug("an update was dropped, since the event loop is closed")


class Sampler:
    """Samples jobs in a thread of its own, first come, first served.

    Args:
        prior: evaluated as it is, on its device.
        num_rows: rows of the engine's table: half as many guided images at a time.
        max_waiting: images that wait at most, beyond those being sampled.
        compiled: whether the steps of one image are compiled, before the constructor returns. Later
            would be wrong: torch's compiler changes modules that other threads call.
        options: what most jobs sample with; steps are compiled for its filters.
        on_step: called after each step with its seconds and the number of codes that it sampled, in
            the sampling thread.

    Raises:
        ValueError: steps are to be compiled and there is no compiler.
    """

    def __init__(
        self,
        prior: PriorModule,
        *,
        num_rows: int = 64,
        max_waiting: int = 256,
        compiled: bool = False,
        options: SamplingOptions | None = None,
        on_step: Callable[[float, int], object] = lambda seconds, codes: None,
    ) -> None:
        self.prior = prior
        self.num_rows = num_rows
        self.max_waiting = max_waiting
        self._steps = CompiledSteps(prior)
        self._on_step = on_step
        self._engine = Engine(prior, num_rows, steps=self._steps)
        self._rows = num_rows
        """Rows of the engine; 0 where there is none any more."""
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._tickets: dict[int, tuple[Job, int]] = {}
        self._lock = threading.Lock()
        self._pending = 0
        self._num_active = 0
        self._codes_per_second = 0.0
        self._closing = False
        self.has_failed = False
        """Whether no engine could be made any more: nothing is sampled until the server is started
        again."""
        if compiled:
            checked_compile("on", prior.device)
            self._compile(Filters.of([options or SamplingOptions()]))
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)
        self._thread.start()

    @property
    def num_slots(self) -> int:
        """Guided images that can be sampled at a time now."""
        return self._rows // 2

    @property
    def num_pending(self) -> int:
        """Images that are sampled or wait."""
        return self._pending

    @property
    def num_active(self) -> int:
        """Images that are sampled now."""
        return self._num_active

    @property
    def num_waiting(self) -> int:
        """Images that wait for rows."""
        return max(self._pending - self.num_active, 0)

    @property
    def capacity(self) -> int:
        """Images that are sampled or wait at most."""
        return self.num_rows // 2 + self.max_waiting

    @contextmanager
    def room(self, count: int) -> Iterator[None]:
        """Counts images as waiting while they are planned.

        Raises:
            QueueFull, ShuttingDown: as `submit`.
        """
        with self._lock:
            self._take_room(count)
        try:
            yield
        finally:
            with self._lock:
                self._pending -= count

    def _take_room(self, count: int) -> None:
        """Within the lock."""
        if self._closing:
            raise self._stopped()
        excess = self._pending + count - self.capacity
        if excess > 0:
            raise QueueFull(self._pending, self._seconds_to_wait(excess))
        self._pending += count

    def submit(self, plan: SamplingPlan, preview_every: int | None = None) -> Job:
        """Starts a job; called in an event loop, which gets the updates.

        Raises:
            QueueFull: too many images wait.
            ShuttingDown: `stop` was called, or `has_failed`.
        """
        count = len(plan.seeds)
        known = plan.num_known(self.prior.stream.image_length)
        job = Job(plan, preview_every, known, asyncio.get_running_loop())
        with self._lock:
            self._take_room(count)
            # Within the lock: after `stop` the thread ends once the commands are carried out.
            self._commands.put(lambda: self._start(job, range(count)))
        return job

    def cancel(self, job: Job) -> None:
        """Forgets what is left of a job; its rows are free at the next step."""
        self._commands.put(lambda: self._drop(job))

    def stop(self) -> None:
        """Tells the thread to end. Jobs that are left fail with `ShuttingDown`."""
        with self._lock:
            self._closing = True
        self._commands.put(lambda: None)

    def close(self) -> None:
        """Ends the thread, as `stop`, and waits for it."""
        self.stop()
        self._thread.join()

    def _seconds_to_wait(self, count: int) -> int:
        """About when so many images more are done: their codes, at the pace of the last steps."""
        codes = count * self.prior.stream.image_length
        return max(math.ceil(codes / self._codes_per_second), 1) if self._codes_per_second else 1

    def _compile(self, filters: Filters) -> None:
        """Compiles the steps of one image, which on a CPU take a third of the time of plain ones.
        Steps of more rows gain less, and would need a program for each number of them."""
        start = time.perf_counter()
        try:
            for guided in (True, False):
                self._steps.compile(StepShape.of_images(1, guided=guided, filters=filters))
        except Exception as error:  # of the compiler: plain steps do the same
            _log.warning(
                "compiling failed (%s), and continues without; check the C++ compiler", error
            )
        else:
            _log.info("compiled the steps of one image in %.0f s", time.perf_counter() - start)

    # All below runs in the thread that samples

    def _run(self) -> None:
        with FreeThreads(spare=1) as threads:  # for the event loop, and for decoding
            while not self._closing:
                try:
                    self._take_commands()
                    if self._closing:
                        break
                    threads.update()
                    if self._tickets:
                        self._step()
                except Exception as error:  # the thread must not end
                    self._recover(error)
        while not self._commands.empty():  # jobs that had not started
            self._commands.get()()
        jobs = [job for job, _ in self._tickets.values()]
        for job in jobs:  # one whose images all failed before is left alone
            self._fail(job, self._stopped())

    def _stopped(self) -> ShuttingDown:
        if self.has_failed:
            return ShuttingDown(
                "the server cannot sample any more; start it again, or send the request to another "
                "one"
            )
        return ShuttingDown()

    def _take_commands(self) -> None:
        """Carries out all commands. Waits for one where nothing is being sampled; the table has all
        its rows again by then."""
        if not self._tickets:
            if self._rows < self.num_rows and not self._made_engine(self.num_rows):
                return
            self._commands.get()()
        while not self._commands.empty():
            self._commands.get()()

    def _start(self, job: Job, images: Iterable[int]) -> None:
        """Submits images of a job, by their places in its plan."""
        if self._closing:
            self._fail(job, self._stopped())
            return
        try:
            requests = job.plan.requests()
            for image in images:
                self._tickets[self._engine.submit(requests[image])] = (job, image)
        except Exception as error:
            self._fail(job, self._failure(error))

    def _step(self) -> None:
        start = time.perf_counter()
        before = self._engine.num_sampled
        finished = self._engine.step()
        seconds = time.perf_counter() - start
        sampled = self._engine.num_sampled - before
        pace = sampled / seconds
        self._codes_per_second = 0.9 * (self._codes_per_second or pace) + 0.1 * pace
        self._on_step(seconds, sampled)
        self._num_active = self._engine.num_active
        for one in finished:
            self._finish(one)
        self._preview()

    def _finish(self, one: Finished) -> None:
        if one.ticket not in self._tickets:
            return  # another image of its job failed in this step
        job, image = self._tickets.pop(one.ticket)
        if one.samples is None:
            self._fail(job, SamplingFailed(NOT_FINITE))
        else:
            self._end(job, Sampled(image, one.samples))

    def _preview(self) -> None:
        length = self.prior.stream.image_length
        for ticket, done in self._engine.progress.items():
            job, image = self._tickets[ticket]
            if not (every := job.preview_every) or done.now == length:
                continue
            if (done.before - job.num_known) // every < (done.now - job.num_known) // every:
                job.report(Preview(image, *self._engine.codes_so_far(ticket)))

    def _recover(self, error: Exception) -> None:
        """After a step that failed: all jobs start again in half as many rows where memory was
        short, and fail otherwise. Images depend on their seeds alone, so they stay the same. Where
        no engine can be made any more, nothing is sampled until the server is started again."""
        jobs = list(dict.fromkeys(job for job, _ in self._tickets.values()))
        images = {job: [i for other, i in self._tickets.values() if other is job] for job in jobs}
        self._tickets.clear()
        rows = self._rows
        if is_out_of_memory(error) and rows > 2:
            rows = max(rows // 2, 2)
            _log.warning("out of memory in a step; continuing with %d rows", rows)
        else:
            _log.error("a step failed, and the images in it", exc_info=error)
            for job in jobs:
                self._fail(job, self._failure(error))
            jobs = []
        traceback.clear_frames(error.__traceback__)  # they hold the engine and what it computed
        self._made_engine(rows)
        for job in jobs:
            self._start(job, images[job])

    def _made_engine(self, rows: int) -> bool:
        """Replaces the engine by an empty one of so many rows, or fewer where memory is short.
        Where that fails, the sampler stops. Returns whether there is one."""
        self._num_active = 0
        del self._engine  # before another one takes its memory
        while True:
            if self.prior.device.type == "cuda":
                torch.cuda.empty_cache()
            try:
                self._engine = Engine(self.prior, rows, steps=self._steps)
            except Exception as error:
                if not is_out_of_memory(error) or rows <= 2:
                    _log.critical(
                        "the server cannot sample any more; start it again", exc_info=error
                    )
                    self._rows = 0
                    self.has_failed = True
                    self.stop()
                    return False
                rows = max(rows // 2, 2)
                _log.warning("out of memory for the table; continuing with %d rows", rows)
            else:
                self._rows = rows
                return True

    @staticmethod
    def _failure(error: Exception) -> SamplingFailed:
        """What a job ends with. Plans were checked before, so that no error is the client's."""
        message = "sampling failed; see the server's log, and try again"
        if is_out_of_memory(error):
            message = "there is not enough memory to sample one image"
        failure = SamplingFailed(message)
        failure.__cause__ = error
        return failure

    def _drop(self, job: Job) -> None:
        tickets = [ticket for ticket, (other, _) in self._tickets.items() if other is job]
        for ticket in tickets:
            self._engine.cancel(ticket)
            del self._tickets[ticket]
            self._num_active = self._engine.num_active
        self._release(job, job.left)

    def _fail(self, job: Job, error: Exception) -> None:
        """Ends all that is left of a job."""
        if job.left:
            self._drop(job)
            job.report(error)

    def _end(self, job: Job, update: Sampled) -> None:
        """Reports an image that is complete."""
        self._release(job, 1)
        job.report(update)

    def _release(self, job: Job, count: int) -> None:
        job.left -= count
        with self._lock:
            self._pending -= count
