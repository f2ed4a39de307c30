"""Writes and reads checkpoints, whole or not at all. Knows tensors, JSON and folders; knows no
stage.

A checkpoint is `step-N/` with `weights.safetensors` (networks), `ema.safetensors`,
`optimizer.safetensors`, `state.json` and, written last, `manifest.json`: the size and hash of each
of the others. It is written to a temporary name, synced and renamed, so a kill leaves a whole one
or none. Later damage (a truncated copy, a bad disk) is found when it is read.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.runtime.atomic_io import atomic_write_dir, sha256_of
from stage1_tokenizer.file_checks import UnsafeFile, check_file, read_json_object

FORMAT = 1
"""Of run folders and checkpoints."""
_MANIFEST = "manifest.json"
_FILES = ("weights.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json")


class UnsupportedFormat(ValueError):
    """The format of another version of this program, which this one does not read."""


class CorruptedCheckpoint(ValueError):
    """A checkpoint's files are not those that were written; the text says how they differ."""


@dataclass(frozen=True)
class CheckpointState:
    """The tensors of a checkpoint, unsharded."""

    networks: Mapping[str, Mapping[str, Tensor]]
    """State dict of each network, by group."""
    optimizers: Mapping[str, Mapping[int, Mapping[str, Tensor]]]
    """Moments by optimizer, number of the parameter and name."""
    ema: Sequence[Tensor]


@dataclass
class State:
    """What a checkpoint holds besides tensors."""

    step: int
    """Steps done, which is the number of the next one."""
    best: dict[str, float] = field(default_factory=dict)
    """Held-out metrics of the best weights so far."""
    skipped: int = 0
    """Steps that were skipped because they were not finite."""
    threads: int = 0
    """CPU threads of torch at the last step; 0 where it is not known."""


def check_format(found: object, where: Path) -> None:
    """Raises UnsupportedFormat for one that this version does not read."""
    if found != FORMAT:
        age = "a newer" if isinstance(found, int) and found > FORMAT else "an older"
        raise UnsupportedFormat(
            f"{where} is of format {found}, which {age} version of this program wrote, and this "
            f"one reads {FORMAT}; continue with the version that wrote it, or choose another name "
            "for this run"
        )


def list_checkpoints(folder: Path) -> list[Path]:
    """Every `step-N` in a folder, corrupted or not, the newest first."""
    found = [
        p for p in folder.glob("step-*") if p.name.removeprefix("step-").isdigit() and p.is_dir()
    ]
    return sorted(found, key=_step, reverse=True)


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the highest step, if any; not verified, but for its state's presence."""
    return next((p for p in list_checkpoints(folder) if (p / "state.json").is_file()), None)


def save_checkpoint(
    folder: Path,
    state: State,
    saved: CheckpointState,
    *,
    keep: int,
    verified: Collection[Path] = (),
) -> set[Path]:
    """Writes `folder`/step-N and then removes all but the newest `keep` whole checkpoints; returns
    those that are left.

    Args:
        verified: checkpoints known to be whole, which are not read again.

    Raises:
        OSError: the disk is full or the folder cannot be written; earlier checkpoints are
            untouched.
    """

    def write(beside: Path) -> None:
        weights = {
            f"{group}.{name}": tensor
            for group, network in saved.networks.items()
            for name, tensor in network.items()
        }
        _save(weights, beside / "weights.safetensors")
        _save({f"{i:05d}": t for i, t in enumerate(saved.ema)}, beside / "ema.safetensors")
        moments = {
            f"{group}.{index}.{name}": torch.as_tensor(value)
            for group, states in saved.optimizers.items()
            for index, moment in states.items()
            for name, value in moment.items()
        }
        _save(moments, beside / "optimizer.safetensors")
        values = {
            "format": FORMAT,
            "step": state.step,
            "best": state.best,
            "skipped": state.skipped,
            "threads": state.threads,
            "optimizers": sorted(saved.optimizers),
        }
        (beside / "state.json").write_text(json.dumps(values) + "\n")
        files = {
            name: {"bytes": (beside / name).stat().st_size, "sha256": sha256_of(beside / name)}
            for name in _FILES
        }
        (beside / _MANIFEST).write_text(
            json.dumps({"format": FORMAT, "step": state.step, "files": files}, indent=2) + "\n"
        )

    target = folder / f"step-{state.step}"
    atomic_write_dir(target, write)
    for later in list_checkpoints(folder):
        if _step(later) > state.step:  # corrupted, or training would have resumed from it
            shutil.rmtree(later)
    return prune_checkpoints(folder, target, keep, verified)


def prune_checkpoints(
    folder: Path, newest: Path, keep: int, verified: Collection[Path]
) -> set[Path]:
    """Removes what is older than the whole checkpoint `newest`, but for the newest `keep` - 1 whole
    ones; corrupted ones do not count. Those in `verified` are not read. Returns those that are
    left."""
    kept = {newest}
    for path in list_checkpoints(folder):
        if _step(path) >= _step(newest):
            continue
        if len(kept) < keep and (path in verified or verify_checkpoint(path) is None):
            kept.add(path)
        else:
            shutil.rmtree(path)
    return kept


