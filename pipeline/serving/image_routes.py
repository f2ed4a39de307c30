"""The endpoints of OpenAI's images API: generations, edits, variations, and files by URL. Knows
bodies; sampling is the service's."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Awaitable
from contextlib import aclosing
from typing import Annotated, Any, get_args

from fastapi import APIRouter, File, Form, Request, UploadFile
from fastapi.responses import Response, StreamingResponse
from pydantic import Field

from pipeline.serving.disconnect import until_disconnected
from pipeline.serving.errors import ApiError, api_error
from pipeline.serving.images import Complete, ImageService, Partial, Work, now, until
from pipeline.serving.metrics import Metrics
from pipeline.serving.sampler import Job
from pipeline.serving.schemas import (
    EditFields,
    Format,
    GenerationRequest,
    ImageData,
    ImagesResponse,
    VariationFields,
)
from pipeline.serving.store import ImageStore

_IMAGES: dict[str, Any] = {
    "response_model": ImagesResponse,
    "responses": {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
    "tags": ["images"],
}
_FILES: dict[int | str, dict[str, Any]] = {
    200: {"content": {f"image/{ending}": {} for ending in get_args(Format)}}
}


def image_router(service: ImageService, metrics: Metrics) -> APIRouter:
    """Routes over one service."""
    router = APIRouter()
    store = ImageStore()

    @router.post("/v1/images/generations", **_IMAGES)
    async def generations(request: Request, body: GenerationRequest) -> Response:
        """Images for a prompt."""
        work = service.generation(body)
        return await respond(request, work, "image_generation")

    @router.post("/v1/images/edits", **_IMAGES)
    async def edits(request: Request, body: Annotated[EditForm, Form()]) -> Response:
        """A part of an image, resampled: the white part of a mask, or its transparent part; or what
        lies around a smaller image."""
        fields = EditFields(**body.model_dump(exclude={"image", "images", "mask"}))
        mask = None if body.mask is None else await body.mask.read()
        work = service.edit(fields, await the_image(body), mask)
        return await respond(request, work, "image_edit")

    @router.post("/v1/images/variations", **_IMAGES)
    async def variations(request: Request, body: Annotated[VariationForm, Form()]) -> Response:
        """Images like a given one."""
        fields = VariationFields(**body.model_dump(exclude={"image", "images"}))
        work = service.variation(fields, await the_image(body))
        return await respond(request, work, "image_edit")

    @router.get("/v1/files/{name}", response_class=Response, responses=_FILES, tags=["images"])
    async def files(name: str) -> Response:
        """An image of a response with `response_format: url`."""
        content = store.get(name)
        if content is None:
            message = f"there is no file {name[:60]!r}, or no longer; ask for b64_json instead"
            raise ApiError(404, message, code="not_found")
        return Response(content, media_type=f"image/{name.rpartition('.')[2]}")

    async def respond(request: Request, coming: Awaitable[Work], kind: str) -> Response:
        deadline = service.deadline()
        work = await until(deadline, coming)
        service.log_prompt(request.state.request_id, work.settings["prompt"])
        job = service.start(work)
        if work.fields.stream:
            events = stream(request, work, job, deadline, kind)
            headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        every = await until_disconnected(request, collected(work, job, deadline))
        body = ImagesResponse(
            created=now(),
            data=[data(request, work, one) for one in every],
            background=background(work),
            output_format=work.format,
            size=service.size,
            usage=service.usage(work),
            seed=work.seed,
            warnings=list(work.warnings),
        )
        return Response(body.model_dump_json(exclude_none=True), media_type="application/json")

    async def collected(work: Work, job: Job, deadline: float) -> list[Complete]:
        coming = service.images(work, job, deadline)
        images = [one async for one in coming if isinstance(one, Complete)]
        metrics.images.inc(len(images))
        return sorted(images, key=lambda one: one.image)

    async def stream(
        request: Request, work: Work, job: Job, deadline: float, kind: str
    ) -> AsyncIterator[str]:
        try:
            async with aclosing(service.images(work, job, deadline)) as images:
                async for one in images:
                    if isinstance(one, Complete):
                        metrics.images.inc()
                    yield event(request, work, kind, one)
        except Exception as error:
            yield _event("error", api_error(error, request.state.request_id).body())

    def event(request: Request, work: Work, kind: str, one: Partial | Complete) -> str:
        body: dict[str, Any] = {
            "created_at": now(),
            "size": service.size,
            "quality": "auto",
            "background": background(work),
            "output_format": work.format,
            "image_index": one.image,
        }
        if isinstance(one, Partial):
            content = base64.b64encode(one.content).decode()
            body |= {"partial_image_index": one.number, "b64_json": content}
            return _event(f"{kind}.partial_image", body)
        body |= data(request, work, one).model_dump(exclude_none=True)
        body |= {"usage": service.usage(work).model_dump(), "seed": work.seed}
        body["warnings"] = list(work.warnings)
        return _event(f"{kind}.completed", body)

    def data(request: Request, work: Work, one: Complete) -> ImageData:
        found = ImageData(codes=one.codes, log_likelihood=one.log_likelihood)
        if work.fields.response_format == "url":
            name = store.add(one.content, work.format)
            found.url = str(request.url_for("files", name=name))
        else:
            found.b64_json = base64.b64encode(one.content).decode()
        return found

    def background(work: Work) -> Any:
        opaque = not service.has_alpha or work.format == "jpeg"
        return "opaque" if opaque or work.fields.background == "opaque" else "transparent"

    return router


Upload = Annotated[UploadFile | None, File(description="the image; needed, here or in image[]")]
Uploads = Annotated[
    list[UploadFile] | None,
    Field(alias="image[]", description="the image, as OpenAI's client sends a list of one"),
]


class EditForm(EditFields):
    """Fields and files of `POST /v1/images/edits`."""

    image: Upload = None
    images: Uploads = None
    mask: Annotated[UploadFile | None, File(description="of the image's size")] = None


class VariationForm(VariationFields):
    """Fields and the file of `POST /v1/images/variations`."""

    image: Upload = None
    images: Uploads = None


async def the_image(body: EditForm | VariationForm) -> bytes:
    """The one image that a body has.

    Raises:
        ApiError: it has none, or several.
    """
    every = [*([] if body.image is None else [body.image]), *(body.images or [])]
    if len(every) != 1:
        message = f"there are {len(every)} images; give one, in the field image"
        code = "invalid_value" if every else "missing"
        raise ApiError(400, message, param="image", code=code)
    return await every[0].read()


def _event(name: str, body: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps({'type': name, **body})}\n\n"
