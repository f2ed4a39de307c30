"""Proves and measures the pipeline on a GPU in one run of at most nine minutes: `make gpu`, or
without make

    python -m benchmarks.gpu_kit [--device cuda|cpu] [--out runs/gpu] [--only sampling,training]

This file runs the parts: each is a process with a time limit, so a part that fails, hangs or loses
its CUDA context stops no other. `benchmarks/gpu_parts.py` has the parts themselves. What a part
finds is printed and written to OUT/PART.json the moment it is known, and a table ends the run
(OUT/table.md). `--device cpu` runs every part at a tiny size.

It needs the standard library alone, so that it can say which packages are missing. Wheels in
`.whl/` (`make gpu-wheels`) are installed into a temporary folder where a package is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOTAL_SECONDS = 540
"""What a whole run takes at most."""
LEAST_SECONDS = 15
"""A part is skipped where less than this is left of the run."""


@dataclass(frozen=True)
class Part:
    """One part of the run.

    Attributes:
        seconds: its limit on a GPU.
        gibibytes: free GPU memory that it needs.
        whole: whether it needs every package of the project, not only torch, transformers and
            einops.
    """

    name: str
    seconds: float
    gibibytes: float = 0.0
    whole: bool = False


PARTS = (
    Part("environment", 15),
    Part("tests", 110, 6.0, whole=True),
    Part("sampling", 120, 8.0),
    Part("training", 95, 60.0),
    Part("main_job", 180, 4.0, whole=True),
    Part("profile", 20, 30.0),
)
"""Together they take `TOTAL_SECONDS` at most; the last one also has what the others left."""
CARRIED = ("datasets", "dill", "multiprocess", "jsonargparse", "filelock")
"""Packages that `make gpu-wheels` gathers: pure Python, and absent where only a framework is
installed."""
CPU_SECONDS = 60
"""Limit of each part on the CPU."""


@dataclass(frozen=True)
class Aim:
    """What a metric is compared with."""

    text: str
    least: float | None = None


AIMS = {
    ("sampling", "images/s, batch 8, captured"): Aim(
        "beat 3.3 (LlamaGen-B under vLLM, A100); goal 6.6", 6.6
    ),
    ("training", "share of the bf16 rate"): Aim("goal 45%", 0.45),
    ("main_job", "run, s"): Aim("384 s of training on 2 CPU cores (Zen 5)"),
    ("main_job", "prompt accuracy"): Aim("97.2% on the CPU"),
    ("main_job", "prompt accuracy, new pairs"): Aim("76.8% on the CPU"),
}

Result = dict[str, Any]
"""A part's name, status (passed, failed, timed out, skipped), seconds, metrics by name, and what
went wrong."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    start = time.monotonic()
    chosen = [part for part in PARTS if not options.only or part.name in options.only]
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-kit-", ignore_cleanup_errors=True) as scratch:
        environment = _environment(options.device, Path(scratch))
        if problem := device_problem(options.device, environment):
            print(problem, file=sys.stderr)
            return 1
        missing = missing_packages(ROOT / "pyproject.toml", environment["PYTHONPATH"])
        left = TOTAL_SECONDS - (time.monotonic() - start)
        results = run_parts(chosen, options.device, options.out, environment, missing, total=left)
    lines = table(results, compared=options.device == "cuda")
    print(lines)
    (options.out / "table.md").write_text(lines + "\n")
    for unfinished in options.out.glob("*.writing"):  # of a part that was ended in the midst of it
        unfinished.unlink()
    return 0 if all(result["status"] == "passed" for result in results) else 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Proves and measures the pipeline on a GPU.")
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu runs every part at a tiny size",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT") or "runs/gpu"),
        help="folder of the results ($OUT or runs/gpu)",
    )
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        help=f"parts, comma-separated: {','.join(part.name for part in PARTS)}",
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.only or ()) - {part.name for part in PARTS}:
        parser.error(
            f"there is no part {', '.join(sorted(unknown))}; the parts are "
            f"{', '.join(part.name for part in PARTS)}"
        )
    return options


