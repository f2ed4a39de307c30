"""`serve`: runs the application of a bundle until a signal stops it. Knows the process, its port
and its signals."""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import signal
import socket
from pathlib import Path
from types import FrameType

import uvicorn

from pipeline.serving.build import build_app
from pipeline.serving.images import ImageService
from pipeline.serving.middleware import WRITE_SECONDS
from pipeline.serving.settings import ServerSettings
from pipeline.serving.state import ServerState

_log = logging.getLogger(__name__)

_LAST_SECONDS = 10
"""Seconds that clients have to read their responses once the last image is sampled."""


def serve(bundle: str | Path, settings: ServerSettings, *, token_file: Path | None = None) -> None:
    """Serves a bundle until SIGTERM or an interrupt.

    Args:
        bundle: a folder, a name in the package, or `user/name` of the Hub.
        token_file: tokens that clients may show, one per line.

    Raises:
        ValueError: the bundle has Gaussian latents, or the file has a line that is no token.
        FileNotFoundError: there is no such bundle or file.
        OSError: the server cannot listen there, or the file cannot be read.
        MemoryError: not even one image fits the memory.
    """
    with listen(settings.host, settings.port) as listener:
        state = ServerState()
        app = build_app(bundle, settings, token_file=token_file, state=state)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=15,
            # After `grace` the sampler ends, and requests that still wait get 503. What is open
            # then is of clients that do not read.
            timeout_graceful_shutdown=math.ceil(settings.grace) + _LAST_SECONDS,
        )
        _Server(config, settings.grace, state, app.state.service).run(sockets=[listener])


class _Server(uvicorn.Server):
    """Answers running requests after a signal to stop, for `grace` seconds at most. Then those
    that are left get 503."""

    def __init__(
        self, config: uvicorn.Config, grace: float, state: ServerState, service: ImageService
    ) -> None:
        super().__init__(config)
        self._grace = grace
        self._state = state
        self._service = service

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for one in self.servers:
            for listener in one.sockets:
                host, port = listener.getsockname()[:2]
                shown = f"[{host}]" if ":" in host else host
                _log.info("serving %s at http://%s:%d", self._service.name, shown, port)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._state.status != "stopping":
            self._state.status = "stopping"
            _log.info(
                "%s: finishing %d images, for %g seconds at most",
                signal.Signals(sig).name,
                self._service.sampler.num_pending,
                self._grace,
            )
            asyncio.get_running_loop().call_later(self._grace, self._service.sampler.stop)
        # Not uvicorn's own, which raises the signal again once the server has ended.
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        OSError: the port is taken, or the address is not this machine's; says what to do.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # Connections inherit it. One whose client reads nothing is closed by the system: what is
        # written to it would otherwise stay in memory.
        most = int(2 * WRITE_SECONDS * 1000)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, most)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        advice = {
            errno.EADDRINUSE: "stop what uses the port, or choose another port",
            errno.EACCES: "choose a port from 1024 on",
        }.get(error.errno or 0, "give an address of this machine as host")
        raise OSError(
            f"cannot listen at {host}:{port} ({error.strerror or error}); {advice}"
        ) from error
    return listener
