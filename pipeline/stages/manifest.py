"""What a stage was made with: written before it starts, compared when it is run again, completed
when it is done. Knows folders."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from safetensors import SafetensorError, safe_open

from pipeline.config.experiment import Experiment, to_dict
from pipeline.runtime.atomic_io import atomic_write_text, disk_errors
from pipeline.runtime.distributed import make_accelerator
from pipeline.training.checkpoint import FORMAT, check_format, newest_checkpoint

Made = TypeVar("Made")
RESUME_SAFE_FIELDS = (
    "log_every",
    "save_every",
    "save_total_limit",
    "max_nonfinite_steps",
    "compile",
    "activation_checkpointing",
)
_CHANGES_NO_CODE = ("images_per_shard",)
_SETTINGS = "settings.json"
"""In a stage's folder: the settings it is made with; once it is done, its held-out figures too."""


def begin_stage(experiment: Experiment, folder: Path, settings: dict[str, Any]) -> Accelerator:
    """Writes down what the run and its stage are made with, before there is anything that a later
    try could take for its own."""
    accelerator = make_accelerator(experiment, trackers=True)
    if accelerator.is_main_process:
        import yaml

        experiment.folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(
            experiment.folder / "experiment.yaml",
            yaml.safe_dump(to_dict(experiment), sort_keys=False),
        )
    write_stage_settings(accelerator, folder, settings)
    return accelerator


def write_stage_settings(accelerator: Accelerator, folder: Path, settings: dict[str, Any]) -> None:
    """Writes down what a stage that is not done is made with."""
    if accelerator.is_main_process:
        write_settings(folder, {"settings": settings})
    accelerator.wait_for_everyone()


def require_complete(folder: Path, verb: str) -> Path:
    written = read_settings(folder)
    if not folder.is_dir() or (written is not None and "held_out" not in written):
        state = "not finished" if folder.is_dir() else "not there"
        raise FileNotFoundError(
            f"{folder} is {state} yet; run `minidalle {verb}` with the same configuration first"
        )
    return folder


def load_complete(load: Callable[[Path], Made], folder: Path, verb: str) -> Made:
    """What a stage of the same run made.

    Args:
        verb: the one that makes it.

    Raises:
        FileNotFoundError: it is not done.
        ValueError: it is truncated or corrupted.
    """
    folder = require_complete(folder, verb)
    try:
        return load(folder)
    except ValueError as error:
        raise ValueError(
            f"{error}, or run `minidalle {verb}`, which delivers it again from its last checkpoint"
        ) from error


def encode_settings(experiment: Experiment) -> dict[str, Any]:
    """The section `encode` without what changes no code."""
    return {
        key: value
        for key, value in to_dict(experiment.encode).items()
        if key not in _CHANGES_NO_CODE
    }


def is_complete(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether the stage was completed with these settings; refuses a folder with weights made with
    others.

    More `steps` are no refusal: the stage resumes from its last checkpoint. Nor is what changes no
    weight, such as `log_every`.
    """
    written = read_settings(folder)
    if written is None:
        if checkpoint := newest_checkpoint(folder / "checkpoints"):
            raise ValueError(
                f"{folder} has the checkpoint {checkpoint.name} and no {_SETTINGS} that says what "
                "it was made with; put that file back, or "
                f"remove {folder} to start over"
            )
        return False
    made, done = written["settings"], "held_out" in written
    differ = [key for key in settings if key != "train" and made.get(key) != settings[key]]
    longer = settings["train"]["steps"] > made["train"]["steps"]
    # Evaluations choose among weights where the best are kept, and change none elsewhere.
    free = (
        RESUME_SAFE_FIELDS
        if settings["train"]["save_best"]
        else (*RESUME_SAFE_FIELDS, "eval_every")
    )
    differ += [
        f"train.{key}"
        for key, value in settings["train"].items()
        if key not in free and made["train"].get(key) != value and not (key == "steps" and longer)
    ]
    if differ and (done or newest_checkpoint(folder / "checkpoints")):
        raise ValueError(
            f"{folder} was made with other settings ({', '.join(differ)}); choose another name for "
            "this run, "
            f"or remove {folder} and what was built on it"
        )
    return done and not longer and _is_whole(folder)


def _is_whole(folder: Path) -> bool:
    """Whether the weights are there and not cut."""
    weights = list(folder.glob("*.safetensors"))
    try:
        for path in weights:
            with safe_open(path, "pt"):
                pass
    except (SafetensorError, OSError):
        return False
    return bool(weights)


def with_resolved_batch(train: Any, folder: Path) -> Any:
    """A stage's configuration with the numbers that an earlier try chose in place of `auto`."""
    written = (read_settings(folder) or {}).get("settings", {}).get("train", {})
    return replace(
        train,
        **{
            name: written.get(name, "auto")
            for name in ("batch_size", "gradient_accumulation_steps")
            if getattr(train, name) == "auto"
        },
    )


def finalize_stage(
    accelerator: Accelerator,
    model: Any,
    folder: Path,
    settings: dict[str, Any],
    figures: dict[str, float],
) -> None:
    """Writes the final weights beside the checkpoints; the figures beside the settings come last
    and mark the stage as done."""
    if accelerator.is_main_process:
        with disk_errors():
            model.to("cpu").save_pretrained(folder)
        write_settings(
            folder,
            {
                "settings": settings,
                "held_out": {k: v for k, v in figures.items() if math.isfinite(v)},
            },
        )
    for tracker in (
        accelerator.trackers
    ):  # `end_training` would end the process group too, which the next stage needs
        tracker.finish()
    accelerator.wait_for_everyone()


def read_settings(folder: Path) -> dict[str, Any] | None:
    """What `write_settings` wrote last; None where a stage was never started, or is none.

    Raises:
        ValueError: the file is cut, or a version of this program wrote it whose format this one
            does not read.
    """
    path = folder / _SETTINGS
    if not path.is_file():
        return None
    try:
        content = dict(json.loads(path.read_text()))
        content["settings"]["train"]["steps"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is truncated or corrupted ({error}); put it back from a copy, or remove "
            f"{folder} to "
            "start over"
        ) from error
    check_format(content.get("format"), folder)
    return content


def init_from_fingerprint(folder: Path) -> Any:
    """Fingerprints of what a stage was started from; None for one that began at random."""
    return (read_settings(folder) or {}).get("settings", {}).get("init_from")


def write_settings(folder: Path, content: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(
        folder / _SETTINGS, json.dumps({"format": FORMAT, **content}, indent=2) + "\n"
    )