def verify_checkpoint(path: Path) -> str | None:
    """How a checkpoint's files differ from those of its manifest; None where they do not.

    Raises:
        UnsupportedFormat: it is of a format that this version does not read.
    """
    try:
        manifest = read_json_object(path / _MANIFEST)
        check_format(manifest["format"], path)
        step = manifest["step"]
        files = {name: (file["bytes"], file["sha256"]) for name, file in manifest["files"].items()}
        if unknown := set(files) - set(_FILES):
            raise ValueError(f"it names the files {sorted(unknown)[:3]}")
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except UnsupportedFormat:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{_MANIFEST} cannot be read: {error}"
    if step != _step(path):
        return f"{_MANIFEST} is of step {step}"
    for name, (size, digest) in files.items():
        try:
            check_file(path / name)
            if (now := (path / name).stat().st_size) != size:
                return f"{name} has {now:,} of {size:,} bytes"
            if sha256_of(path / name) != digest:
                return f"{name} is not what was written (its hash differs)"
        except FileNotFoundError:
            return f"{name} is missing"
        except (OSError, UnsafeFile) as error:
            return f"{name} cannot be read: {error}"
    return None


def load_newest(
    folder: Path,
    networks: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    ema: Sequence[Tensor],
    warn: Callable[[str], None],
) -> tuple[Path, State] | None:
    """`load_checkpoint` of the newest whole one, or None if there is no checkpoint. Each corrupted
    one that it skips is reported by `warn`.

    Raises:
        ValueError: there are checkpoints and all are corrupted; or as `load_checkpoint` does.
    """
    damaged: dict[Path, str] = {}
    for path in list_checkpoints(folder):
        try:
            state = load_checkpoint(path, networks, optimizers, ema)
        except CorruptedCheckpoint as error:
            damaged[path] = str(error)
            continue
        for bad, why in damaged.items():
            warn(f"{bad} is corrupted ({why}); resuming from {path.name}, the one before")
        return path, state
    if damaged:
        every = ", ".join(f"{path.name} ({why})" for path, why in damaged.items())
        raise ValueError(
            f"every checkpoint in {folder} is corrupted: {every}; put one back from a copy, or "
            f"move {folder} away to start over"
        )
    return None


def load_checkpoint(
    path: Path,
    networks: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    ema: Sequence[Tensor],
) -> State:
    """Fills networks, optimizers and EMA weights in place, after verifying every file.

    Raises:
        CorruptedCheckpoint: a file is missing, truncated or changed.
        ValueError: the checkpoint belongs to another configuration, or is of a format that this
            version does not read.
    """
    if problem := verify_checkpoint(path):
        raise CorruptedCheckpoint(problem)
    try:
        values = read_json_object(path / "state.json")
        state = State(
            int(values["step"]),
            dict(values["best"]),
            int(values["skipped"]),
            int(values.get("threads", 0)),
        )
        saved_optimizers = values["optimizers"]
        weights = load_file(path / "weights.safetensors")
        averages = load_file(path / "ema.safetensors")
        moments = load_file(path / "optimizer.safetensors")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        # Files that the manifest does not name.
        raise CorruptedCheckpoint(str(error)) from error
    for group, network in networks.items():
        _load_network(network, _of_group(weights, group), path)
    with torch.no_grad():
        for i, tensor in enumerate(ema):
            tensor.copy_(averages[f"{i:05d}"])
    # By name: an optimizer before its first step, as a discriminator's before its start, has no
    # moments.
    if optimizers and saved_optimizers != sorted(optimizers):
        raise ValueError(
            f"the checkpoint {path} was made with the optimizers {saved_optimizers} and this run "
            f"has {sorted(optimizers)}; "
            "choose another name for this run, or train.optimizer as it was"
        )
    for group, optimizer in optimizers.items():
        _load_optimizer(optimizer, _of_group(moments, group))
    return state


def _of_group(tensors: Mapping[str, Tensor], group: str) -> dict[str, Tensor]:
    prefix = f"{group}."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _load_network(network: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    expected = network.state_dict()
    if differ := sorted(set(weights) ^ set(expected)) or [
        k for k in weights if weights[k].shape != expected[k].shape
    ]:
        raise ValueError(
            f"the checkpoint {path} is of another configuration (first keys that differ: "
            f"{differ[:3]}); "
            "choose another name for this run, or move its folder away"
        )
    network.load_state_dict(weights)


def _load_optimizer(optimizer: torch.optim.Optimizer, moments: Mapping[str, Tensor]) -> None:
    """Moments by INDEX.NAME, the parameter's number and the moment's name."""
    parameters = [p for options in optimizer.param_groups for p in options["params"]]
    states: dict[int, dict[str, Tensor]] = {}
    for key, value in moments.items():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        if value.shape == parameter.shape:
            # Fused AdamW walks raw memory: moments must have the strides of their (channels-last)
            # parameter.
            value = torch.empty_like(parameter).copy_(value)
        elif value.ndim:  # AdamW would read past its end
            raise ValueError(
                f"the checkpoint has the moment {key} of shape {tuple(value.shape)} for a "
                f"parameter of {tuple(parameter.shape)}; use FSDP or leave it out, as the process "
                "that wrote it did"
            )
        states.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": states})


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    # Contiguous copies: safetensors refuses shared memory and keeps no strides, and channels-last
    # weights have their own.
    save_file(
        {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path
    )


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
