"""The web application: routes, errors, middleware and the page put together. Starts nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles

from pipeline.serving.errors import install_handlers
from pipeline.serving.image_routes import image_router
from pipeline.serving.images import ImageService
from pipeline.serving.metrics import Metrics
from pipeline.serving.middleware import Hosts, Limits, RequestLog, Sites, Tokens
from pipeline.serving.own_routes import own_router
from pipeline.serving.schemas import ErrorResponse
from pipeline.serving.state import ServerState

PAGE = Path(__file__).parent / "page"
_SECURITY = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""Headers of the page: it loads nothing from other hosts, and nothing that is out of date."""


class _PageFiles(StaticFiles):
    def file_response(self, *arguments: Any, **options: Any) -> Response:
        response = super().file_response(*arguments, **options)
        response.headers.update(_SECURITY)
        return response


def create_app(
    service: ImageService,
    metrics: Metrics,
    *,
    tokens: Sequence[str] = (),
    state: ServerState | None = None,
) -> FastAPI:
    """The application over one service.

    Args:
        tokens: those that clients may show; none for no check.
        state: what `/readyz` shows; ready from the start where absent.
    """
    state = state or ServerState()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        state.status = "ready"
        yield
        state.status = "stopping"
        service.close()

    app = FastAPI(
        title="mini-dalle",
        version=version("mini-dalle"),
        summary="Images of one bundle: an image tokenizer and a prior over captions and codes.",
        docs_url=None,  # FastAPI's pages load scripts from another host
        redoc_url=None,
        lifespan=lifespan,
        responses={
            "4XX": {"model": ErrorResponse, "description": "The request was refused"},
            "5XX": {"model": ErrorResponse, "description": "The server failed, or stops"},
        },
    )
    app.state.service = service
    install_handlers(app)
    app.include_router(image_router(service, metrics))
    app.include_router(own_router(service, metrics, state))

    def page(name: str) -> FileResponse:
        return FileResponse(PAGE / name, headers=_SECURITY)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def index() -> Response:
        return page("index.html")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return page("docs.html")

    app.mount("/page", _PageFiles(directory=PAGE), name="page")
    settings = service.settings
    # The last one that is added sees a request first.
    most = int(settings.max_body_mb * 1e6)
    app.add_middleware(Limits, max_bytes=most, max_seconds=settings.timeout)
    app.add_middleware(Tokens, tokens=tokens)
    app.add_middleware(Sites)
    if settings.is_loopback:
        names = ["localhost", "127.0.0.1", "::1", settings.host]
        app.add_middleware(Hosts, names=[*names, settings.public_host or settings.host])
    app.add_middleware(RequestLog, metrics=metrics)
    return app