def _environment(device: str, scratch: Path) -> dict[str, str]:
    """Variables of every part: where packages are found, and no network."""
    path = [str(ROOT)]
    if missing_packages(ROOT / "pyproject.toml", "") and (
        wheels := sorted((ROOT / ".whl").glob("*.whl"))
    ):
        install = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-index",
            "--no-deps",
            "--no-compile",
            "--target",
            str(scratch / "site"),
        ]
        done = subprocess.run(
            [*install, *map(str, wheels)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            print(
                "the wheels in .whl/ cannot be installed: "
                f"{(done.stderr.splitlines() or ['pip says nothing'])[-1]}",
                file=sys.stderr,
            )
        path.append(str(scratch / "site"))
    if given := os.environ.get("PYTHONPATH"):
        path.append(given)
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    return {
        **os.environ,
        **hidden,
        "PYTHONPATH": os.pathsep.join(path),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "TMPDIR": str(scratch),
    }


def device_problem(device: str, environment: dict[str, str]) -> str | None:
    """Why nothing can run on the device, in a line; None where it can."""
    if importlib.util.find_spec("torch") is None:
        return (
            f"torch is not installed for {sys.executable}; install it, or name another "
            "Python: make gpu GPU_PYTHON=/path/to/python"
        )
    if device == "cpu":
        return None
    ask = "import torch; raise SystemExit(0 if torch.cuda.is_available() else 7)"
    found = subprocess.run(
        [sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=False
    )
    if found.returncode == 7:
        return (
            "there is no CUDA device here; run it where there is one, or try it on "
            "the CPU: make gpu DEVICE=cpu"
        )
    if found.returncode:
        return f"torch cannot be imported: {(found.stderr.splitlines() or ['it says nothing'])[-1]}"
    return None


def missing_packages(project: Path, path: str) -> list[str]:
    """The project's requirements, pytest and what `datasets` needs, that are not installed or are
    too old.

    They are named as in 'datasets>=4.0' and 'torch>=2.11 (2.9.1 is installed)'.

    Args:
        project: pyproject.toml.
        path: further folders of packages, as in PYTHONPATH.
    """
    required = [
        *tomllib.loads(project.read_text())["project"]["dependencies"],
        "pytest",
        "dill",
        "multiprocess",
    ]
    found = {}
    for distribution in importlib.metadata.distributions(
        path=[*filter(None, path.split(os.pathsep)), *sys.path]
    ):
        if name := distribution.metadata[
            "Name"
        ]:  # a folder that a failed installation left has none
            found.setdefault(_plain(name), distribution.version)
    missing = []
    for requirement in required:
        name = _plain(re.split(r"[\[<>=!~; ]", requirement)[0])
        version = re.search(r">=\s*([\d.]+)", requirement)
        shown = re.sub(r"\[.*?\]", "", requirement).split(",")[0]
        if name not in found:
            missing.append(shown)
        elif version and _numbers(found[name]) < _numbers(version[1]):
            missing.append(f"{shown} ({found[name]} is installed)")
    return missing


def remedy(missing: Sequence[str]) -> str:
    """What is missing and how it comes there, in a line."""
    carried = [name for name in missing if name.startswith(CARRIED)]
    others = [name for name in missing if name not in carried]
    ways = (
        [
            f"{', '.join(carried)}: run 'make gpu-wheels' where there is a network, and take the "
            "folder .whl/ along"
        ]
        if carried
        else []
    )
    ways += [f"{', '.join(others)}: install with pip"] if others else []
    return f"missing packages: {'; '.join(ways)}"


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _numbers(version: str) -> list[int]:
    """2.11.0+cu130 -> [2, 11, 0]"""
    return [int(part) for part in re.findall(r"\d+", version.split("+")[0])]


def run_parts(
    parts: Sequence[Part],
    device: str,
    out: Path,
    environment: dict[str, str],
    missing: Sequence[str],
    *,
    total: float = TOTAL_SECONDS,
    command: Callable[[Part, Path], list[str]] | None = None,
) -> list[Result]:
    """Runs the parts one after another; a failing part does not stop the next.

    Args:
        missing: absent packages; parts that need them are skipped.
        total: seconds that all parts take together at most.
        command: (part, file of its metrics) -> what to start; by default the part of
            `benchmarks.gpu_parts`.
    """
    end = time.monotonic() + total
    free = None
    results: list[Result] = []
    for part in parts:
        left = end - time.monotonic()
        file = out / f"{part.name}.json"
        result: Result = {
            "part": part.name,
            "status": "skipped",
            "seconds": 0.0,
            "metrics": {},
            "problem": None,
        }
        if part.whole and missing:
            result["problem"] = remedy(missing)
        elif free is not None and free < part.gibibytes:
            result["problem"] = (
                f"it needs {part.gibibytes:.0f} GiB of free GPU memory, and {free:.1f} GiB are free"
            )
        elif left < LEAST_SECONDS:
            result["problem"] = f"{max(left, 0):.0f} s are left of the run's {total:.0f}"
        else:
            own = left if part is PARTS[-1] else part.seconds
            limit = min(CPU_SECONDS if device == "cpu" else own, left)
            print(f"== {part.name} (at most {limit:.0f} s)", flush=True)
            given = command(part, file) if command else _command(part, device, file)
            result |= _run(given, limit, file, environment)
        write_json(file, result)
        problem = f": {result['problem'].splitlines()[0]}" if result["problem"] else ""
        print(
            f"== {part.name} {result['status']} after {result['seconds']:.0f} s{problem}",
            flush=True,
        )
        if part.name == "environment":
            free = result["metrics"].get("free GPU memory, GiB")
        results.append(result)
    return results


def _command(part: Part, device: str, file: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "benchmarks.gpu_parts",
        part.name,
        "--device",
        device,
        "--out",
        str(file),
    ]


def _run(command: list[str], limit: float, file: Path, environment: dict[str, str]) -> Result:
    """A part's process, and what became of it. Its output is shown as it comes and its last lines
    are kept where it fails."""
    file.unlink(missing_ok=True)
    start = time.monotonic()
    lines: list[str] = []
    # A session of its own: what the part has started ends with it.
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        late = _ends_at(process, limit)
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            print(f"  {lines[-1]}", flush=True)
        process.wait()
        expired = late()
    metrics = _metrics(file)
    seconds = round(time.monotonic() - start, 1)
    told = [line for line in lines if line.strip()]
    if expired:
        problem = "\n".join([f"it took longer than {limit:.0f} s", *told[-400:]])
        return {"status": "timed out", "seconds": seconds, "metrics": metrics, "problem": problem}
    if process.returncode:
        last = told[-1] if told else f"it ended with status {process.returncode} and no word"
        return {
            "status": "failed",
            "seconds": seconds,
            "metrics": metrics,
            "problem": "\n".join([last, *told[-400:-1]]),
        }
    return {"status": "passed", "seconds": seconds, "metrics": metrics, "problem": None}


def _ends_at(process: subprocess.Popen[str], limit: float) -> Callable[[], bool]:
    """Ends a process and its children after `limit` seconds; returns a call that stops the clock
    and tells whether it had to."""
    late = threading.Event()

    def end() -> None:
        late.set()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(limit, end)
    timer.start()

    def stop() -> bool:
        timer.cancel()
        return late.is_set()

    return stop


def _metrics(file: Path) -> dict[str, Any]:
    """What a part has written down so far."""
    try:
        return json.loads(file.read_text())["metrics"]
    except (OSError, ValueError, KeyError):
        return {}


def write_json(file: Path, value: Any) -> None:
    """Writes by way of a temporary file, so that a part that is killed leaves the file complete."""
    temporary = file.with_suffix(".writing")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(file)


def table(results: Sequence[Result], *, compared: bool) -> str:
    """Every metric of every part as Markdown, with its target where `compared`: sizes on the CPU
    have none."""
    lines = ["| part | metric | value | to compare |", "|---|---|---|---|"]
    for result in results:
        problem = f": {result['problem'].splitlines()[0]}" if result["problem"] else ""
        lines.append(
            f"| **{result['part']}** | {result['status']}{problem} | {result['seconds']:.0f} s | "
            "|".replace("\n", " ")
        )
        for name, value in result["metrics"].items():
            aim = AIMS.get((result["part"], name)) if compared else None
            reached = (
                ""
                if aim is None or aim.least is None
                else " (reached)"
                if value >= aim.least
                else " (not reached)"
            )
            lines.append(
                f"| | {name} | {shown(name, value)} | {aim.text + reached if aim else ''} |"
            )
    return "\n".join(lines)


def shown(name: str, value: Any) -> str:
    """A metric for people: fractions as percentages, large numbers with commas."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return str(value)
    if "accuracy" in name or name.startswith("share"):
        return f"{value:.1%}"
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
