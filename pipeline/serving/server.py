"""`serve`: loads a bundle and runs the application until a signal stops it. Knows processes, ports
and files of tokens."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import stat
from pathlib import Path
from types import FrameType

import torch
import uvicorn

from pipeline.inference.pipeline import TextToImagePipeline
from pipeline.serving.app import create_app
from pipeline.serving.images import ImageService
from pipeline.serving.metrics import Metrics
from pipeline.serving.sampler import Sampler
from pipeline.serving.settings import ServerSettings
from pipeline.serving.state import ServerState

_log = logging.getLogger(__name__)


def serve(bundle: str | Path, settings: ServerSettings, *, token_file: Path | None = None) -> None:
    """Serves a bundle until SIGTERM or an interrupt.

    Args:
        bundle: a folder, a name in the package, or `user/name` of the Hub.
        token_file: tokens that clients may show, one per line.

    Raises:
        ValueError: the bundle has Gaussian latents, or the file has no token.
        FileNotFoundError: there is no such bundle or file.
        OSError: the port is taken.
    """
    tokens = [] if token_file is None else read_tokens(token_file)
    if not settings.is_loopback and not tokens:
        _log.warning(
            "%s can be reached from other machines, and whoever reaches it can use it; give a file "
            "of tokens (token_file)",
            settings.host,
        )
    with listen(settings.host, settings.port) as listener:
        service, metrics = _service(bundle, settings)
        state = ServerState()
        app = create_app(service, metrics, tokens=tokens, state=state)
        # No limit of uvicorn's on the end: after `grace` the sampler ends, and requests that
        # still wait get 503.
        config = uvicorn.Config(
            app, log_config=None, access_log=False, server_header=False, timeout_keep_alive=15
        )
        _Server(config, settings.grace, state, service).run(sockets=[listener])


def _service(bundle: str | Path, settings: ServerSettings) -> tuple[ImageService, Metrics]:
    pipe = TextToImagePipeline.from_pretrained(bundle)
    if not isinstance(pipe, TextToImagePipeline):
        raise ValueError(
            f"the bundle {bundle} has Gaussian latents, and a server samples codes; give a bundle "
            "of a tokenizer with codes"
        )
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    metrics = Metrics()
    sampler = Sampler(
        pipe.prior,
        num_rows=2 * settings.slots,
        max_waiting=settings.max_waiting,
        compiled=settings.compiled,
        options=pipe.defaults,
        on_step=metrics.on_step,
    )
    metrics.watch(sampler)
    return ImageService(pipe, sampler, settings, Path(bundle).name), metrics


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
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise OSError(
            f"cannot listen at {host}:{port} ({error.strerror or error}); stop what uses the port, "
            "or choose another port"
        ) from error
    return listener


def read_tokens(path: Path) -> list[str]:
    """The tokens of a file, one per line. Warns where others can read it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no token, or one that a header cannot carry.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"there is no token file {path}; write one token per line into it"
        ) from None
    tokens = text.split()
    if not tokens:
        raise ValueError(f"{path} holds no token; write one per line")
    if not all(token.isascii() and token.isprintable() for token in tokens):
        raise ValueError(f"{path} holds a token with letters beyond ASCII; write another one")
    if path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        _log.warning("others can read the tokens in %s; run chmod 600 %s", path, path)
    return tokens
