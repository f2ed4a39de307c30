"""Kills trainings at random places, resumes them, and compares the files that they end with.

    python -m benchmarks.kills --kills 20

The kill is SIGKILL: when a random step is reached, before a random one of the training's file
operations (checkpoints are written, synced, renamed and removed by them), or after a random time,
which may be in the middle of a write. Both stages have everything with a state of its own: Muon,
weight EMA and `save_best`; the tokenizer a discriminator, the prior dropout. With `--streaming` the
images come from shards that are read from beginning to end, so that a resumed run must find its
position in them. Each attempt is a fork of this process, which has imported the libraries and
trained nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline import cli
from pipeline.config.data import DataConfig
from pipeline.config.load import from_dict
from pipeline.data.load import load_source
from pipeline.stages import run as stages  # imported once, for all forks
from pipeline.training.prefetch import BatchPrefetcher

_TRAIN = {
    "steps": 20,
    "batch_size": 8,
    "log_every": 2,
    "eval_every": 5,
    "save_every": 4,
    "warmup_steps": 2,
}
EXPERIMENT: dict[str, Any] = {
    "name": "run",
    "trackers": [],
    "data": {"source": "shapes", "image_size": 32, "shapes": {"max_objects": 1}},
    "tokenizer": {
        "model": {
            "num_codes": 16,
            "downsample_factor": 8,
            "width": 32,
            "encoder_depth": 1,
            "decoder_depth": 1,
            "code_dim": 4,
        },
        "objective": {"discriminator": {"weight": 1, "width": 16, "lecam": 0.1, "start": 3}},
        "train": {**_TRAIN, "optimizer": "muon", "save_best": True},
    },
    "encode": {"max_images": 40, "max_val_images": 10, "batch_size": 16},
    "text": {"vocab_size": 320, "max_length": 48},
    "prior": {
        "model": {"width": 32, "depth": 1, "heads": 2, "dropout": 0.2},
        "train": {**_TRAIN, "optimizer": "muon", "save_best": True},
    },
}
_SHARDS = 5
_SAMPLES = 30
STAGES = {"tokenizer": "train-tokenizer", "prior": "train-prior"}
KINDS = ("step", "file", "time")
_FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


class Progress:
    """What a fork says of itself, in memory that is shared with it: its first and its last step, -1
    before one, and its file operations."""

    _FORM = "qqq"

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, struct.calcsize(self._FORM))
        self.write(-1, -1, 0)

    def write(self, *values: int) -> None:
        self._memory[:] = struct.pack(self._FORM, *values)

    def read(self) -> tuple[int, int, int]:
        return struct.unpack(self._FORM, self._memory[:])


@dataclass
class Kill:
    """Where a fork is killed: before step `at`, before file operation `at`, or after `at`
    milliseconds."""

    kind: str
    at: int


@dataclass
class Attempt:
    """What became of a fork."""

    killed: bool
    status: int
    first: int
    last: int
    operations: int
    seconds: float


def attempt(arguments: Sequence[str], folder: Path, log: Path, kill: Kill | None) -> Attempt:
    """Runs a command in a fork, which `kill` may end."""
    progress = Progress()
    start = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        _watch(folder, progress, kill)
        status = 70
        try:
            status = cli.main(arguments)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    if kill is not None and kill.kind == "time":
        time.sleep(kill.at / 1000)
        os.kill(pid, signal.SIGKILL)  # one that ended by itself is still there to be waited for
    _, ended = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(ended)
    return Attempt(code == -signal.SIGKILL, code, *progress.read(), time.perf_counter() - start)


def _watch(folder: Path, progress: Progress, kill: Kill | None) -> None:
    take = BatchPrefetcher.get

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def seen_step(batches: BatchPrefetcher, step: int) -> Any:
        first, _, operations = progress.read()
        progress.write(step if first < 0 else first, step, operations)
        if kill is not None and kill.kind == "step" and step == kill.at:
            die()
        return take(batches, step)

    def seen_file(event: str, given: tuple[Any, ...]) -> None:
        if event in _FILE_EVENTS and given and str(folder) in str(given[0]):
            first, last, operations = progress.read()
            progress.write(first, last, operations + 1)
            if kill is not None and kill.kind == "file" and operations == kill.at:
                die()

    BatchPrefetcher.get = seen_step
    sys.addaudithook(seen_file)


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file that a run keeps, by its path; images and logs aside, what was found out
    about the data, and what says where the run lies."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.relative_to(folder).parts[0] not in ("logs", "samples", "data", "experiment.yaml")
    }


def write_shards(folder: Path) -> dict[str, Any]:
    """Writes images of shapes as shards; the `data` section that streams them, with more passes
    over them than one."""
    source = load_source(from_dict(DataConfig, EXPERIMENT["data"]), "train")
    folder.mkdir()
    for shard in range(_SHARDS):
        rows = range(shard * _SAMPLES, (shard + 1) * _SAMPLES)
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for row, image, caption in zip(
                rows, source.images(rows), source.captions(rows), strict=True
            ):
                file = io.BytesIO()
                Image.fromarray(image).save(file, "PNG")
                for extension, content in (("png", file.getvalue()), ("txt", caption.encode())):
                    entry = tarfile.TarInfo(f"{row:06d}.{extension}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return {
        "source": str(folder / "*.tar"),
        "image_size": 32,
        "streaming": True,
        "stream": {"shuffle_buffer": 16, "shards_per_worker": 2},
        "val_fraction": 0.1,
    }


@dataclass
class Outcome:
    """Of all trials of a stage."""

    kills: int = 0
    runs: int = 0
    identical: int = 0
    beyond: int = 0
    """Most steps that a kill cost beyond the checkpoint interval."""
    damaged: int = 0
    """Times that a checkpoint was found corrupted."""


def trials(
    stage: str, base: Path, kinds: Sequence[str], kills: int, kills_a_run: int, seed: int, log: Path
) -> Outcome:
    """Kills `kills` trainings of a stage on top of the run folder `base`, which holds the stages
    before it."""
    outcome = Outcome()
    chance = random.Random(f"{stage} {seed}")
    work = base.parent.parent / stage
    settings = ["--config", str(base.parent.parent / "experiment.yaml")]
    interval = EXPERIMENT[stage]["train"]["save_every"]

    def fresh(name: str) -> tuple[list[str], Path]:
        shutil.copytree(base, work / name / base.name)
        return [STAGES[stage], *settings, "--output_dir", str(work / name)], work / name / base.name

    arguments, folder = fresh("whole")
    whole = attempt(arguments, folder, log, None)
    if whole.status:
        raise SystemExit(
            f"the uninterrupted {stage} failed with status "
            f"{whole.status}:\n{log.read_text()[-2000:]}"
        )
    expected = contents(folder)
    while outcome.kills < kills:
        arguments, folder = fresh(f"killed-{outcome.runs}")
        reached = -1
        for left in range(kills_a_run, -1, -1):
            kind = chance.choice(kinds)
            limit = {
                "step": whole.last + 1,
                "file": whole.operations,
                "time": int(1000 * whole.seconds),
            }[kind]
            one = attempt(
                arguments, folder, log, Kill(kind, chance.randrange(limit)) if left else None
            )
            if reached >= 0 and one.first >= 0:
                outcome.beyond = max(outcome.beyond, reached + 1 - one.first - interval)
            reached = one.last if one.last >= 0 else reached
            outcome.kills += one.killed
            if not one.killed and one.status:
                raise SystemExit(
                    f"{stage} failed with status {one.status} after a kill; see "
                    f"{log}:\n{log.read_text()[-2000:]}"
                )
        outcome.runs += 1
        outcome.identical += contents(folder) == expected
        shutil.rmtree(work / f"killed-{outcome.runs - 1}")
    outcome.damaged = log.read_text().count(" is corrupted (")
    return outcome


def main() -> int:
    reader = argparse.ArgumentParser(
        prog="python -m benchmarks.kills", description=__doc__.splitlines()[0]
    )
    reader.add_argument("--kills", type=int, default=20, help="kills of each stage (20)")
    reader.add_argument(
        "--kills_a_run", type=int, default=1, help="kills before a run is left to end (1)"
    )
    reader.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    reader.add_argument(
        "--kinds",
        nargs="+",
        choices=KINDS,
        default=KINDS,
        help="how the place of a kill is chosen (all)",
    )
    reader.add_argument("--seed", type=int, default=0)
    reader.add_argument(
        "--steps",
        type=int,
        default=_TRAIN["steps"],
        help=f"steps of either stage ({_TRAIN['steps']})",
    )
    reader.add_argument(
        "--streaming",
        action="store_true",
        help="images from shards that are read from beginning to end",
    )
    options = reader.parse_args()
    start = time.perf_counter()
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        log = Path(scratch) / "log"
        for stage in STAGES:
            EXPERIMENT[stage]["train"]["steps"] = options.steps
        if options.streaming:
            import datasets  # for all forks

            assert datasets
            EXPERIMENT["data"] = write_shards(folder / "shards")
        (folder / "experiment.yaml").write_text(json.dumps(EXPERIMENT))  # JSON is YAML
        base = folder / "base" / EXPERIMENT["name"]
        base.mkdir(parents=True)
        print(
            "| stage | kills | runs | identical ends | most steps lost beyond the checkpoint "
            "interval | corrupted checkpoints |\n|" + "---|" * 6
        )
        for stage in STAGES:
            if stage in options.stages:
                o = trials(
                    stage,
                    base,
                    options.kinds,
                    options.kills,
                    options.kills_a_run,
                    options.seed,
                    log,
                )
                print(
                    f"| {stage} | {o.kills} | {o.runs} | {o.identical} | {o.beyond} | {o.damaged} "
                    "|",
                    flush=True,
                )
                failed |= o.identical != o.runs or o.beyond > 0
            if stage == "tokenizer" and "prior" in options.stages:
                for command in ("train-tokenizer", "encode"):
                    made = attempt(
                        [
                            command,
                            "--config",
                            str(folder / "experiment.yaml"),
                            "--output_dir",
                            str(base.parent),
                        ],
                        base,
                        log,
                        None,
                    )
                    if made.status:
                        raise SystemExit(log.read_text()[-2000:])
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes")
    return int(failed)


if __name__ == "__main__":
    assert stages  # imported for the forks
    sys.exit(main())
