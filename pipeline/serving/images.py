"""Requests for images -> plans -> images in bytes, as they become ready. Knows the pipeline and the
sampler; no HTTP.

Work of more than a millisecond runs in threads, so that the event loop stays free. At most one
thread plans and decodes at a time: it competes with the sampling steps for the same cores. Another
one scores and captions, so that images do not wait for that.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ParamSpec, TypeVar

from PIL import Image
from torch import Tensor

from pipeline.inference.pipeline import TextToImagePipeline
from pipeline.inference.plan import SamplingPlan
from pipeline.inference.reranking import JudgeName, best_rows, consensus_scores, highest
from pipeline.serving.errors import ApiError, refusal
from pipeline.serving.image_files import as_mask, encoded, opened
from pipeline.serving.sampler import Job, Preview, Sampled, Sampler
from pipeline.serving.schemas import (
    EditFields,
    Format,
    GenerationRequest,
    ImageFields,
    Usage,
    VariationFields,
)
from pipeline.serving.settings import ServerSettings
from stage1_tokenizer.pixels import image_array, pil_image
from stage2_prior import Samples, joined_samples

_log = logging.getLogger(__name__)

_GREY = 128

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Partial:
    """A preview of an image."""

    image: int
    number: int
    """Previews of this image before it."""
    content: bytes


@dataclass(frozen=True)
class Complete:
    """An image."""

    image: int
    content: bytes
    codes: list[int]
    log_likelihood: float


@dataclass(frozen=True)
class Work:
    """Images of one request, before they are sampled."""

    plan: SamplingPlan
    fields: ImageFields
    seed: int
    """Of the request."""
    settings: dict[str, Any]
    """What the images' metadata say."""
    best_of: int = 1
    judge: JudgeName = "likelihood"
    finish: Callable[[list[Image.Image]], list[Image.Image]] = lambda images: images
    """What happens to decoded images: edits keep the pixels outside the mask."""
    warnings: tuple[str, ...] = ()

    @property
    def format(self) -> Format:
        return self.fields.output_format or "png"


