"""Two real processes over gloo: the work is split, one writes, and the result equals that of one
process."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.data.codes.dataset import CodesDataset, read_manifest
from tests.helpers.launch import launch, torchrun, worker_environment

pytestmark = pytest.mark.distributed


@pytest.fixture
def two_runs(by_processes):
    """The tiny run by one process and by two."""
    return by_processes / "runs" / "by1", by_processes / "runs" / "by2"


def test_gradients_and_codebook_equal_those_of_the_global_batch(two_runs):
    """Equal after all steps but for the order of sums: shares of a batch are averaged right, text
    tokens and codebook included."""
    for stage in ("tokenizer", "prior"):
        one, two = (load_file(run / stage / "model.safetensors") for run in two_runs)
        for key, value in one.items():
            torch.testing.assert_close(
                two[key], value, atol=1e-3, rtol=1e-3, msg=lambda m, k=f"{stage}.{key}": f"{k}: {m}"
            )


def test_discriminator_on_two_processes_equals_one(tmp_path):
    """Its own pass, its anchors and the weight it is given: the same to what the order of sums and
    the weight of each half allow."""
    import yaml

    from tests.helpers.experiments import TINY

    path = tmp_path / "tiny.yaml"
    path.write_text(
        yaml.safe_dump({**TINY, "output_dir": str(tmp_path / "runs"), "precision": "fp32"})
    )
    options = [
        "--tokenizer.objective.discriminator.weight",
        "1",
        "--tokenizer.objective.discriminator.width",
        "16",
        "--tokenizer.train.steps",
        "4",
        "--tokenizer.objective.discriminator.start",
        "1",
        "--tokenizer.objective.discriminator.lecam",
        "0.1",
        "--tokenizer.objective.discriminator.adaptive",
        "false",
    ]
    weights = []
    for processes in (1, 2):
        launch(
            tmp_path,
            processes,
            "train-tokenizer",
            "--config",
            str(path),
            "--name",
            f"by{processes}",
            *options,
        )
        weights.append(
            load_file(
                tmp_path
                / "runs"
                / f"by{processes}"
                / "tokenizer"
                / "checkpoints"
                / "step-4"
                / "weights.safetensors"
            )
        )
    assert "discriminator.anchors" in weights[0]
    for key, value in weights[0].items():
        torch.testing.assert_close(
            weights[1][key], value, atol=2e-3, rtol=2e-3, msg=lambda m, k=key: f"{k}: {m}"
        )


def test_encoding_on_two_processes_is_complete(two_runs):
    manifests = [read_manifest(run / "codes") for run in two_runs]
    names = [[file["name"] for file in m["files"]["train"]] for m in manifests]
    assert names[0] == names[1] == [f"train-{k:05d}-of-00006.arrow" for k in range(6)]
    codes = CodesDataset(two_runs[1] / "codes", "train")
    assert len(codes) == 40 and codes.source_rows(range(40)) == list(range(40))


def test_only_one_process_writes(two_runs):
    assert sorted(p.name for p in (two_runs[1] / "prior" / "checkpoints").iterdir()) == [
        "step-4",
        "step-6",
    ]
    held_out = [
        json.loads((run / "prior" / "settings.json").read_text())["held_out"]["nats_per_code"]
        for run in two_runs
    ]
    assert held_out[0] == pytest.approx(held_out[1], rel=0.2)


def test_images_do_not_depend_on_the_number_of_processes(two_runs, tmp_path):
    prompts = ["a red circle", "a blue star", "a green heart"]
    for processes in (1, 2):
        launch(
            tmp_path,
            processes,
            "generate",
            "--bundle",
            str(two_runs[0] / "bundle"),
            *prompts,
            "--num-images",
            "2",
            "--out",
            str(tmp_path / f"by{processes}"),
        )
    for file in sorted((tmp_path / "by1").iterdir()):
        assert file.read_bytes() == (tmp_path / "by2" / file.name).read_bytes(), file.name
    assert len(list((tmp_path / "by2").glob("0*.png"))) == 6


DIES = """
import os, signal, sys
from pipeline import cli
from pipeline.training.prefetch import BatchPrefetcher
get, victim = BatchPrefetcher.get, sys.argv[1]
def dies(batches, step):
    if step == 5 and os.environ["RANK"] == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    return get(batches, step)
