"""What happens to every request: an id, a line in the log, metrics, checks of the host that it
names and of the site that it comes from, a bearer token, limits on the body and on slow clients.
Knows HTTP; nothing of images."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import time
import uuid
from collections.abc import Sequence

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.runtime.printable import printable
from pipeline.serving.errors import ApiError, api_error
from pipeline.serving.metrics import Metrics

_log = logging.getLogger(__name__)

OPEN_PATHS = ("/", "/docs", "/healthz", "/readyz", "/openapi.json")
"""What needs no token: they tell nothing of anybody's images."""
_OPEN_FOLDERS = ("/page/", "/v1/files/")
"""What needs none below them: the page's files, and images, whose names cannot be guessed."""
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HOST = re.compile(r"(?:\[(?P<address>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9.-]+))(?::[0-9]+)?")
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
"""That metrics tell apart."""
_READ_SECONDS = 30.0
"""Seconds between two parts of a request's body at most."""
WRITE_SECONDS = 60.0
"""Seconds that a client takes to read a part of a response at most."""


class RequestLog:
    """Gives each request an id, in `x-request-id`, and counts and logs it at its end. Answers
    errors that nothing else foresees."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        name = given if _ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = name
        start = time.perf_counter()
        started = False
        status = 499  # where the client is gone before the response begins

        async def marked(message: Message) -> None:
            nonlocal started, status
            if message["type"] == "http.response.start":
                started = True
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", name.encode())]
            await send(message)

        try:
            await self.app(scope, receive, marked)
        except _NotReading:
            status = 499
        except Exception as error:
            found = api_error(error, name)
            if started:
                raise
            await JSONResponse(found.body(), found.status)(scope, receive, marked)
        finally:
            seconds = time.perf_counter() - start
            route = scope.get("route")
            path = getattr(route, "path", "other")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self.metrics.requests.labels(path, method, str(status)).inc()
            self.metrics.seconds.labels(path).observe(seconds)
            asked = path if route else printable(scope["path"])
            _log.info("%s %s %s %d in %.0f ms", name, method, asked, status, seconds * 1e3)


class Hosts:
    """Refuses requests to other hosts than those of this machine. A page of another site whose name
    leads here would have the rights of this one's."""

    def __init__(self, app: ASGIApp, names: Sequence[str]) -> None:
        self.app = app
        self.names = {name.lower() for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._name(scope) not in self.names:
            known = ", ".join(sorted(self.names))
            message = (
                f"this server answers to its own machine's names; use one of {known}, or start the "
                "server with public_host, the name of the proxy in front of it"
            )
            error = ApiError(400, message, code="invalid_host")
            await JSONResponse(error.body(), error.status)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    @staticmethod
    def _name(scope: Scope) -> str | None:
        """The host of a request without its port, in lower case; None where it has none."""
        header = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        found = _HOST.fullmatch(header)
        return found and (found["address"] or found["name"]).lower()


class Sites:
    """Refuses what a page of another site sends. It could not read the answer, but it could make
    this server work. Browsers say where a request comes from (Fetch Metadata); other clients do
    not."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD"):
            site = dict(scope["headers"]).get(b"sec-fetch-site", b"none")
            if site not in (b"none", b"same-origin"):
                message = "this request comes from a page of another site; use the server's own"
                error = ApiError(403, message, code="other_site")
                await JSONResponse(error.body(), error.status)(scope, receive, send)
                return
        await self.app(scope, receive, send)


class Tokens:
    """Lets requests with one of the tokens through, and all to what needs none."""

    def __init__(self, app: ASGIApp, tokens: Sequence[str]) -> None:
        self.app = app
        self.tokens = [token.encode() for token in tokens]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.tokens and not self._is_open(scope["path"]):
            header = dict(scope["headers"]).get(b"authorization", b"")
            kind, _, given = header.partition(b" ")
            # Every one is compared, so that the time tells nothing.
            known = [hmac.compare_digest(given.strip(), token) for token in self.tokens]
            if kind.lower() != b"bearer" or not any(known):
                message = "this server needs a token; send the header 'Authorization: Bearer TOKEN'"
                error = ApiError(401, message, code="invalid_api_key")
                headers = {"WWW-Authenticate": "Bearer"}
                await JSONResponse(error.body(), 401, headers)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    @staticmethod
    def _is_open(path: str) -> bool:
        return path in OPEN_PATHS or path.startswith(_OPEN_FOLDERS)


class Limits:
    """Refuses bodies that are too large, and clients that send or read too slowly.

    Args:
        max_bytes: of a body.
        max_seconds: from a request's head to the end of its body.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_seconds: float) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.max_seconds = max_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.max_bytes:
            await self._refuse(self._too_large())(scope, receive, send)
            return
        read = 0
        complete = False
        started = False
        deadline = time.monotonic() + self.max_seconds

        async def limited() -> Message:
            nonlocal read, complete
            if complete:
                return await receive()  # which waits for the client to go
            left = max(deadline - time.monotonic(), 0)
            try:
                message = await asyncio.wait_for(receive(), min(_READ_SECONDS, left))
            except TimeoutError:
                text = f"no part of the body came for {_READ_SECONDS:.0f} s; send it again"
                if left < _READ_SECONDS:
                    text = f"the body took more than {self.max_seconds:g} s; send it faster"
                raise _Refused(ApiError(408, text, code="timeout")) from None
            read += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if read > self.max_bytes:
                raise _Refused(self._too_large())
            return message

        async def timed(message: Message) -> None:
            nonlocal started
            started = True
            try:
                await asyncio.wait_for(send(message), WRITE_SECONDS)
            except TimeoutError:
                raise _NotReading from None

        try:
            await self.app(scope, limited, timed)
        except _Refused as refused:
            if started:
                raise
            await self._refuse(refused.error)(scope, receive, send)

    def _too_large(self) -> ApiError:
        text = f"the body is larger than {self.max_bytes / 1e6:g} MB; send less"
        return ApiError(413, text, code="body_too_large")

    @staticmethod
    def _refuse(error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, headers={"Connection": "close"})


class _NotReading(Exception):
    """The client reads nothing of its response; for `RequestLog`."""


class _Refused(BaseException):
    """Passes through the app's handlers of errors, which would answer for it."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(str(error))
        self.error = error
