"""Compares what two commits compute: weights, moments, EMA, codes and sampled codes.

    python -m benchmarks.same_numbers OLD NEW

Each commit is checked out into a folder of its own and trains both stages with this Python. The
cases are shapes and a folder of images, one process and two, 20 steps per stage, Muon and AdamW,
with a discriminator. Tensors are compared bit for bit by their contents, so files and keys may have
other names. The exit status is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
STEPS = 20
RENAMED = {
    "eval_every": "evaluate_every",
    "save_every": "checkpoint_every",
    "dead_code_threshold": "restart_below",
    "dead_code_check_every": "restart_every",
    "val_fraction": "held_out",
    "max_val_images": "held_out",
    "max_images": "pictures",
    "max_length": "length",
    "downsample_factor": "factor",
    "discriminator": "adversary",
}
"""Settings that commits before 0.1.0 know by another name: name now -> name then."""
SECTIONS = ("shapes",)
"""Sections whose settings lie one level higher in commits that have no such section."""

# Run in a checkout, with its own code: hashes of what a run folder holds.
HASHES = """
import hashlib, json, sys
from pathlib import Path
import pyarrow, pyarrow.ipc
from safetensors.numpy import load_file
from pipeline import TextToImagePipeline
run, found = Path(sys.argv[1]), {}
def digest(tensor):
    kind = f"{tensor.dtype}{tensor.shape}".encode()
    return hashlib.sha256(kind + tensor.tobytes()).hexdigest()[:16]
def tensors(files):
    return sorted(digest(tensor) for file in files for tensor in load_file(file).values())
for stage in ("tokenizer", "prior"):
    found[stage] = tensors([run / stage / "model.safetensors"])
    checkpoint = run / stage / "checkpoints" / "step-20"
    found[stage + " checkpoint"] = tensors(sorted(checkpoint.glob("*.safetensors")))
codes = hashlib.sha256()
for file in sorted((run / "codes").rglob("*.arrow")):
    with pyarrow.memory_map(str(file)) as source:
        try:
            table = pyarrow.ipc.open_stream(source).read_all()
        except pyarrow.ArrowInvalid:
            table = pyarrow.ipc.open_file(source).read_all()
        codes.update(json.dumps([str(row) for row in table.column("codes").to_pylist()]).encode())
found["codes"] = codes.hexdigest()[:16]
pipe = TextToImagePipeline.from_pretrained(run / "bundle")
prompts = ["a red circle", "a blue square on white"]
how = {"guidance_scale": 2.0, "top_p": 0.9, "temperature": 0.9}
out = pipe(prompts, num_images_per_prompt=3, seed=1, **how)
found["sampled"] = out.codes.flatten().tolist()
found["log-likelihood"] = [float(value).hex() for value in out.log_likelihood]
print("HASHES " + json.dumps(found))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description="Whether two commits compute the same.")
    parser.add_argument("old")
    parser.add_argument("new")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _images(folder / "images")
        found = {
            name: _of_commit(getattr(options, name), folder / name, folder / "images")
            for name in ("old", "new")
        }
    same = True
    for case, old in found["old"].items():
        for what, value in old.items():
            equal = value == found["new"][case][what]
            same &= equal
            print(f"{case}: {what} {'same' if equal else 'DIFFERS'}")
    print("every number is the same" if same else "not every number is the same")
    return 0 if same else 1


def _images(folder: Path) -> None:
    """Sixty small images with captions beside them."""
    folder.mkdir()
    for i in range(60):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(np.repeat(np.repeat(pixels[::8, ::8], 8, 0), 8, 1)).save(
            folder / f"{i}.png"
        )
        (folder / f"{i}.txt").write_text(f"picture {i % 7} of {i % 5}\n")


def _of_commit(commit: str, folder: Path, images: Path) -> dict[str, dict[str, Any]]:
    """Every case's hashes."""
    code = folder / "code"
    subprocess.run(
        ["git", "worktree", "add", "--quiet", "--detach", str(code), commit], cwd=ROOT, check=True
    )
    try:
        return {
            f"{source}, {processes} process{'es' if processes > 1 else ''}": _case(
                code, folder, source, images, processes
            )
            for source in ("shapes", "folder")
            for processes in (1, 2)
        }
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(code)], cwd=ROOT, check=True)


def _case(code: Path, folder: Path, source: str, images: Path, processes: int) -> dict[str, Any]:
    run = folder / f"{source}-{processes}"
    file = folder / "experiment.yaml"
    values = _experiment(source, images)
    file.write_text(
        yaml.safe_dump({**_as_known(values, _settings_of(code)), "output_dir": str(run)})
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(code),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    start = [
        sys.executable,
        *(several if processes > 1 else []),
        "-m",
        *(["--"] if processes > 1 else []),
        "pipeline.cli",
    ]
    _checked([*start, "run", "--config", str(file)], code, environment)
    out = _checked([sys.executable, "-c", HASHES, str(run / "same")], code, environment)
    return json.loads(
        next(line for line in out.splitlines() if line.startswith("HASHES ")).removeprefix(
            "HASHES "
        )
    )


def _checked(command: list[str], code: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        command, cwd=code, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(
            f"{' '.join(command)} ended with status "
            f"{done.returncode}:\n{done.stdout}\n{done.stderr}"
        )
    return done.stdout


def _experiment(source: str, images: Path) -> dict[str, Any]:
    """In the words of today."""
    train = {
        "steps": STEPS,
        "batch_size": 8,
        "log_every": 5,
        "eval_every": 10,
        "save_every": 10,
        "warmup_steps": 2,
    }
    data = (
        {"source": "shapes", "shapes": {"max_objects": 1}}
        if source == "shapes"
        else {"source": str(images), "val_fraction": 0.2, "flip": True}
    )
    return {
        "name": "same",
        "trackers": [],
        "precision": "fp32",
        "data": {"image_size": 32, **data},
        "tokenizer": {
            "model": {
                "num_codes": 32,
                "downsample_factor": 8,
                "width": 32,
                "encoder_depth": 1,
                "decoder_depth": 1,
                "code_dim": 4,
                "vq": {"dead_code_threshold": 0.5, "dead_code_check_every": 3},
            },
            "objective": {"discriminator": {"weight": 1, "width": 16, "lecam": 0.1, "start": 6}},
            "train": {**train, "optimizer": "muon"},
        },
        "encode": {
            "max_val_images": 10,
            "batch_size": 16,
            **({"max_images": 80} if source == "shapes" else {}),
        },
        "text": {"vocab_size": 320, "max_length": 48},
        "prior": {"model": {"width": 32, "depth": 2, "heads": 2, "dropout": 0.1}, "train": train},
    }


def _settings_of(code: Path) -> str:
    """The sources that hold a checkout's settings."""
    folders = (
        code / "stage1_tokenizer",
        code / "stage2_prior",
        code / "pipeline",
        code / "pipeline" / "config",
    )
    return "\n".join(file.read_text() for folder in folders for file in sorted(folder.glob("*.py")))


def _as_known(values: Any, sources: str) -> Any:
    """The settings in the words of a checkout: a name of today that is no field there has its
    former one, and what is in a section that is none there is one level higher."""
    if not isinstance(values, dict):
        return values
    found: dict[str, Any] = {}
    for name, value in values.items():
        known = re.search(rf"^    {name}: ", sources, re.MULTILINE)
        inner = _as_known(value, sources)
        if name in SECTIONS and not known:
            found |= inner
        else:
            found[name if known else RENAMED.get(name, name)] = inner
    return found


if __name__ == "__main__":
    sys.exit(main())