BatchPrefetcher.get = dies
# Once one is dead, torchrun sends SIGTERM to the others: it must not cut off their last line.
signal.signal(signal.SIGTERM, signal.SIG_IGN)
status = cli.main(sys.argv[2:])
print(f"process {os.environ['RANK']} ended with {status}", flush=True)
sys.exit(status)
"""


def ended(tmp_path: Path, script: str, *arguments: str, limit: int = 300) -> str:
    """What two processes of a script say that fail; one that hangs fails the test."""
    (tmp_path / "script.py").write_text(script)
    command = [*torchrun(2), "--", str(tmp_path / "script.py"), *arguments]
    with subprocess.Popen(
        command,
        env=worker_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
    ) as process:
        try:
            said, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its processes
            pytest.fail(f"it hangs:\n{process.communicate()[0][-3000:]}")
    assert process.returncode != 0
    return said


@pytest.mark.parametrize("victim", [0, 1])
def test_dying_process_ends_the_others_with_one_line(tiny_yaml, tmp_path, victim):
    arguments = ["train-tokenizer", "--config", str(tiny_yaml), "--tokenizer.train.steps", "100"]
    said = ended(tmp_path, DIES, str(victim), *arguments)
    checkpoint = tmp_path / "runs" / "tiny" / "tokenizer" / "checkpoints" / "step-4"
    line = (
        "minidalle train-tokenizer: tokenizer: another process of this job is gone or no longer "
        "answers; the last good checkpoint is "
        f"{checkpoint}; to resume: minidalle {' '.join(arguments)}, under the same launcher"
    )
    assert said.splitlines().count(line) == 1, said
    assert f"process {1 - victim} ended with 1" in said and f"process {victim} ended" not in said
    assert (checkpoint / "manifest.json").is_file()


AGREES = """
import fcntl, json, math, os, signal, sys, torch
from pathlib import Path
from accelerate import PartialState
from pipeline import cli
from pipeline.training.prefetch import BatchPrefetcher
from stage1_tokenizer import objective

run, arguments = Path(sys.argv[1]), sys.argv[2:]
rank, take = int(os.environ["RANK"]), BatchPrefetcher.get
to_range, now = objective.to_model_range, [0]

def seen(batches, step):
    now[0] = step
    if step == 4 and rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return take(batches, step)

BatchPrefetcher.get = seen
def broken(batch):
    return to_range(batch) * (math.nan if now[0] == 2 and rank == 1 else 1)
objective.to_model_range = broken
if rank == 0:
    run.mkdir(parents=True)
    lock = (run / ".lock").open("w")
    lock.write(json.dumps({"pid": 1, "host": "h", "since": "s"}))
    lock.flush()
    fcntl.flock(lock, fcntl.LOCK_EX)
refused = cli.main(arguments)
PartialState().wait_for_everyone()
if rank == 0:
    left = [path.name for path in run.iterdir()]
    lock.close()
    assert left == [".lock"], left
PartialState().wait_for_everyone()
status = cli.main(arguments)
timeout = torch.distributed.group.WORLD._get_backend(torch.device("cpu")).options._timeout
count = PartialState().num_processes
print(f"process {rank} of {count}: {refused}, {status}, {timeout}", flush=True)
sys.exit(status)
"""


def test_processes_refuse_skip_and_stop_together(tiny_yaml, tmp_path):
    """The second's batch is not finite and the second alone gets the signal."""
    run = tmp_path / "runs" / "tiny"
    arguments = [
        "train-tokenizer",
        "--config",
        str(tiny_yaml),
        "--tokenizer.train.max_nonfinite_steps",
        "1",
        "--tokenizer.train.steps",
        "100",
        "--process_timeout",
        "7",
    ]
    said = ended(tmp_path, AGREES, str(run), *arguments)
    assert (
        "process 0 of 2: 1, 143, 0:07:00" in said and "process 1 of 2: 1, 143, 0:07:00" in said
    ), said
    assert said.count(f"{run} is in use by process 1 on h since s") == 2
    lines = [
        line[line.index("tokenizer: ") :] for line in said.splitlines() if "skipped, 1 of 1" in line
    ]
    assert len(lines) == 1 and "is not finite at step 2 (scene " in lines[0], said
    assert said.count("stopped by SIGTERM after step 5 of 100 (tokenizer), which is saved") == 1
    state = json.loads((run / "tokenizer" / "checkpoints" / "step-5" / "state.json").read_text())
    assert state["step"] == 5 and state["skipped"] == 1 and not (run / ".lock").exists()
    weights = load_file(run / "tokenizer" / "checkpoints" / "step-5" / "weights.safetensors")
    assert all(value.isfinite().all() for value in weights.values() if value.is_floating_point())
