"""Writes and reads checkpoints, whole or not at all. Knows tensors, JSON and folders; knows no stage.

A checkpoint is `step-N/` with `weights.safetensors` (networks), `average.safetensors`, `optimizer.safetensors` and `state.json`.
It is written beside and renamed, so a folder of that name is always whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def newest_checkpoint(folder: Path) -> Path | None:
    """The whole checkpoint with the highest step, if any."""
    found = [p for p in folder.glob("step-*") if p.name.removeprefix("step-").isdigit() and (p / "state.json").is_file()]
    return max(found, key=lambda p: int(p.name.removeprefix("step-")), default=None)


def write_folder(target: Path, write: Any) -> None:
    """Calls `write(folder)` on a folder beside `target`, syncs what it wrote and renames it to `target`.

    A failure on the way (a full disk, a kill) leaves what `target` held before.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        with disk_errors():
            write(beside)
        for path in beside.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    if target.exists():
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        beside.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        beside.rename(target)


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Gives a file beside `path` to write, which is synced and renamed to it afterwards; a failure leaves what `path` held before."""
    beside = path.with_name(f".{path.name}.writing")
    try:
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    beside.rename(path)


def write_file(path: Path, text: str) -> None:
    """Writes a text file beside, syncs and renames it."""
    with written_beside(path) as beside:
        beside.write_text(text)


def refuse_taken(out: Path, marker: str, what: str) -> None:
    """Raises FileExistsError where `out` is there and holds no file `marker`, so that it is not `what` and not ours to replace."""
    if out.exists() and not (out / marker).is_file():
        raise FileExistsError(f"{out} is there already and holds no {what}; choose another folder")


@contextmanager
def disk_errors() -> Iterator[None]:
    """Raises safetensors' own error for a full disk as the OSError that it is."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"cannot write the weights: {error}; free some space, then run the same command again") from error


def save_checkpoint(
    folder: Path,
    step: int,
    best: Mapping[str, float],
    networks: Mapping[str, nn.Module],
    optimizers: Mapping[str, Any],
    average: Sequence[Tensor],
    *,
    keep: int,
) -> Path:
    """Writes `folder`/step-N and then removes all but the newest `keep` checkpoints.

    Raises:
        OSError: the disk is full or the folder cannot be written; earlier checkpoints are untouched.
    """

    def write(beside: Path) -> None:
        weights = {f"{g}.{k}": v.detach() for g, net in networks.items() for k, v in net.state_dict().items()}
        _save(weights, beside / "weights.safetensors")
        _save({f"{i:05d}": t for i, t in enumerate(average)}, beside / "average.safetensors")
        moments = {
            f"{group}.{index}.{name}": torch.as_tensor(value)
            for group, optimizer in optimizers.items()
            for index, state in optimizer.state_dict()["state"].items()
            for name, value in state.items()
        }
        _save(moments, beside / "optimizer.safetensors")
        (beside / "state.json").write_text(json.dumps({"step": step, "best": dict(best), "optimizers": sorted(optimizers)}) + "\n")

    target = folder / f"step-{step}"
    write_folder(target, write)
    others = sorted(
        (p for p in folder.glob("step-*") if p != target and p.name.removeprefix("step-").isdigit()),
        key=lambda p: int(p.name.removeprefix("step-")),
    )
    for old in others[: max(len(others) - (keep - 1), 0)]:
        shutil.rmtree(old)
    return target


def load_checkpoint(
    path: Path, networks: Mapping[str, nn.Module], optimizers: Mapping[str, Any], average: Sequence[Tensor]
) -> tuple[int, dict[str, float]]:
    """Fills networks, optimizers and averages in place; returns the step to go on from and the best figures so far.

    Raises:
        ValueError: the checkpoint belongs to another configuration, or a file of it is cut.
    """
    try:
        state = json.loads((path / "state.json").read_text())
        weights = load_file(path / "weights.safetensors")
        averages = load_file(path / "average.safetensors")
        moments = load_file(path / "optimizer.safetensors")
    except Exception as error:  # safetensors raises its own type for a cut file
        raise ValueError(f"the checkpoint {path} cannot be read ({error}); remove that folder to go on from the one before") from error
    for group, network in networks.items():
        own = {k.removeprefix(f"{group}."): v for k, v in weights.items() if k.startswith(f"{group}.")}
        expected = network.state_dict()
        if differ := sorted(set(own) ^ set(expected)) or [k for k in own if own[k].shape != expected[k].shape]:
            raise ValueError(
                f"the checkpoint {path} is of another configuration (first keys that differ: {differ[:3]}); "
                "choose another name for this run, or remove the run folder"
            )
        network.load_state_dict(own)
    with torch.no_grad():
        for i, tensor in enumerate(average):
            tensor.copy_(averages[f"{i:05d}"])
    # By name: an optimizer that has not stepped yet, as an adversary's before its start, has no moments.
    if optimizers and state["optimizers"] != sorted(optimizers):
        raise ValueError(
            f"the checkpoint {path} was made with the optimizers {state['optimizers']} and this run has {sorted(optimizers)}; "
            "choose another name for this run, or train.optimizer as it was"
        )
    for group, optimizer in optimizers.items():
        merged = optimizer.state_dict()
        merged["state"] = {}
        parameters = [p for options in optimizer.param_groups for p in options["params"]]
        for key, value in moments.items():
            owner, index, name = key.split(".", 2)
            if owner == group:
                parameter = parameters[int(index)]
                if value.shape == parameter.shape:
                    # Fused AdamW walks raw memory: moments must have the strides of their (channels-last) parameter.
                    value = torch.empty_like(parameter).copy_(value)
                merged["state"].setdefault(int(index), {})[name] = value
        optimizer.load_state_dict(merged)
    return int(state["step"]), state["best"]


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    # Contiguous copies: safetensors refuses shared memory and keeps no strides, and channels-last weights have their own.
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)
