"""The endpoints of this project: scores, captions, tokens, the bundle's description, health. Knows
bodies; computing is the pipeline's."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from PIL import Image
from torch import Tensor

from pipeline.inference.editing import check_image
from pipeline.inference.pipeline import CAPTIONS_AT_A_TIME
from pipeline.serving.disconnect import until_disconnected
from pipeline.serving.errors import ApiError
from pipeline.serving.image_files import encoded, opened
from pipeline.serving.images import ImageService
from pipeline.serving.metrics import CONTENT_TYPE, Metrics
from pipeline.serving.sampler import NOT_FINITE, SamplingFailed
from pipeline.serving.schemas import (
    Caption,
    CaptionRequest,
    CaptionResponse,
    Model,
    ModelList,
    ScoreRequest,
    ScoreResponse,
    Status,
    TokensRequest,
    TokensResponse,
)
from pipeline.serving.state import ServerState
from stage2_prior import score_each_code

T = TypeVar("T")


def own_router(service: ImageService, metrics: Metrics, state: ServerState) -> APIRouter:
    """Routes over one service."""
    router = APIRouter()
    pipe = service.pipe

    @router.get(
        "/healthz", response_model=Status, responses={503: {"model": Status}}, tags=["server"]
    )
    async def healthz() -> Response:
        """200 while the process can sample; 503 where it must be started again."""
        broken = service.sampler.has_failed
        return JSONResponse({"status": "broken" if broken else "ok"}, 503 if broken else 200)

    @router.get(
        "/readyz", response_model=Status, responses={503: {"model": Status}}, tags=["server"]
    )
    async def readyz() -> Response:
        """200 while requests are accepted; 503 once the server stops. Until the bundle is loaded,
        clients wait."""
        status = "broken" if service.sampler.has_failed else state.status
        return JSONResponse({"status": status}, 200 if status == "ready" else 503)

    # As load balancers ask.
    router.add_api_route("/healthz", healthz, methods=["HEAD"], include_in_schema=False)
    router.add_api_route("/readyz", readyz, methods=["HEAD"], include_in_schema=False)

    @router.get("/metrics", response_class=PlainTextResponse, tags=["server"])
    async def show_metrics() -> Response:
        """Counters in Prometheus' format."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    @router.get("/v1/models", tags=["models"])
    async def models() -> ModelList:
        """The bundle, with what it can do."""
        return ModelList(data=[model])

    @router.get("/v1/models/{name}", tags=["models"])
    async def one_model(name: str) -> Model:
        """The bundle by its name."""
        if name != model.id:
            message = f"there is no model {name[:60]!r}; this server has {model.id!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return model

    @router.post("/v1/score", tags=["codes"])
    async def score(request: Request, body: ScoreRequest) -> ScoreResponse:
        """How likely an image, or its codes, are given a prompt."""

        async def work() -> ScoreResponse:
            service.check_prompt(body.prompt)
            service.log_prompt(request.state.request_id, body.prompt)
            ids = await service.text_ids(body.prompt)
            codes = await codes_of(body.image, body.codes)
            return await service.in_side_thread(scored, codes, ids)

        return await in_turn(request, work)

    @router.post("/v1/captions", tags=["codes"])
    async def captions(request: Request, body: CaptionRequest) -> CaptionResponse:
        """Captions of an image: candidates by their likelihood, or new ones."""
        if not pipe.prior.config.trained_image_first:
            message = (
                f"the bundle {service.name} was not trained with codes first, which captions need; "
                "serve a bundle of sequence.captioning_fraction=0.2 and prior.model.text_depth=0"
            )
            raise ApiError(400, message, code="not_supported")

        async def work() -> CaptionResponse:
            if body.candidates is not None:
                for one in body.candidates:
                    service.check_prompt(one)
                service.log_prompt(request.state.request_id, body.candidates)
                await service.from_field("candidates", pipe.text.encode, body.candidates)
            image = await service.from_input(decoded, body.image)
            found: list[tuple[str, float]] = []
            # In parts, each of which encodes the image: a request that is given up ends soon.
            for part in parts_of(body.candidates):
                found += await service.in_side_thread(
                    pipe.caption,
                    image,
                    part,
                    num=body.n,
                    seed=body.seed,
                    temperature=body.temperature,
                    top_p=body.top_p,
                )
            found.sort(key=lambda pair: -pair[1])
            check_finite([value for _, value in found])
            return CaptionResponse(
                data=[Caption(text=text, log_likelihood=value) for text, value in found]
            )

        return await in_turn(request, work)

    @router.post("/v1/tokens", tags=["codes"])
    async def tokens(request: Request, body: TokensRequest) -> TokensResponse:
        """The codes of an image, or the image of codes."""

        async def work() -> TokensResponse:
            codes = await codes_of(body.image, body.codes)
            return await service.in_side_thread(as_tokens, codes)

        return await in_turn(request, work)

    async def in_turn(request: Request, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The work's result, unless too many wait or the client leaves."""
        async with service.turn():
            return await until_disconnected(request, work())

    async def codes_of(image: str | None, codes: list[int] | None) -> Tensor:
        """(1,N)"""
        if (image is None) == (codes is None):
            message = "give one of image and codes"
            raise ApiError(400, message, param="image", code="missing")
        if image is not None:
            given = await service.from_input(decoded, image)
            return await service.in_side_thread(lambda: pipe.codes_of([given]).flatten(1))
        assert codes is not None
        return checked_codes(codes)

    def checked_codes(codes: list[int]) -> Tensor:
        layout = pipe.tokenizer.layout
        length = sum(level.length for level in layout)
        if len(codes) != length:
            message = f"there are {len(codes)} codes; an image of {service.name} has {length}"
            raise ApiError(400, message, param="codes", code="invalid_value")
        at = 0
        for level in layout:
            part = codes[at : at + level.length]
            at += level.length
            if not all(0 <= code < level.num_codes for code in part):
                message = f"a code is out of range; codes here are 0 to {level.num_codes - 1}"
                raise ApiError(400, message, param="codes", code="invalid_value")
        return torch.tensor([codes])

    def decoded(content: str) -> Image.Image:
        try:
            data = base64.b64decode(content, validate=True)
        except (binascii.Error, ValueError) as error:
            message = f"image is not base64 ({error}); give the bytes of a file in base64"
            raise ApiError(400, message, param="image", code="invalid_image") from error
        config = pipe.tokenizer.own_config
        return check_image(opened(data, "image"), config.size, config.channels)

    def scored(codes: Tensor, ids: Tensor) -> ScoreResponse:
        each = score_each_code(pipe.prior, ids, codes)[0]
        check_finite(each.tolist())
        null = None
        if pipe.prior.config.trained_with_caption_dropout:
            empty = pipe.prior.stream.null_caption(1)
            null = float(score_each_code(pipe.prior, empty, codes).sum())
        total = float(each.sum())
        return ScoreResponse(
            log_likelihood=total,
            pmi=None if null is None else total - null,
            codes=codes[0].tolist(),
            nats=(-each).tolist(),
        )

    def check_finite(log_likelihoods: Sequence[float]) -> None:
        if not all(map(math.isfinite, log_likelihoods)):
            raise SamplingFailed(NOT_FINITE)

    def as_tokens(codes: Tensor) -> TokensResponse:
        image = pipe.tokenizer.to_images(pipe.in_layout(codes))[0]
        return TokensResponse(
            codes=codes[0].tolist(),
            grids=[list(level.grid) for level in pipe.tokenizer.layout],
            b64_json=base64.b64encode(encoded(image, "png", None, None)).decode(),
        )

    model = _model(service)
    return router


def parts_of(candidates: list[str] | None) -> list[list[str] | None]:
    """Captions that are judged by one call each; one call without candidates."""
    if candidates is None:
        return [None]
    return [
        candidates[start : start + CAPTIONS_AT_A_TIME]
        for start in range(0, len(candidates), CAPTIONS_AT_A_TIME)
    ]


_NUM_EXAMPLES = 200
"""Names that the page suggests."""


def _model(service: ImageService) -> Model:
    pipe = service.pipe
    height, width = pipe.tokenizer.size
    known = pipe.known_prompts
    names = [] if known is None else list(known.names)
    config = pipe.prior.config
    settings = service.settings
    defaults: dict[str, Any] = asdict(pipe.defaults)
    return Model(
        id=service.name,
        created=service.started,
        owned_by="mini-dalle",
        width=width,
        height=height,
        transparent=service.has_alpha,
        grids=[list(level.grid) for level in pipe.tokenizer.layout],
        can_edit=config.trained_order == "random",
        can_caption=config.trained_image_first,
        can_guide=config.trained_with_caption_dropout,
        styles=[] if known is None else list(known.styles),
        examples=names[:: max(len(names) // _NUM_EXAMPLES, 1)],
        defaults=defaults,
        limits={"n": service.max_images, "prompt": settings.max_prompt},
    )
