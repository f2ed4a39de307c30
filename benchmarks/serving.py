"""How fast a server of images is, and what it does under load.

    python -m benchmarks.serving [--bundle icons] [--compile] [--requests 1000] [--out serving.json]

One process serves, this one asks. In one run, with guidance and options of the bundle:

- `plain`: seconds of one image by `TextToImagePipeline`, not compiled, before the server starts.
- `alone`: seconds of one image from the server while nothing else runs, and to its first preview.
- `one at a time` and `32 clients`: images per second.
- `load`: requests at 64 clients: how many were lost or doubled, percentiles of their seconds, and
  the growth of the server's memory from a tenth of them to the end. The codes of the first 100 are
  compared with those of `TextToImagePipeline` alone.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil

from pipeline import TextToImagePipeline

PROMPTS = ("red heart, twemoji style", "cat face, noto style", "rocket, fluent style", "apple")
_REPEATS = 10
_COMPARED = 100
"""Images of the load whose codes are compared."""


def _median(seconds: list[float]) -> float:
    return statistics.median(seconds)


def _prompt(seed: int) -> str:
    return PROMPTS[seed % len(PROMPTS)]


def _plain(pipe: TextToImagePipeline) -> float:
    seconds = []
    for seed in range(_REPEATS):
        start = time.perf_counter()
        pipe(PROMPTS[0], seed=seed)
        seconds.append(time.perf_counter() - start)
    return _median(seconds)


class _Asker:
    def __init__(self, port: int) -> None:
        limits = httpx.Limits(max_connections=128)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600, limits=limits)

    def image(self, seed: int) -> float:
        """Seconds of one image."""
        start = time.perf_counter()
        self.codes(seed)
        return time.perf_counter() - start

    def codes(self, seed: int) -> list[int]:
        """The codes of one image."""
        body = {"prompt": _prompt(seed), "seed": seed}
        response = self.client.post("/v1/images/generations", json=body)
        response.raise_for_status()
        (data,) = response.json()["data"]
        assert len(data["b64_json"]) > 100
        return list(data["codes"])

    def images_counted(self) -> float:
        """Images that the server has returned so far."""
        text = self.client.get("/metrics").text
        line = next(one for one in text.splitlines() if one.startswith("minidalle_images_total "))
        return float(line.split()[1])

    def first_preview(self) -> float:
        """Seconds to the first preview of one image."""
        start = time.perf_counter()
        body = {"prompt": PROMPTS[0], "seed": 1, "stream": True, "preview_every": 4}
        with self.client.stream("POST", "/v1/images/generations", json=body) as response:
            for line in response.iter_lines():
                if line.startswith("event: image_generation.partial_image"):
                    return time.perf_counter() - start
        raise RuntimeError("the stream had no preview")

    def images_per_second(self, clients: int, count: int) -> float:
        """Of single requests by so many clients."""
        start = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(self.image, range(count)))
        return count / (time.perf_counter() - start)

    def wait(self, server: subprocess.Popen[bytes]) -> None:
        """Until the server is ready."""
        while server.poll() is None:
            try:
                if self.client.get("/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.2)
        raise RuntimeError("the server ended before it was ready")


def _load(
    asker: _Asker, process: psutil.Process, count: int, pipe: TextToImagePipeline
) -> dict[str, float]:
    seconds: list[float] = []
    codes: dict[int, list[int]] = {}

    def ask(seed: int) -> None:
        start = time.perf_counter()
        try:
            codes[seed] = asker.codes(seed)
        except httpx.HTTPError as error:
            print(f"request {seed} was lost: {error!r}")
        else:
            seconds.append(time.perf_counter() - start)

    returned = asker.images_counted()
    with ThreadPoolExecutor(64) as pool:
        list(pool.map(ask, range(count // 10)))
        before = process.memory_info().rss
        list(pool.map(ask, range(count // 10, count)))
    after = process.memory_info().rss
    points = statistics.quantiles(seconds, n=100)
    compared = min(_COMPARED, count)
    equal = sum(
        codes.get(seed) == pipe(_prompt(seed), seed=seed).codes.flatten().tolist()
        for seed in range(compared)
    )
    return {
        "requests": count,
        "lost": count - len(seconds),
        "doubled": asker.images_counted() - returned - len(seconds),
        "compared_images": compared,
        "equal_images": equal,
        "p50_s": points[49],
        "p95_s": points[94],
        "p99_s": points[98],
        "growth_mib": (after - before) / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", default="icons")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    pipe = TextToImagePipeline.from_pretrained(asked.bundle)
    found: dict[str, object] = {"plain_s": _plain(pipe)}
    command = [sys.executable, "-m", "pipeline.cli", "serve", "--port", str(asked.port)]
    command += ["--bundle", asked.bundle, *(["--compile"] if asked.compile else [])]
    with subprocess.Popen([*command, "--log-level", "warning"], env=dict(os.environ)) as server:
        try:
            asker = _Asker(asked.port)
            asker.wait(server)
            asker.images_per_second(32, 64)  # warm-up
            found["alone_s"] = _median([asker.image(seed) for seed in range(_REPEATS)])
            found["first_preview_s"] = _median([asker.first_preview() for _ in range(_REPEATS)])
            found["one_at_a_time_images_per_s"] = asker.images_per_second(1, 20)
            found["32_clients_images_per_s"] = asker.images_per_second(32, 192)
            found["load"] = _load(asker, psutil.Process(server.pid), asked.requests, pipe)
        finally:
            server.send_signal(signal.SIGTERM)
    text = json.dumps(found, indent=2)
    print(text)
    if asked.out:
        asked.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
