"""A bundle, settings and a file of tokens -> the application, whatever runs it. Knows files; no
ports and no signals."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import torch
from fastapi import FastAPI

from pipeline.inference.batching import fitting_batch
from pipeline.inference.pipeline import TextToImagePipeline
from pipeline.serving.app import create_app
from pipeline.serving.images import ImageService
from pipeline.serving.metrics import Metrics
from pipeline.serving.sampler import Sampler
from pipeline.serving.settings import ServerSettings
from pipeline.serving.state import ServerState
from stage2_prior import SamplingOptions

_log = logging.getLogger(__name__)


def build_app(
    bundle: str | Path,
    settings: ServerSettings,
    *,
    token_file: Path | None = None,
    state: ServerState | None = None,
    replica: str | None = None,
) -> FastAPI:
    """Loads a bundle onto the GPU, if there is one, and starts its sampler.

    Args:
        bundle: a folder, a name in the package, or `user/name` of the Hub.
        token_file: tokens that clients may show, one per line.
        state: what `/readyz` shows.
        replica: a name among several processes, which each metric then carries.

    Raises:
        ValueError: the bundle has Gaussian latents, or the file has a line that is no token.
        FileNotFoundError: there is no such bundle or file.
        OSError: the file cannot be read.
        MemoryError: not even one image fits the memory.
    """
    tokens = [] if token_file is None else read_tokens(token_file)
    if not settings.is_loopback and not tokens:
        _log.warning(
            "%s can be reached from other machines, and whoever reaches it can use it; give a file "
            "of tokens (token_file)",
            settings.host,
        )
    pipe = TextToImagePipeline.from_pretrained(bundle)
    if not isinstance(pipe, TextToImagePipeline):
        raise ValueError(
            f"the bundle {bundle} has Gaussian latents, and a server samples codes; give a bundle "
            "of a tokenizer with codes"
        )
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    metrics = Metrics(replica)
    guided = SamplingOptions(guidance_scale=2.0)
    sampler = Sampler(
        pipe.prior,
        num_rows=2 * fitting_batch(pipe.prior, guided, settings.slots),
        max_waiting=settings.max_waiting,
        compiled=settings.compiled,
        options=pipe.defaults,
        on_step=metrics.on_step,
    )
    metrics.watch(sampler)
    service = ImageService(pipe, sampler, settings, _name_of(bundle))
    return create_app(service, metrics, tokens=tokens, state=state)


def _name_of(bundle: str | Path) -> str:
    """What clients call a bundle: its folder, or its run's where that is `bundle`."""
    path = Path(os.path.abspath(bundle))
    return (path.parent.name if path.name == "bundle" else "") or path.name


def read_tokens(path: Path) -> list[str]:
    """The tokens of a file, one per line. Warns where others can read it.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be read.
        ValueError: it holds no token, or a line that is none.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"there is no token file {path}; write one token per line into it"
        ) from None
    except OSError as error:
        raise OSError(
            f"the token file {path} cannot be read ({error.strerror}); give a file with one token "
            "per line"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
    tokens = []
    for number, line in enumerate(text.splitlines(), 1):
        token = line.strip()
        if len(token.split()) > 1:
            raise ValueError(
                f"line {number} of {path} has a space; write one token per line and nothing else"
            )
        if not (token.isascii() and token.isprintable()):
            raise ValueError(
                f"line {number} of {path} has letters beyond ASCII, or none; write another token"
            )
        tokens += [token] if token else []
    if not tokens:
        raise ValueError(f"{path} holds no token; write one per line")
    status = path.stat()
    # The group of another one's file may be what lets this process read it.
    is_own = status.st_uid == os.geteuid()
    if status.st_mode & (stat.S_IRGRP | stat.S_IROTH if is_own else stat.S_IROTH):
        _log.warning("others can read the tokens in %s; run chmod 600 %s", path, path)
    return tokens
