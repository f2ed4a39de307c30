"""Ray and an application of deploy/ray_serve.py on this machine, at ports of the loopback."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from tests.helpers.serving import free_port

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SECONDS = 600
"""To wait for anything at most: replicas import torch, also where others use the cores."""
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "RAY_AUTH_MODE": "token",  # else what a program does depends on whether the user has a token
    "RAY_AUTH_TOKEN": "0" * 64,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # as there, Ray listens at the loopback alone
}


@dataclass(frozen=True)
class RayServe:
    """An application that runs."""

    url: str
    client: httpx.Client
    """Of that address."""
    head: psutil.Process
    """All processes of the cluster descend from it."""
    run: subprocess.Popen[bytes]
    """`serve run`."""
    log: Path
    """What it prints."""

    def replicas(self) -> dict[str, float]:
        """Images that each replica returned, by its name, of those that answer now."""
        found = {}
        for _ in range(20):
            text = self.client.get("/metrics").text
            found |= re.findall(r'minidalle_images_total\{replica="(\w+)"\} (\S+)', text)
        return {name: float(count) for name, count in found.items()}

    def wait_for_replicas(self, count: int, besides: Collection[str] = ()) -> dict[str, float]:
        """The replicas once there are as many, other than given ones."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            assert self.run.poll() is None, self.log.read_text()
            with suppress(httpx.TransportError):
                if self.client.get("/readyz").status_code == 200:
                    found = self.replicas()
                    if len(found.keys() - set(besides)) >= count:
                        return found
            time.sleep(0.2)
        raise TimeoutError(f"there are no {count} replicas:\n{self.log.read_text()}")

    def processes(self) -> list[psutil.Process]:
        """Those of replicas."""
        every = self.head.children(recursive=True)
        return [one for one in every if "ServeReplica:" in " ".join(one.cmdline())]


@contextmanager
def ray_serve(folder: Path, **arguments: Any) -> Iterator[RayServe]:
    """Runs deploy/ray_serve.yaml with changed arguments at a free port; ends all afterwards."""
    config = yaml.safe_load((ROOT / "deploy" / "ray_serve.yaml").read_text())
    config["http_options"]["port"] = free_port()
    config["applications"][0]["args"] |= arguments
    path = folder / "ray_serve.yaml"
    path.write_text(yaml.safe_dump(config))
    port = free_port()
    # The paths of Ray's sockets must be short.
    sockets = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
    start = ["--head", "--block", f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=2"]
    start += ["--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={sockets}"]
    start += ["--object-store-memory=100000000", "--min-worker-port=0", "--max-worker-port=0"]
    start += [f"--{name}-port={free_port()}" for name in ("ray-client-server", "metrics-export")]
    start += [f"--dashboard-agent-{name}-port={free_port()}" for name in ("listen", "grpc")]
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, sockets, ignore_errors=True)
        head = _started(stack, folder / "ray.log", "ray", "start", *start)
        log = folder / "serve.log"
        run = _started(stack, log, "serve", "run", f"--address=127.0.0.1:{port}", path)
        url = f"http://127.0.0.1:{config['http_options']['port']}"
        client = stack.enter_context(httpx.Client(base_url=url, timeout=SECONDS))
        yield RayServe(url, client, psutil.Process(head.pid), run, log)


def _started(stack: ExitStack, log: Path, *command: str | Path) -> subprocess.Popen[bytes]:
    """A program of this environment; it and its descendants are ended with the stack."""
    with log.open("w") as file:
        process = subprocess.Popen(
            [BIN / command[0], *command[1:]],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | ENVIRONMENT,
        )
    stack.callback(_end, process)
    if command[1] == "start":
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    family = []
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=30)
    for one in family:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    process.kill()
    process.wait()
