"""Errors as OpenAI's API words them: `{"error": {message, type, param, code}}`. Knows statuses and
messages; what is the server's fault is logged here.

A ValueError is the client's fault where a request is read and planned alone
(`ImageService.from_input`). Anywhere else it is one of the server's.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from pipeline.serving.disconnect import ClientGone
from pipeline.serving.sampler import QueueFull, SamplingFailed, ShuttingDown

_log = logging.getLogger(__name__)

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """What a request is refused with.

    Args:
        status: of HTTP.
        message: what was given, what is needed, what to do.
        param: the field of the request that is wrong.
        code: a word that programs can tell apart.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The response's JSON."""
        fallback = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": str(self),
                "type": _TYPES.get(self.status, fallback),
                "param": self.param,
                "code": self.code,
            }
        }


_OWN_NAMES = {"num_inference_steps": "steps"}
"""Options of the pipeline by the fields of requests, where they have other names."""
_FIELDS = ("steps", "guidance_scale", "best_of", "image", "mask")
"""That messages of the pipeline may begin with."""


def refusal(error: ValueError) -> ApiError:
    """What the pipeline says of a request, in the words of requests."""
    message = str(error)
    for name, field in _OWN_NAMES.items():
        message = message.replace(name, field)
    first = message.removeprefix("the ").split(maxsplit=1)[0].rstrip(":,") if message else ""
    return ApiError(400, message, param=first if first in _FIELDS else None, code="invalid_value")


def api_error(error: Exception, request_id: str) -> ApiError:
    """Any error as the client sees it. One of the server's is logged, and the client sees nothing
    of the server's inside."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        headers = {"Retry-After": str(error.retry_after)}
        return ApiError(429, str(error), code="queue_full", headers=headers)
    if isinstance(error, ShuttingDown):
        return ApiError(503, str(error), code="shutting_down", headers={"Retry-After": "5"})
    if isinstance(error, ClientGone):
        return ApiError(499, str(error), code="client_gone")  # for the log: nobody reads it
    if isinstance(error, TimeoutError):
        message = "this was not ready in time; ask for less, or try again later"
        return ApiError(504, message, code="timeout")
    _log.error("%s failed", request_id, exc_info=error)
    if isinstance(error, SamplingFailed):
        return ApiError(500, str(error), code="sampling_failed")
    return ApiError(500, "the server failed; see its log, and try again", code="internal_error")


def install_handlers(app: FastAPI) -> None:
    """Makes an app answer foreseen errors in this shape. `RequestLog` answers the others."""

    async def known(request: Request, error: Exception) -> JSONResponse:
        found = api_error(error, request.state.request_id)
        return JSONResponse(found.body(), found.status, headers=found.headers)

    async def of_http(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        found = ApiError(error.status_code, message, headers=error.headers)
        return JSONResponse(found.body(), found.status, headers=found.headers)

    async def of_validation(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        places = [str(place) for place in first["loc"] if place not in ("body", "query", "path")]
        param = ".".join(places) or None
        reason = first["msg"]
        if first["type"] == "extra_forbidden":
            reason = "this server has no such field; leave it out"
        message = f"{param or 'the request'}: {reason}"
        code = "missing" if first["type"] == "missing" else "invalid_value"
        found = ApiError(400, message, param=param, code=code)
        return JSONResponse(found.body(), found.status)

    for kind in (ApiError, ClientGone, QueueFull, ShuttingDown, SamplingFailed, TimeoutError):
        app.add_exception_handler(kind, known)
    app.add_exception_handler(HTTPException, of_http)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, of_validation)  # type: ignore[arg-type]
