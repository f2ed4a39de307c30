"""A stage in its folder: what it is made with is written before it starts, compared when it is run
again, and completed when it is done. Knows folders and the training loop; no model's inside."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

from accelerate import Accelerator

from pipeline.config.data import settings_beside_content
from pipeline.config.experiment import Experiment, flat, to_dict, with_defaults
from pipeline.config.inheritance import Stage
from pipeline.config.json_file import Types, read_json
from pipeline.config.train import TrainConfig
from pipeline.runtime.atomic_io import atomic_write_dir, atomic_write_files, atomic_write_text
from pipeline.runtime.devices import should_compile, uses_bf16
from pipeline.runtime.distributed import make_accelerator
from pipeline.runtime.log import on_main_process
from pipeline.training.auto_batch import has_auto_batch, resolve_auto_batch
from pipeline.training.checkpoint import FORMAT, check_format, newest_checkpoint
from pipeline.training.task import Task
from pipeline.training.trainer import fit
from stage1_tokenizer import TokenizerModule
from stage2_prior import LatentPriorModule, PriorModule

_log = logging.getLogger(__name__)
_log.addFilter(on_main_process)

Made = TypeVar("Made")
RESUME_SAFE_FIELDS = (
    "log_every",
    "save_every",
    "save_total_limit",
    "max_nonfinite_steps",
    "compile",
    "threads",
    "activation_checkpointing",
)
"""Fields of `train` that change no weight by more than rounding."""
_CHANGES_NO_CODE = ("images_per_shard",)
_IMAGES = ("images", "sources")
"""Inputs that are fingerprints of images."""
_NOT_TRAINED = ("standard", "aggregated")
"""Kinds of a prior of latents that have nothing to train."""
LATENT_PRIOR = "latent_prior"
"""In a tokenizer's folder: the prior that was trained together with it."""
_SETTINGS = "settings.json"
"""In a stage's folder: the settings it is made with and, once it is done, its metrics."""
_TYPES: Types = {
    "settings": dict,
    "settings.train": dict,
    "settings.train.steps": int,
    "settings.train.batch_size": (int, str, NoneType),
    "settings.train.gradient_accumulation_steps": (int, str, NoneType),
    "settings.images": (list, NoneType),
    "settings.sources": (dict, NoneType),
    "settings.codes": (dict, NoneType),
    "settings.codes.tokenizer": (str, NoneType),
    "settings.init_from": (str, dict, NoneType),
    "settings.data": (dict, NoneType),
    "settings.data.mix": (list, NoneType),
    "settings.data.mix.*": dict,
    "settings.num_images": (list, NoneType),
    "settings.num_images.*": (int, NoneType),
    "held_out": (dict, NoneType),
    "held_out.*": (int, float),
}
"""What is read of `_SETTINGS`. Other values are only compared."""
_BACKUP = "settings.backup.json"
"""In a stage's folder: the same, from which a damaged or missing `_SETTINGS` is restored."""


