"""`minidalle serve`: what it says at the start, refuses, and does after a signal."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from pipeline.cli import main
from pipeline.serving.server import listen
from pipeline.serving.settings import ServerSettings
from tests.helpers.serving import connected, free_port, serving_pipeline, wait_until

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "tiny"
    serving_pipeline().save_pretrained(folder)
    return folder


class Serving:
    """A process of `minidalle serve` at a free port."""

    def __init__(self, folder, bundle, *options):
        port = str(free_port())
        command = [sys.executable, "-m", "pipeline.cli", "serve", "--bundle", str(bundle)]
        # A pipe that nobody reads would stop the server once it is full.
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--port", port, *options],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        self.address = f"http://127.0.0.1:{port}"
        self.wait_for(lambda: f"serving tiny at {self.address}\n" in self.log.read_text())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()

    def wait_for(self, condition):
        def ready():
            assert self.process.poll() is None, self.log.read_text()
            return condition()

        wait_until(ready)

    def metrics(self):
        return httpx.get(f"{self.address}/metrics", timeout=120).text

    def wait_until_sampling(self):
        self.wait_for(lambda: "minidalle_codes_total 0.0" not in self.metrics())

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.process.wait(timeout=120), self.log.read_text()


@pytest.mark.slow
def test_a_server_answers_and_finishes_what_runs_after_a_signal(tmp_path, bundle):
    with Serving(tmp_path, bundle, "--log-prompts") as serving:
        results = []

        def ask(seed):
            body = {"prompt": "a red heart", "n": 8, "seed": seed}
            url = f"{serving.address}/v1/images/generations"
            results.append(httpx.post(url, json=body, timeout=120))

        assert httpx.get(f"{serving.address}/readyz", timeout=120).json() == {"status": "ready"}
        asking = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
        for one in asking:
            one.start()
        # All are being sampled.
        serving.wait_for(lambda: serving.log.read_text().count(" prompt 'a red heart'") == 4)
        status, rest = serving.stop()
        for one in asking:
            one.join()
        assert status == 0 and "SIGTERM: finishing" in rest
        assert [len(one.json()["data"]) for one in results] == [8] * 4


@pytest.mark.slow
def test_what_is_not_finished_in_time_gets_503(tmp_path, bundle):
    with Serving(
        tmp_path, bundle, "--grace", "0.01", "--max-waiting", "2000", "--max-images", "1000"
    ) as serving:
        results = []

        def ask():
            body = {"prompt": "a red heart", "n": 1000}
            url = f"{serving.address}/v1/images/generations"
            results.append(httpx.post(url, json=body, timeout=120))

        asking = threading.Thread(target=ask)
        asking.start()
        serving.wait_until_sampling()
        status, _ = serving.stop(signal.SIGINT)
        asking.join()
        assert status == 0
        assert results[0].status_code == 503
        assert results[0].json()["error"]["code"] == "shutting_down"


@pytest.mark.slow
def test_a_client_that_does_not_read_its_response_does_not_keep_the_server_from_ending(
    tmp_path, bundle
):
    with Serving(
        tmp_path, bundle, "--grace", "1", "--max-waiting", "6000", "--max-images", "5000"
    ) as serving:
        # More than the system's own buffers hold.
        body = {"prompt": "a red heart", "n": 5000}
        with connected(serving.address, "/v1/images/generations", body):
            serving.wait_for(lambda: "minidalle_images_total 5000.0" in serving.metrics())
            status, log = serving.stop()
        assert status == 0 and "timeout graceful shutdown exceeded" in log


def refused(capsys, *arguments):
    status = main(["serve", *map(str, arguments)])
    return status, capsys.readouterr().err


def test_a_port_that_is_taken_is_one_line(bundle, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, error = refused(capsys, "--bundle", bundle, "--port", port)
    assert status == 1 and error.count("\n") == 1
    assert f"cannot listen at 127.0.0.1:{port}" in error and "another port" in error


def test_a_second_server_at_a_port_is_refused_at_once():
    port = free_port()
    with (
        listen("127.0.0.1", port),
        pytest.raises(OSError, match=rf"cannot listen at 127\.0\.0\.1:{port}"),
    ):
        listen("127.0.0.1", port)


def test_a_bundle_that_is_not_there(tmp_path, capsys):
    status, error = refused(capsys, "--bundle", tmp_path / "none", "--port", free_port())
    assert status == 1 and "no bundle" in error


def test_a_bundle_of_gaussian_latents_is_refused(tmp_path, capsys):
    from tests.helpers.pipelines import tiny_latent_pipeline

    tiny_latent_pipeline().save_pretrained(tmp_path / "latent")
    status, error = refused(capsys, "--bundle", tmp_path / "latent", "--port", free_port())
    assert status == 1 and "has Gaussian latents" in error


@pytest.mark.parametrize("package", ["python_multipart", "pipeline.serving.server"])
def test_missing_packages_name_the_command(bundle, capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    status, error = refused(capsys, "--bundle", bundle)
    assert status == 2 and "pip install 'mini-dalle[serve]'" in error


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"slots": 0}, "slots is 0; it must be a number from 1 to 64"),
        ({"slots": 65}, "from 1 to 64"),
        ({"port": 0}, "from 1 to 65535"),
        ({"max_images": 0}, "at least 1"),
        ({"timeout": 0.0}, "above 0"),
        ({"public_host": "https://draw.example.org"}, "give a name alone"),
        ({"public_host": "draw.example.org", "host": "0.0.0.0"}, "leave one of them out"),
        ({"grace": math.inf}, "grace is inf; it must be a number above 0"),
        ({"max_body_mb": math.nan}, "max_body_mb is nan"),
        ({"max_images": 100, "max_waiting": 10}, "raise max_waiting"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        ServerSettings(**change)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        *((host, True) for host in ("127.0.0.1", "localhost", "LOCALHOST", "localhost.", "::1")),
        *((host, False) for host in ("0.0.0.0", "box", "localhost.box")),
    ],
)
def test_loopback(host, expected):
    assert ServerSettings(host=host).is_loopback is expected


def test_an_open_address_without_tokens_is_reported(bundle, caplog, monkeypatch):
    import pipeline.serving.server as server

    caplog.set_level(logging.WARNING)

    def run(self, sockets):
        sockets[0].close()
        self._service.close()

    monkeypatch.setattr(server._Server, "run", run)
    server.serve(bundle, ServerSettings(host="0.0.0.0", port=free_port()))
    assert "0.0.0.0 can be reached from other machines" in caplog.text


@pytest.mark.parametrize(
    ("options", "slots"), [([], 32), (["--slots", "auto"], 32), (["--slots", "5"], 5)]
)
def test_slots_are_a_number_or_auto(bundle, monkeypatch, options, slots):
    served = []
    monkeypatch.setattr(
        "pipeline.serving.server.serve", lambda bundle, settings, **_: served.append(settings)
    )
    assert main(["serve", "--bundle", str(bundle), *options]) == 0
    assert [settings.slots for settings in served] == [slots]


def test_slots_that_are_neither_a_number_nor_auto_are_refused(bundle, capsys):
    assert main(["serve", "--bundle", str(bundle), "--slots", "many"]) == 2
    assert "--slots is 'many'; give a number or auto" in capsys.readouterr().err


def test_listen_names_an_address_that_is_not_ours():
    with pytest.raises(OSError, match=r"cannot listen at 192\.0\.2\.1:8000 .* give an address of"):
        listen("192.0.2.1", 8000)
