"""Kills commands at random places, runs them again, and compares the files that they end with.

    python -m benchmarks.kills --kills 20 [--stages tokenizer prior] [--commands generate ...]

Both trainings have up to 20 kills each, and so has each other command (encode, generate, edit,
reconstruct, evaluate, compare, doctor, finetune). `--kills 20` takes minutes on an idle machine.
After each kill of a command, every file under a final name is opened: none may be torn. Times that
are measured are no part of the comparison.

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
import random
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from safetensors.torch import load_file

from benchmarks.killing import Kill, attempt
from pipeline.config.data import DataConfig
from pipeline.config.load import from_dict
from pipeline.data.load import load_source
from pipeline.stages import run as stages  # imported once, for all forks

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
        # In random order, as `edit` needs.
        "train": {**_TRAIN, "optimizer": "muon", "save_best": True, "code_order": "random"},
    },
}
_SHARDS = 5
_SAMPLES = 30
STAGES = {"tokenizer": "train-tokenizer", "prior": "train-prior"}
KINDS = ("step", "file", "time")


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


def commands(base: Path, out: Path, config: Path) -> dict[str, list[str]]:
    """Arguments of each command that is killed besides trainings.

    Args:
        base: a finished run.
        out: where the command is to write; `encode` and `compare` are given a run folder there.
        config: the experiment of the run.
    """
    bundle = ["--bundle", str(base / "bundle")]
    image = str(config.parent / "image.png")
    run = ["--config", str(config), "--output_dir", str(out)]
    tuned = [f"--{stage}.init_from={base / 'bundle'}" for stage in ("tokenizer", "prior")]
    return {
        "encode": ["encode", *run],
        "generate": ["generate", *bundle, "--num-images", "8", "--out", str(out), "red", "blue"],
        "edit": ["edit", *bundle, "--image", image, "--strength", "0.5", "--out", str(out)],
        "reconstruct": [
            *("reconstruct", "--tokenizer", str(base / "tokenizer"), "--out", str(out)),
            *[image] * 8,
        ],
        "evaluate": [
            *("evaluate", "--config", str(config), *bundle, "--max-images", "10"),
            *("--out", str(out / "evaluation.json")),
        ],
        "compare": [
            *("compare-tokenizers", "--config", str(config.with_name("compare.yaml"))),
            *("--output_dir", str(out)),
        ],
        "doctor": ["doctor", "shapes", "--max-images", "30", "--out", str(out / "doctor")],
        "finetune": ["run", *run, "--name", "tuned", "--tokenizer.frozen", "true", *tuned],
    }


COMMANDS = (
    *("encode", "generate", "edit", "reconstruct", "evaluate", "compare", "doctor", "finetune"),
)


def results(folder: Path) -> dict[str, str]:
    """Hash of every file by its path, without logs, measured times and hidden files."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(
            part.startswith(".") or part in ("logs", "data", "training.json")
            for part in path.relative_to(folder).parts
        )
        and "times" not in path.name
    }


def torn(folder: Path) -> list[str]:
    """Files under final names that cannot be read. Temporary names begin with a dot."""
    found = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or not path.is_file() or "logs" in path.parts:
            continue
        try:
            match path.suffix:
                case ".png":
                    with Image.open(path) as image:
                        image.load()
                case ".json":
                    json.loads(path.read_text())
                case ".jsonl":
                    [json.loads(line) for line in path.read_text().splitlines()]
                case ".yaml":
                    yaml.safe_load(path.read_text())
                case ".npy":
                    np.load(path)
                case ".safetensors":
                    load_file(path)
                case ".html":
                    assert path.read_text().rstrip().endswith("</html>")
            assert path.stat().st_size
        except Exception as error:
            found.append(f"{path}: {error!r}")
    return found


def command_trials(
    name: str, base: Path, config: Path, kinds: Sequence[str], kills: int, seed: int, log: Path
) -> tuple[int, int, int, list[str]]:
    """Kills, runs, runs that ended as an uninterrupted one, and torn files of a command."""
    chance = random.Random(f"{name} {seed}")
    out = config.parent / f"out-{name}"
    arguments = commands(base, out, config)[name]

    def fresh() -> None:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        if name == "encode":
            shutil.copytree(base / "tokenizer", out / EXPERIMENT["name"] / "tokenizer")

    fresh()
    whole = attempt(arguments, out, log, None)
    if whole.status:
        raise SystemExit(f"the uninterrupted {name} failed:\n{log.read_text()[-2000:]}")
    expected = results(out)
    killed = runs = identical = 0
    broken: list[str] = []
    while killed < kills and runs < 2 * kills:
        fresh()
        kind = chance.choice(kinds)
        limit = whole.operations if kind == "file" else int(1000 * whole.seconds)
        one = attempt(arguments, out, log, Kill(kind, chance.randrange(max(limit, 1))))
        killed += one.killed
        broken += torn(out)
        again = attempt(arguments, out, log, None)
        if again.status:
            raise SystemExit(f"{name} failed after a kill:\n{log.read_text()[-2000:]}")
        runs += 1
        found = results(out)
        identical += found == expected
        if found != expected:
            differ = sorted(k for k in expected | found if expected.get(k) != found.get(k))
            print(f"{name}, killed ({kind}): {', '.join(differ)} differ", file=sys.stderr)
    return killed, runs, identical, broken


def write_inputs(config: Path) -> None:
    """What commands read beside the run: an image, and a comparison."""
    source = load_source(from_dict(DataConfig, EXPERIMENT["data"]), "train")
    Image.fromarray(source.images([0])[0]).save(config.with_name("image.png"))
    variants = {"plain": {}, "small": {"tokenizer": {"model": {"num_codes": 8}}}}
    compared = {**EXPERIMENT, "variants": variants}
    config.with_name("compare.yaml").write_text(json.dumps(compared))


def kill_commands(
    names: Sequence[str], base: Path, config: Path, options: argparse.Namespace, log: Path
) -> bool:
    """Kills commands on top of a finished run, and prints a row of each; whether all held."""
    held = True
    write_inputs(config)
    made = attempt(
        ["run", "--config", str(config), "--output_dir", str(base.parent)], base, log, None
    )
    if made.status:
        raise SystemExit(log.read_text()[-2000:])
    kinds = [kind for kind in options.kinds if kind != "step"]
    for name in names:
        killed, runs, identical, broken = command_trials(
            name, base, config, kinds, options.kills, options.seed, log
        )
        print(f"| {name} | {killed} | {runs} | {identical} | torn: {len(broken)} | |", flush=True)
        for line in broken:
            print(line)
        held &= identical == runs and not broken
    return held


def main() -> int:
    reader = argparse.ArgumentParser(
        prog="python -m benchmarks.kills", description=__doc__.splitlines()[0]
    )
    reader.add_argument("--kills", type=int, default=20, help="kills of each stage (20)")
    reader.add_argument(
        "--kills_a_run", type=int, default=1, help="kills before a run is left to end (1)"
    )
    reader.add_argument("--stages", nargs="*", choices=STAGES, default=list(STAGES))
    reader.add_argument(
        "--kinds",
        nargs="+",
        choices=KINDS,
        default=KINDS,
        help="how the place of a kill is chosen (all)",
    )
    reader.add_argument(
        "--commands",
        nargs="*",
        choices=COMMANDS,
        default=list(COMMANDS),
        help="what is killed besides trainings (all)",
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
        if options.commands:
            config = folder / "experiment.yaml"
            failed |= not kill_commands(options.commands, base, config, options, log)
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes")
    return int(failed)


if __name__ == "__main__":
    assert stages  # imported for the forks
    sys.exit(main())
