"""Commands under torchrun on CPUs, for tests: the number of processes is checked, and a hang is a
failure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import yaml

from tests.helpers.experiments import TINY

ROOT = Path(__file__).parents[2]
CHECK = """
import sys
from accelerate import PartialState
from pipeline.runtime import distributed
from pipeline.cli import main
distributed.destroy_process_group = lambda: None  # so that the state can still be asked
status = main(sys.argv[2:])
found = PartialState().num_processes
assert found == int(sys.argv[1]), f"there are {found} processes"
sys.exit(status)
"""

WATCHED = """
import json, torch
from accelerate import Accelerator
from pipeline.stages import prior as stage2, tokenizer as stage1
from stage1_tokenizer.quantizers import VectorQuantizer
logged, restarts, fit, place = [], [], stage1.fit, VectorQuantizer._place
def log(self, values, step=None, **more):
    logged.append([step, values])
def placed(self, which, *more):
    restarts.append(int(which.sum()))
    return place(self, which, *more)
def fitted(task, train, accelerator, folder, **more):
    logged.clear(); restarts.clear()
    figures = fit(task, train, accelerator, folder, **more)
    network, rank = next(iter(task.objective.networks.values())), accelerator.process_index
    torch.save(network.state_dict(), f"{more['label']}-{rank}-of-{accelerator.num_processes}.pt")
    if rank == 0:
        with open(f"{more['label']}-of-{accelerator.num_processes}.json", "w") as file:
            json.dump({"logged": logged, "restarts": restarts}, file)
    return figures
Accelerator.log, VectorQuantizer._place, stage1.fit, stage2.fit = log, placed, fitted, fitted
"""


PROCESSES = (1, 2, 4)


def settings(folder: Path, **changes: object) -> list[str]:
    path = folder / "tiny.yaml"
    path.write_text(
        yaml.safe_dump({**TINY, "output_dir": str(folder / "runs"), "precision": "fp32", **changes})
    )
    return ["--config", str(path)]


def worker_environment() -> dict[str, str]:
    """Environment of processes that run this checkout, one thread each, on the CPU."""
    own = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return {**os.environ, **own}


def torchrun(processes: int) -> list[str]:
    """The command that starts so many processes on this machine; a script and its arguments follow
    "--"."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc_per_node", str(processes)]


def launch(
    folder: Path,
    processes: int,
    *arguments: str,
    script: str = CHECK,
    seconds: float = 300,
    **environment: str,
) -> str:
    """Runs a command, or a script that is told the number of processes; returns what it printed.

    Raises:
        subprocess.TimeoutExpired: it took longer than `seconds`; every process of it is ended.
    """
    path = folder / f"check-{processes}.py"
    path.write_text(script)
    given = {**worker_environment(), **environment}
    # After "--", or torchrun takes `--num-images` for one of its own options.
    command = [*torchrun(processes), "--", str(path), str(processes), *arguments]
    with subprocess.Popen(
        command, env=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder
    ) as started:
        try:
            out, errors = started.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            started.terminate()  # torchrun ends its processes, which a kill would leave behind
            started.communicate(timeout=60)
            raise
    assert started.returncode == 0, out + errors
    return out