class ImageService:
    """Images for requests.

    Args:
        pipe: over codes.
        sampler: of its prior.
        name: of the bundle, for metadata.
    """

    def __init__(
        self, pipe: TextToImagePipeline, sampler: Sampler, settings: ServerSettings, name: str
    ) -> None:
        self.pipe = pipe
        self.sampler = sampler
        self.settings = settings
        self.name = name
        self.started = now()
        self._pool = ThreadPoolExecutor(1, "images")
        self._side_pool = ThreadPoolExecutor(1, "scores")
        self._turns = 0

    @property
    def has_alpha(self) -> bool:
        """Whether images have transparency."""
        return self.pipe.tokenizer.own_config.channels == 4

    @property
    def size(self) -> str:
        """Width and height of images, as 64x64."""
        height, width = self.pipe.tokenizer.size
        return f"{width}x{height}"

    @property
    def max_images(self) -> int:
        """Images per request at most, those that `best_of` drops included."""
        return min(self.settings.max_images, self.sampler.capacity)

    async def in_thread(
        self, function: Callable[P, T], *arguments: P.args, **options: P.kwargs
    ) -> T:
        """A call of the pipeline in the thread of images."""
        return await _in_pool(self._pool, partial(function, *arguments, **options))

    async def in_side_thread(
        self, function: Callable[P, T], *arguments: P.args, **options: P.kwargs
    ) -> T:
        """A call of the pipeline in the thread of scores, captions and codes."""
        return await _in_pool(self._side_pool, partial(function, *arguments, **options))

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """A place among the requests that sample no image. There are `max_waiting` places.

        Raises:
            ApiError: all are taken.
            TimeoutError: what is done in the place takes longer than the server's limit.
        """
        if self._turns >= self.settings.max_waiting:
            message = f"{self._turns} requests run or wait, and no more may; try again in 1 second"
            raise ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})
        self._turns += 1
        try:
            async with asyncio.timeout(self.settings.timeout):
                yield
        finally:
            self._turns -= 1

    async def from_input(
        self, function: Callable[P, T], *arguments: P.args, **options: P.kwargs
    ) -> T:
        """As `in_thread`, for what reads or plans a request.

        Raises:
            ApiError: a ValueError of the function, which refuses what the client gave.
        """
        try:
            return await self.in_thread(function, *arguments, **options)
        except ValueError as error:
            raise refusal(error) from error

    async def from_field(
        self, field: str, function: Callable[P, T], *arguments: P.args, **options: P.kwargs
    ) -> T:
        """As `from_input`, where a refusal is of this field of the request."""
        try:
            return await self.in_thread(function, *arguments, **options)
        except ValueError as error:
            raise ApiError(400, str(error), param=field, code="invalid_value") from error

    async def text_ids(self, prompt: str) -> Tensor:
        """Ids of a prompt (1,T).

        Raises:
            ApiError: it has more tokens than the bundle reads.
        """
        return await self.from_field("prompt", self.pipe.text_ids, [prompt])

    def log_prompt(self, request_id: str, prompt: str | list[str]) -> None:
        """Writes a prompt, or several, into the log, where the server was asked to."""
        if self.settings.log_prompts:
            _log.info("%s prompt %r", request_id, prompt)

    def close(self) -> None:
        """Ends the threads."""
        self.sampler.close()
        for pool in (self._pool, self._side_pool):
            pool.shutdown(cancel_futures=True)

    # Requests -> work

    async def generation(self, request: GenerationRequest) -> Work:
        """Images for a prompt.

        Raises:
            ApiError: a field is not what this bundle or server can do.
        """
        prompt = request.prompt
        best_of = request.best_of or 1
        self._check(request, prompt, best_of)
        with self.sampler.room((request.n or 1) * best_of):
            await self.text_ids(prompt)
            if request.judge == "likelihood":
                await self.from_input(self.pipe.check_best_of, best_of)
            seed = _seed(request)
            options = _options(request, seed, best_of)
            plan = await self.from_input(self.pipe.plan, [prompt], **options)
            settings = {"prompt": prompt, "best_of": best_of}
            if best_of > 1:
                settings["judge"] = request.judge
            return await self._work(
                plan, request, seed, settings, best_of=best_of, judge=request.judge
            )

    async def edit(self, fields: EditFields, content: bytes, mask: bytes | None) -> Work:
        """An image whose white or, in a mask with transparency, transparent part is resampled."""
        self._check(fields, fields.prompt)
        if (mask is None) == (fields.outpaint_at is None):
            raise ApiError(
                400,
                "an edit needs one of mask and outpaint_at; give the part that is to be replaced",
                param="mask",
                code="missing",
            )
        self._check_can_edit()
        with self.sampler.room(fields.n or 1):
            await self.text_ids(fields.prompt)
            image = await self.in_thread(opened, content, "image")
            seed = _seed(fields)
            options = _options(fields, seed)
            settings = {"prompt": fields.prompt}
            if fields.outpaint_at is not None:
                settings["outpaint_at"] = fields.outpaint_at
                x, y = map(int, fields.outpaint_at.split(","))
                plan = await self.from_input(
                    self.pipe.plan_outpaint, image, fields.prompt, at=(x, y), **options
                )
            else:
                assert mask is not None
                white = await self.in_thread(lambda: as_mask(opened(mask, "mask")))
                plan = await self.from_input(
                    self.pipe.plan_edit, image, white, fields.prompt, **options
                )
            if plan.known.all():
                message = (
                    "the mask is empty, so that nothing is replaced; make what is to be replaced "
                    "white"
                )
                raise ApiError(400, message, param="mask", code="empty_mask")
            return await self._work(plan, fields, seed, settings, finish=plan.composite)

    async def variation(self, fields: VariationFields, content: bytes) -> Work:
        """An image of whose codes a fraction, scattered, is resampled."""
        self._check(fields, fields.prompt)
        self._check_can_edit()
        with self.sampler.room(fields.n or 1):
            await self.text_ids(fields.prompt)
            image = await self.in_thread(opened, content, "image")
            seed = _seed(fields)
            options = _options(fields, seed)
            plan = await self.from_input(
                self.pipe.plan_variation, image, fields.strength, fields.prompt, **options
            )
            settings = {"prompt": fields.prompt, "strength": fields.strength}
            return await self._work(plan, fields, seed, settings)

    def _check_can_edit(self) -> None:
        if self.pipe.prior.config.trained_order != "random":
            raise ApiError(
                400,
                f"the bundle {self.name} samples codes in raster order, and an edit needs a prior "
                "of random orders; serve a bundle of prior.train.code_order=random",
                code="not_supported",
            )

    async def _work(
        self,
        plan: SamplingPlan,
        fields: ImageFields,
        seed: int,
        settings: dict[str, Any],
        **options: Any,
    ) -> Work:
        await self.from_input(plan.check, self.pipe.prior)
        prompt = settings["prompt"]
        warnings: tuple[str, ...] = ()
        if self.pipe.known_prompts is not None:
            warnings = tuple(await self.in_thread(self.pipe.known_prompts.problems, prompt))
        options_used = asdict(plan.options)
        if plan.known is not None and fields.steps is None:
            del options_used["num_inference_steps"]  # fewer than in the bundle, for a part alone
        settings = settings | {"bundle": self.name, "seed": seed}
        settings |= {name: value for name, value in options_used.items() if value is not None}
        return Work(plan, fields, seed, settings, warnings=warnings, **options)

    def _check(self, fields: ImageFields, prompt: str, best_of: int = 1) -> None:
        if fields.model not in (None, self.name):
            message = f"there is no model {fields.model!r}; this server has {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        most = self.max_images
        if (count := (fields.n or 1) * best_of) > most:
            message = f"n * best_of is {count}; this server samples at most {most} per request"
            raise ApiError(400, message, param="n", code="too_many_images")
        self.check_prompt(prompt)
        for name in ("partial_images", "preview_every"):
            if getattr(fields, name) and not fields.stream:
                message = f"{name} is of streams; set stream to true, or leave {name} out"
                raise ApiError(400, message, param=name, code="invalid_value")
        if fields.size not in (None, "auto", self.size):
            message = (
                f"size is {fields.size!r}, and the bundle {self.name} draws {self.size} alone; "
                "leave size out"
            )
            raise ApiError(400, message, param="size", code="invalid_size")
        if fields.response_format == "url" and self.settings.refuse_urls:
            message = (
                "response_format is 'url', and this server is one of several, which know no "
                "URLs of one another; ask for b64_json"
            )
            raise ApiError(400, message, param="response_format", code="not_supported")
        if fields.background == "transparent" and not self.has_alpha:
            message = f"the bundle {self.name} draws no transparency; leave background out"
            raise ApiError(400, message, param="background", code="not_supported")
        if fields.background == "transparent" and fields.output_format == "jpeg":
            message = "a JPEG has no transparency; ask for output_format png or webp"
            raise ApiError(400, message, param="output_format", code="invalid_value")
        if fields.output_compression is not None and fields.output_format in (None, "png"):
            message = (
                "output_compression is the quality of a jpeg or webp, and a PNG is lossless; leave "
                "it out, or ask for output_format jpeg or webp"
            )
            raise ApiError(400, message, param="output_compression", code="invalid_value")

    def check_prompt(self, prompt: str) -> None:
        """Raises ApiError where a prompt is longer than the server takes."""
        if len(prompt) > (most := self.settings.max_prompt):
            message = f"the prompt has {len(prompt)} characters; this server takes at most {most}"
            raise ApiError(400, message, param="prompt", code="prompt_too_long")

    # Work -> images

    def start(self, work: Work) -> Job:
        """Begins to sample. Nothing may be awaited between planning and this: the room of a plan is
        free again.

        Raises:
            QueueFull, ShuttingDown: of the sampler.
        """
        return self.sampler.submit(work.plan, self._preview_every(work))

    def deadline(self) -> float:
        """When a request that comes now must be answered, by the event loop's clock."""
        return asyncio.get_running_loop().time() + self.settings.timeout

    async def images(
        self, work: Work, job: Job, deadline: float
    ) -> AsyncGenerator[Partial | Complete]:
        """Images as they become ready, and previews where the request streams.

        Raises:
            ShuttingDown, SamplingFailed: of the job.
            TimeoutError: the images take longer than the server's limit.
        """
        numbers = [0] * len(work.plan.seeds)
        done: dict[int, Samples] = {}
        try:
            updates = job.updates()
            while (update := await until(deadline, anext(updates, None))) is not None:
                if isinstance(update, Sampled):
                    done[update.image] = update.samples
                    if work.best_of == 1:
                        complete = self._complete(work, update.image, update.samples)
                        yield await until(deadline, complete)
                elif work.best_of == 1:
                    preview = self.in_thread(self._preview, work, update)
                    content = await until(deadline, preview)
                    yield Partial(update.image, numbers[update.image], content)
                    numbers[update.image] += 1
            if work.best_of > 1:
                every = joined_samples([done[i] for i in range(len(done))])
                best = await until(deadline, self.in_thread(self._best, work, every))
                for image, row in enumerate(best.tolist()):
                    yield await until(deadline, self._complete(work, image, done[row]))
        finally:
            self.sampler.cancel(job)

    def _best(self, work: Work, every: Samples) -> Tensor:
        """Which of all sampled images are returned, by number."""
        if work.judge == "likelihood":
            return best_rows(self.pipe.prior, every, work.best_of)
        images = self.pipe.decode(every, work.plan.seeds).images
        return highest(consensus_scores(images, work.best_of))

    async def _complete(self, work: Work, image: int, samples: Samples) -> Complete:
        content = await self.in_thread(self._encoded, work, image, samples)
        codes = samples.codes[0].tolist()
        return Complete(image, content, codes, float(samples.log_likelihood[0]))

    def _encoded(self, work: Work, image: int, samples: Samples) -> bytes:
        drawn = work.finish(self.pipe.decode(samples, [0]).images)[0]
        settings = work.settings | {"image": image}
        return encoded(
            drawn, work.format, work.fields.background, settings, work.fields.output_compression
        )

    def _preview_every(self, work: Work) -> int | None:
        """Sampled codes between two previews of an image."""
        fields = work.fields
        if fields.preview_every is not None or not fields.partial_images:
            return fields.preview_every
        length = self.pipe.prior.stream.image_length
        sampled = length - work.plan.num_known(length)
        return math.ceil(sampled / (fields.partial_images + 1))

    def _preview(self, work: Work, update: Preview) -> bytes:
        codes = self.pipe.in_layout(update.codes[None])
        image = self.pipe.tokenizer.to_images(codes)[0]
        pixels = image_array(image).copy()
        level = self.pipe.tokenizer.layout[-1]
        there = update.known[-level.length :].view(level.grid).numpy()
        cell = [pixels.shape[axis] // level.grid[axis] for axis in (0, 1)]
        shown = there.repeat(cell[0], axis=0).repeat(cell[1], axis=1)
        pixels[~shown] = 0 if self.has_alpha else _GREY
        drawn = work.finish([pil_image(pixels)])[0]
        return encoded(
            drawn, work.format, work.fields.background, None, work.fields.output_compression
        )

    def usage(self, work: Work) -> Usage:
        """Tokens of a request: of the caption once, and of all codes that are sampled."""
        pad = self.pipe.prior.stream.config.pad_id
        text = int((work.plan.text_ids[0] != pad).sum())
        sampled = work.plan.num_sampled(self.pipe.prior.stream.image_length)
        return Usage(
            input_tokens=text,
            output_tokens=sampled,
            total_tokens=text + sampled,
            input_tokens_details={"text_tokens": text, "image_tokens": 0},
        )


async def _in_pool(pool: ThreadPoolExecutor, call: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(pool, call)


async def until(deadline: float, coming: Awaitable[T]) -> T:
    """What is awaited. Around each wait, and not around a generator: a deadline that passes while
    its reader does something else would end the reader.

    Raises:
        TimeoutError: it takes longer.
    """
    async with asyncio.timeout_at(deadline):
        return await coming


def _seed(fields: ImageFields) -> int:
    return secrets.randbits(48) if fields.seed is None else fields.seed


def _options(fields: ImageFields, seed: int, best_of: int = 1) -> dict[str, Any]:
    """Options of the pipeline's plans."""
    return {"num_images": (fields.n or 1) * best_of, "seed": seed} | fields.sampling()


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())
