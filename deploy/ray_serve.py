"""The server on several machines: replicas of the application of `minidalle serve` under Ray Serve.
Knows Ray; what a replica does is `build_app`'s. deploy/ray_serve.yaml is its configuration.

There is no `from __future__ import annotations` here: Ray looks at the class of `app`'s parameter.
"""

import logging
import os
from pathlib import Path
from typing import Literal

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reads it when it starts

import ray
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.config import AutoscalingConfig

from pipeline.config.shipped_bundles import SHIPPED
from pipeline.serving.settings import ServerSettings

_OTHER_REQUESTS = 64
"""Requests per replica beyond those for images: health, metrics, the page."""


class Arguments(BaseModel):
    """What an application may be given: the options of `minidalle serve`, and the replicas."""

    model_config = ConfigDict(extra="forbid")

    bundle: str = SHIPPED[0]
    """A folder that every machine has, a name in the package, or `user/name` of the Hub."""
    host: str = ServerSettings.host
    """Address that Ray's proxies listen at, as in `http_options`."""
    public_host: str | None = ServerSettings.public_host
    """Name by which clients ask a proxy in front of Ray's, where these listen at the loopback."""
    slots: int | Literal["auto"] = "auto"
    max_waiting: int = ServerSettings.max_waiting
    max_images: int = ServerSettings.max_images
    max_prompt: int = ServerSettings.max_prompt
    max_body_mb: float = ServerSettings.max_body_mb
    timeout: float = ServerSettings.timeout
    grace: float = ServerSettings.grace
    """Seconds that the requests of a replica have when it ends."""
    token_file: Path | None = None
    """A file that every machine has, with one token per line."""
    log_prompts: bool = ServerSettings.log_prompts
    compile: bool = ServerSettings.compiled

    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    target_requests: float | None = Field(None, gt=0)
    """Requests per replica, waiting ones included, that the number of replicas aims at; `slots`
    where absent."""
    cpus: float = Field(1.0, gt=0)
    """Cores per replica, which is also its number of threads."""
    gpus: float | None = Field(None, ge=0)
    """GPUs per replica. Where absent, 1 if the cluster has any."""

    def settings(self) -> ServerSettings:
        """Of each replica."""
        return ServerSettings(
            host=self.host,
            public_host=self.public_host,
            slots=ServerSettings.slots if self.slots == "auto" else self.slots,
            max_waiting=self.max_waiting,
            max_images=self.max_images,
            max_prompt=self.max_prompt,
            max_body_mb=self.max_body_mb,
            timeout=self.timeout,
            grace=self.grace,
            log_prompts=self.log_prompts,
            compiled=self.compile,
            refuse_urls=self.max_replicas > 1,
        )


def app(arguments: Arguments) -> serve.Application:
    """The application for `serve run` and `serve deploy`.

    Raises:
        ValueError: an argument makes no sense.
    """
    settings = arguments.settings()
    gpus = float(_has_gpu()) if arguments.gpus is None else arguments.gpus

    def replica() -> FastAPI:
        from pipeline.serving.build import build_app  # imports torch, which a replica alone needs

        _show_log()
        name = serve.get_replica_context().replica_id.unique_id
        return build_app(arguments.bundle, settings, token_file=arguments.token_file, replica=name)

    images = settings.slots + settings.max_waiting
    deployment = serve.deployment(
        name="images",
        # A replica answers 429 itself, with the seconds to wait. Ray's 503 comes far beyond that.
        max_ongoing_requests=images + _OTHER_REQUESTS,
        max_queued_requests=images,
        autoscaling_config=AutoscalingConfig(
            min_replicas=arguments.min_replicas,
            max_replicas=arguments.max_replicas,
            target_ongoing_requests=arguments.target_requests or settings.slots,
        ),
        graceful_shutdown_timeout_s=settings.grace,
        graceful_shutdown_wait_loop_s=0.5,
        ray_actor_options={"num_cpus": arguments.cpus, "num_gpus": gpus},
    )
    return deployment(serve.ingress(replica)()).bind()


def _has_gpu() -> bool:
    """Whether the cluster has a GPU; before Ray runs, whether this machine has."""
    if ray.is_initialized():
        return ray.cluster_resources().get("GPU", 0) >= 1
    import torch

    return torch.cuda.is_available()


def _show_log() -> None:
    """Lines of the project go to stderr, which Ray collects."""
    log = logging.getLogger("pipeline")
    log.setLevel(logging.INFO)
    log.addHandler(logging.StreamHandler())
