"""Commands in a process whose connections are counted: `python -m tests.helpers.connections`
reads a JSON list of commands from standard input and prints a JSON list of what each one did."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_VARIABLES = (
    "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "HF_HUB_CACHE",
    "HF_ENDPOINT",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
)


def run_counted(commands: list[list[str]], home: Path, **environment: str) -> list[dict[str, Any]]:
    """Runs commands one after another in one process with an empty cache of the Hub; of each, its
    exit `status`, what it wrote as `error`, and the names and addresses that it `asked` for."""
    kept = {name: value for name, value in os.environ.items() if name.upper() not in _VARIABLES}
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.connections"],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=kept | {"HF_HOME": str(home), "OMP_NUM_THREADS": "1"} | environment,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _main() -> None:
    asked: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        # Python's own events: no library that it runs gets around them.
        if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
            address = arguments[1]
            if isinstance(address, tuple):  # a text is a socket of this machine
                asked.append(f"{event} {address[0]}")
        elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
            asked.append(f"{event} {arguments[0]}")
        else:
            return
        raise ConnectionError("no network in this test")

    sys.addaudithook(watch)
    from pipeline.cli.main import main

    results = []
    for command in json.load(sys.stdin):
        asked.clear()
        error = io.StringIO()
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
            status = main(command)
        results.append({"status": status, "error": error.getvalue(), "asked": list(asked)})
    print(json.dumps(results))


if __name__ == "__main__":
    _main()
