"""The GPU kit's runner: parts that fail, hang, lack memory or packages; results; errors without a
GPU."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_kit, gpu_parts
from benchmarks.gpu_kit import (
    AIMS,
    CARRIED,
    PARTS,
    ROOT,
    TOTAL_SECONDS,
    Part,
    device_problem,
    missing_packages,
    remedy,
    run_parts,
    table,
)
from stage2_prior import table as sampling_table

METRICS = 'import json, sys; open(sys.argv[1], "w").write(json.dumps({"metrics": %s})); '


def python(code: str):
    """A command that runs this code; its one argument is the file of the metrics."""
    return lambda part, file: [sys.executable, "-c", code, str(file)]


def run(
    tmp_path: Path,
    codes: dict[str, str],
    *,
    seconds: float = 30.0,
    gibibytes: float = 0.0,
    missing=(),
    total: float = 100.0,
):
    parts = [
        Part(name, seconds, gibibytes if name != "environment" else 0.0, whole=name == "whole")
        for name in codes
    ]
    command = lambda part, file: python(codes[part.name])(part, file)  # noqa: E731
    return run_parts(
        parts, "cuda", tmp_path, dict(os.environ), missing, total=total, command=command
    )


def test_failing_part_does_not_stop_the_others(tmp_path, capsys):
    results = run(
        tmp_path,
        {
            "broken": METRICS % '{"a": 1}' + 'raise ValueError("no kernel")',
            "next": METRICS % '{"b": 2.5}',
        },
    )
    assert [r["status"] for r in results] == ["failed", "passed"]
    assert (
        results[0]["problem"].splitlines()[0] == "ValueError: no kernel"
        and "Traceback" in results[0]["problem"]
    )
    assert results[0]["metrics"] == {"a": 1} and results[1]["metrics"] == {"b": 2.5}
    assert json.loads((tmp_path / "broken.json").read_text()) == results[0]
    assert "== broken failed after" in capsys.readouterr().out


@pytest.mark.slow
def test_hanging_part_is_killed_with_its_children_and_keeps_its_metrics(tmp_path):
    child = tmp_path / "child"
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    start = f"import subprocess, time; child = subprocess.Popen({sleep!r}); "
    code = (
        METRICS % '{"a": 1}'
        + start
        + f'open({str(child)!r}, "w").write(str(child.pid)); time.sleep(600)'
    )
    (result,) = run(tmp_path, {"hangs": code}, seconds=3)
    assert (
        result["status"] == "timed out"
        and result["problem"].startswith("it took longer than 3 s")
        and result["metrics"] == {"a": 1}
    )
    state = Path(f"/proc/{child.read_text()}/stat")
    deadline = time.monotonic() + 30
    while state.exists() and state.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_part_that_lacks_gpu_memory_reports_what_it_needs(tmp_path):
    codes = {
        "environment": METRICS % '{"free GPU memory, GiB": 7.5}',
        "large": "raise SystemExit(1)",
    }
    large = run(tmp_path, codes, gibibytes=8.0)[1]
    assert (
        large["status"] == "skipped"
        and large["problem"] == "it needs 8 GiB of free GPU memory, and 7.5 GiB are free"
    )
    assert json.loads((tmp_path / "large.json").read_text())["status"] == "skipped"


def test_parts_with_missing_packages_are_skipped(tmp_path):
    whole, other = run(
        tmp_path,
        {"whole": "raise SystemExit(1)", "other": "pass"},
        missing=["datasets>=4.0", "peft"],
    )
    assert (whole["status"], other["status"]) == ("skipped", "passed")
    assert whole["problem"] == (
        "missing packages: datasets>=4.0: run 'make gpu-wheels' where there is a network, and take "
        "the folder .whl/ along; "
        "peft: install with pip"
    )
    assert (
        remedy(["torch>=2.11 (2.9.1 is installed)"])
        == "missing packages: torch>=2.11 (2.9.1 is installed): install with pip"
    )


def test_no_part_starts_when_time_is_up(tmp_path):
    (result,) = run(tmp_path, {"late": "raise SystemExit(1)"}, total=5)
    assert result["status"] == "skipped" and re.fullmatch(
        r"\d s are left of the run's 5", result["problem"]
    )


def test_missing_or_old_packages_are_named(tmp_path):
    project = tmp_path / "pyproject.toml"
    project.write_text(
        '[project]\ndependencies = ["torch>=2.11", "numpy>=999.1,<1000", "no-such-package>=1", '
        '"fsspec[http]>=2020"]\n'
    )
    assert missing_packages(project, "") == [
        f"numpy>=999.1 ({__import__('numpy').__version__} is installed)",
        "no-such-package>=1",
    ]
    folder = tmp_path / "site" / "no_such_package-1.2.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: No_Such.Package\nVersion: 1.2\n")
    assert len(missing_packages(project, str(tmp_path / "site"))) == 1
    newer = tmp_path / "site" / "numpy-999.2.dist-info"  # it is found before the installed one
    newer.mkdir()
    (newer / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 999.2\n")
    assert missing_packages(project, str(tmp_path / "site")) == []
    assert missing_packages(ROOT / "pyproject.toml", "") == []


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_error_is_one_line(tmp_path, capsys):
    assert gpu_kit.main(["--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert (
        said.out == ""
        and said.err
        == "there is no CUDA device here; run it where there is one, or try it on the CPU: "
        "make gpu DEVICE=cpu\n"
    )
    assert device_problem("cpu", dict(os.environ)) is None


def test_unknown_part_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as error:
        gpu_kit.main(["--device", "cpu", "--only", "tests,sampling,sleep"])
    assert (
        error.value.code == 2
        and "there is no part sleep; the parts are environment, tests," in capsys.readouterr().err
    )


@pytest.mark.slow
def test_results_go_to_the_given_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path / "named"))
    assert gpu_kit.main(["--device", "cpu", "--only", "environment"]) == 0
    found = json.loads((tmp_path / "named" / "environment.json").read_text())
    assert found["status"] == "passed" and found["metrics"]["torch"] == torch.__version__
    assert "| | missing requirements | none |" in (tmp_path / "named" / "table.md").read_text()


def test_table_compares_metrics_with_targets():
    result = {
        "part": "sampling",
        "status": "passed",
        "seconds": 12.3,
        "metrics": {"images/s, batch 8, captured": 7.0},
        "problem": None,
    }
    row = (
        "| | images/s, batch 8, captured | 7 | beat 3.3 (LlamaGen-B under vLLM, A100); "
        "goal 6.6 (reached) |"
    )
    assert row in table([result], compared=True)
    assert "| | images/s, batch 8, captured | 7 |  |" in table([result], compared=False)
    result["metrics"]["images/s, batch 8, captured"] = 6.5
    assert "(not reached)" in table([result], compared=True)


def test_parts_of_the_kit_add_up_to_its_total_time():
    assert [part.name for part in PARTS] == list(gpu_parts.PARTS)
    assert {part for part, _ in AIMS} <= set(gpu_parts.PARTS)
    assert sum(part.seconds for part in PARTS) == TOTAL_SECONDS == 540
    sizes = gpu_parts.FULL
    prior = gpu_parts.random_prior(gpu_parts.TINY)
    assert (sizes.side, sizes.codes, sizes.batches[0]) == (24, 16384, 8)
    assert gpu_parts.step_bytes(prior, 4, guided=True) > gpu_parts.step_bytes(
        prior, 4, guided=False
    )


def test_makefile_wheels_match_the_kit():
    wheels = re.search(r"^WHEELS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert wheels is not None and tuple(wheels[1].split()) == CARRIED
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    assert all(any(line.startswith(f"{name}==") for line in pinned) for name in CARRIED)


def test_compiled_steps_can_skip_cuda_graphs():
    """What takes the place of capturing gives the step itself, and capturing comes back."""
    capture = sampling_table.capture_cuda_graph
    with gpu_parts.uncaptured(sampling_table):
        step = object()
        assert sampling_table.capture_cuda_graph(step, torch.device("cuda")) is step
    assert sampling_table.capture_cuda_graph is capture


def test_flops_and_bytes_match_hand_computation():
    """One block of width 64 without anything but products; 6 per parameter and token, 12 per pair
    that is seen."""
    sizes = gpu_parts.TINY
    prior = gpu_parts.random_prior(sizes)
    length, batch = prior.stream.length - 1, sizes.train_batch
    inside = sum(p.numel() for p in prior.blocks.parameters())
    heads = batch * (
        sizes.words * sizes.width * (sizes.text - 1) + sizes.codes * sizes.width * sizes.side**2
    )
    pairs = batch * length**2 / 2
    assert (
        gpu_parts.operations(prior, batch * length, batch)
        == 6 * (inside * batch * length + heads) + 12 * pairs * sizes.width * sizes.depth
    )
    cache = 2 * sizes.depth * sizes.width * length * 3
    assert gpu_parts.step_bytes(prior, 3, guided=False) == 4 * (
        inside + sizes.codes * sizes.width + cache
    )