@dataclass
class StageRun:
    """One training stage of a run.

    Attributes:
        experiment: the settings of the run.
        stage: the name of its folder.
        train: how it is trained. Numbers that an earlier attempt chose replace `auto`.
        inputs: what else its weights depend on.
        earlier: inputs as earlier versions recorded them, which count as the same.
        num_images: images to train on and held out, for messages; None where it is unknown.
        accelerator: set by `begin`.
    """

    experiment: Experiment
    stage: Stage
    train: TrainConfig
    inputs: dict[str, Any]
    earlier: dict[str, Any] = field(default_factory=dict)
    num_images: list[int | None] | None = None
    accelerator: Accelerator = field(init=False)

    def __post_init__(self) -> None:
        settings = (read_settings(self.folder) or {}).get("settings", {})
        written = settings.get("train", {})
        if not was_begun(self.folder):
            # An attempt that made nothing may have had another model.
            same = all(same_inputs(settings.get(key), own) for key, own in self.inputs.items())
            written = written if same else {}
        chosen = {
            name: written[name]
            for name in ("batch_size", "gradient_accumulation_steps")
            if getattr(self.train, name) == "auto" and isinstance(written.get(name), int)
        }
        self.train = replace(self.train, **chosen)

    @property
    def folder(self) -> Path:
        return self.experiment.folder / self.stage

    @property
    def settings(self) -> dict[str, Any]:
        """All that the weights depend on, and how they are trained."""
        counts = {} if self.num_images is None else {"num_images": self.num_images}
        return self.inputs | {"train": to_dict(self.train)} | counts

    def is_complete(self) -> bool:
        """Whether the stage was completed with these settings.

        More `steps` than before are allowed: the stage resumes from its last checkpoint. So are
        changes that affect no weight, such as `log_every`.

        Raises:
            ValueError: the folder has weights that were made with other settings.
        """
        written = read_settings(self.folder)
        checkpoint = newest_checkpoint(self.folder / "checkpoints")
        if written is None:
            if checkpoint:
                raise ValueError(
                    f"{self.folder} has the checkpoint {checkpoint.name} and no {_SETTINGS} that "
                    "says what it was made with; put that file back, choose another name for this "
                    f"run (setting: name), or move {self.folder} away to start over"
                )
            return False
        _compare_backup(self.folder, written)
        defaults = to_dict(type(getattr(self.experiment, self.stage))())
        made = with_defaults(written["settings"], defaults)
        done = "held_out" in written
        longer = self.train.steps > made["train"]["steps"]
        free = set(RESUME_SAFE_FIELDS)
        if longer:
            free.add("steps")
        if not self.train.save_best:  # evaluations choose among weights only with it
            free.add("eval_every")
        before = made | {f"train.{key}": value for key, value in made["train"].items()}
        now = self.inputs | {
            f"train.{key}": value for key, value in to_dict(self.train).items() if key not in free
        }
        differing = [
            key
            for key in now
            if key != "train"
            and not same_inputs(before.get(key), now[key])
            and not same_inputs(before.get(key), self.earlier.get(key, now[key]))
        ]
        if differing and (done or checkpoint):
            raise ValueError(self._refusal(before, now, differing))
        return done and not longer and self._delivers()

    def _delivers(self) -> bool:
        """Whether what the stage made can be loaded: each file whole, and as it was saved."""
        has_codes = self.experiment.tokenizer.model.has_codes
        prior = PriorModule if has_codes else LatentPriorModule
        section = self.experiment.prior
        # These have no checkpoints, and are built again.
        is_built = not trains_prior(self.experiment)
        try:
            (prior if self.stage == "prior" else TokenizerModule).from_pretrained(self.folder)
            has_latent_prior = self.stage == "tokenizer" and section.joint
            if has_latent_prior or (self.folder / LATENT_PRIOR).exists():
                LatentPriorModule.from_pretrained(self.folder / LATENT_PRIOR)
        except ValueError as error:
            saved = newest_checkpoint(self.folder / "checkpoints")
            if saved is None and not (self.stage == "prior" and is_built):
                raise ValueError(
                    f"{error}; {self.folder} has no checkpoint to deliver it from, so put that "
                    "file back from a copy"
                ) from error
            _log.warning(f"{error}; {self.stage} is delivered again from its last checkpoint")
            return False
        return True

    def _refusal(
        self, before: Mapping[str, Any], now: Mapping[str, Any], differing: list[str]
    ) -> str:
        """What differs, old and new, and what to do; what keeps the run comes first."""
        changes = [
            change
            for key in differing
            if key not in _IMAGES
            for change in changed(key, before.get(key), now[key])
        ]
        if not set(_IMAGES).isdisjoint(differing):
            changes.append(self._other_images(before))
            keep = (
                "put the images back as they were to keep this run, or train on these in a run of "
                f"another name (tokenizer.init_from={self.experiment.folder} starts from its "
                "weights)"
            )
        else:
            keep = "give the earlier values to keep this run, or choose another name for these"
        return (
            f"{self.folder} was made with other settings ({', '.join(differing)}): "
            f"{'; '.join(changes)}. To go on, {keep}; or move {self.folder} and what was built "
            "on it away"
        )

    def _other_images(self, before: Mapping[str, Any]) -> str:
        """What is known of the images then and now."""
        places = [" + ".join(sources_in(of.get("data", {}))) for of in (before, self.inputs)]
        where = f"of {' -> '.join(dict.fromkeys(places))}"
        then, now = before.get("num_images"), self.num_images
        if then is not None and then == now:
            return f"{where}: the same number of images, of which files, captions or splits differ"
        counts = [
            f"{'unknown' if old is None else f'{old:,}'} -> {new:,} images {split}"
            + ("" if old is None else f" ({new - old:+,})")
            for split, old, new in zip(
                ("to train on", "held out"), then or (None, None), now or (None, None), strict=True
            )
            if new is not None
        ]
        return f"{where}: {', '.join(counts) or 'other images, captions or splits'}"

    def begin(self) -> Accelerator:
        """Records what the run and the stage are made with, before any weight is written."""
        experiment = self.experiment
        self.accelerator = make_accelerator(
            experiment.folder, experiment.trackers, experiment.process_timeout
        )
        if self.accelerator.is_main_process:
            import yaml

            atomic_write_text(
                experiment.folder / "experiment.yaml",
                yaml.safe_dump(to_dict(experiment), sort_keys=False),
            )
        self._record()
        return self.accelerator

    def fit(
        self, task: Callable[[int], Task], *, images: int | None, seconds_after: float = 0.0
    ) -> dict[str, float]:
        """Trains; returns the validation metrics (see `trainer.fit` for what is raised).

        Args:
            task: (batch size) -> what to train. Each call has the same objective.
            images: number of training images, which `batch_size: auto` does not exceed;
                None where it is unknown.
            seconds_after: estimated seconds that the run takes after this training.
        """
        accelerator = self.accelerator
        precision = self.experiment.precision
        if has_auto_batch(self.train):
            self.train = resolve_auto_batch(
                self.train,
                task(accelerator.num_processes),
                precision,
                accelerator,
                rows=images,
                label=self.stage,
            )
            self._record()
        return fit(
            task(self.train.resolved_batch(self.stage)[0]),
            self.train,
            accelerator,
            self.folder,
            seed=self.experiment.seed,
            bf16=uses_bf16(precision, accelerator.device),
            compile_networks=should_compile(self.train, accelerator.device),
            label=self.stage,
            seconds_after=seconds_after,
        )

    def finalize(
        self,
        model: TokenizerModule | PriorModule | LatentPriorModule,
        metrics: dict[str, float],
        latent_prior: LatentPriorModule | None = None,
    ) -> None:
        """Writes the final weights next to the checkpoints. The metrics come last: they mark the
        stage as done.

        Args:
            latent_prior: what was trained together with a tokenizer, for `LATENT_PRIOR` in its
                folder.
        """
        if self.accelerator.is_main_process:
            atomic_write_files(self.folder, model.to("cpu").save_pretrained)
            if latent_prior is not None:
                atomic_write_dir(self.folder / LATENT_PRIOR, latent_prior.to("cpu").save_pretrained)
        self._record(held_out={k: v for k, v in metrics.items() if math.isfinite(v)})
        # `end_training` would also end the process group, which the next stage needs.
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.wait_for_everyone()

    def _record(self, **metrics: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            content = {"format": FORMAT, "settings": self.settings, **metrics}
            for name in (_SETTINGS, _BACKUP):
                atomic_write_text(self.folder / name, json.dumps(content, indent=2) + "\n")
        self.accelerator.wait_for_everyone()


def same_inputs(before: Any, now: Any) -> bool:
    """Whether two inputs of a stage are the same. The names of data do not count: fingerprints of
    what they lead to are among the inputs."""
    return bool(_by_content(before) == _by_content(now))


def _by_content(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    if "source" in value and "mix" in value:
        return settings_beside_content(dict(value))
    return {key: _by_content(own) for key, own in value.items()}


def changed(name: str, before: Any, now: Any) -> list[str]:
    """What differs between two inputs, as `name old -> new`."""
    both = [flat({name: _by_content(value)}) for value in (before, now)]
    names = dict.fromkeys([*both[0], *both[1]])
    return [
        f"{own} {both[0].get(own)} -> {both[1].get(own)}"
        for own in names
        if both[0].get(own) != both[1].get(own)
    ]


def sources_in(data: Mapping[str, Any]) -> list[str]:
    """The sources that `data_settings` name."""
    parts = data.get("mix") or [data]
    return [str(part.get("source", "unknown")) for part in parts]


def require_complete(folder: Path, command: str) -> Path:
    """The folder of a stage that is done.

    Raises:
        FileNotFoundError: it is not; names the command that does it.
    """
    written = read_settings(folder)
    if not folder.is_dir() or (written is not None and "held_out" not in written):
        state = "not finished" if folder.is_dir() else "not there"
        raise FileNotFoundError(
            f"{folder} is {state} yet; run `minidalle {command}` with the same configuration first"
        )
    return folder


def load_complete(load: Callable[[Path], Made], folder: Path, command: str) -> Made:
    """Loads what a stage of the same run made.

    Args:
        command: the command that makes it.

    Raises:
        FileNotFoundError: it is not done.
        ValueError: it is truncated or corrupted.
    """
    folder = require_complete(folder, command)
    try:
        return load(folder)
    except ValueError as error:
        raise ValueError(
            f"{error}, or run `minidalle {command}`, which delivers it again from its last "
            "checkpoint"
        ) from error


def encode_settings(experiment: Experiment) -> dict[str, Any]:
    """The section `encode` without the fields that change no code."""
    return {
        key: value
        for key, value in to_dict(experiment.encode).items()
        if key not in _CHANGES_NO_CODE
    }


def was_begun(folder: Path) -> bool:
    """Whether a stage's folder has weights: of a checkpoint, or of its end."""
    if newest_checkpoint(folder / "checkpoints") is not None:
        return True
    return "held_out" in (read_settings(folder) or {})


def trains_prior(experiment: Experiment) -> bool:
    """Whether a run has a stage in which the prior learns: one of latents may have nothing to
    train, or be trained with the tokenizer."""
    section = experiment.prior
    is_built = section.joint or section.latent.kind in _NOT_TRAINED
    return experiment.tokenizer.model.has_codes or not is_built


def read_settings(folder: Path) -> dict[str, Any] | None:
    """The settings file of a stage; None where there is none. A damaged or missing one is restored
    from its backup.

    Raises:
        ValueError: the file is truncated and has no backup, or has a format that this version does
            not read.
    """
    path = folder / _SETTINGS
    backup = folder / _BACKUP
    remedy = (
        "put it back from a copy, choose another name for this run (setting: name), or move "
        f"{folder} "
        "away to start over"
    )
    if not path.is_file() and not backup.is_file():
        return None
    try:
        content = read_json(path, remedy, types=_TYPES)
    except (ValueError, OSError) as error:
        if not backup.is_file():
            raise
        try:
            content = read_json(backup, remedy, types=_TYPES)
        except (ValueError, OSError):
            raise error from None
        _log.warning(f"{path} is missing or corrupted ({error}); it is restored from {_BACKUP}")
        _restore(path, content)
    check_format(content.get("format"), folder)
    return content


def _restore(path: Path, content: Mapping[str, Any]) -> None:
    """Writes one of the two files from the other. Where nothing can be written, the other is read
    again next time."""
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            atomic_write_text(path, json.dumps(content, indent=2) + "\n")


def _compare_backup(folder: Path, written: Mapping[str, Any]) -> None:
    """Logs where the backup of a stage's settings says something else, as after a flipped bit. One
    that a kill between the two writes left without the metrics is completed."""
    try:
        backup = read_json(folder / _BACKUP)
    except (ValueError, OSError):
        return
    both = [{k: v for k, v in one.items() if k in backup} for one in (backup, written)]
    changes = changed("", *both)
    if changes:
        _log.warning(
            f"{folder / _SETTINGS} is used and differs from {_BACKUP} "
            f"({'; '.join(one.lstrip('.') for one in changes)}); if the backup is right, copy it "
            f"to {_SETTINGS}"
        )
    elif backup != written:
        _restore(folder / _BACKUP, written)


def init_from_fingerprint(folder: Path) -> str | dict[str, str] | None:
    """Fingerprints of the weights that a stage started from; None for random ones."""
    return (read_settings(folder) or {}).get("settings", {}).get("init_from")
