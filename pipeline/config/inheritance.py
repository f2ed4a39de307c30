"""What a configuration inherits from the bundle, run or stage that it starts from. Knows folders
and their JSON; loads no weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pipeline.config.experiment import to_dict
from pipeline.config.json_file import read_json
from pipeline.config.shipped_bundles import bundle_folder
from stage1_tokenizer import TokenizerConfig
from stage1_tokenizer.file_checks import build_config
from stage2_prior import PriorConfig, StreamConfig

Stage = Literal["tokenizer", "prior"]
_CONFIG = "config.json"
_REMEDY = "copy it again"


def stage_folder(given: str | Path, stage: Stage) -> Path:
    """The folder of a stage in a bundle or a run, or the one that is given itself.

    Args:
        given: a path, or the name of a bundle that comes with the package. What a folder of that
            name has comes first.

    Raises:
        FileNotFoundError: there is no such stage, or it is not finished.
        ValueError: it is the other stage's folder, or has a prior of Gaussian latents.
    """
    folder = _folder_with_config(Path(given).expanduser(), stage) or _folder_with_config(
        bundle_folder(given), stage
    )
    if folder is None:
        raise FileNotFoundError(
            f"{stage}.init_from is {given}, and no finished {stage} is there; give a bundle, the "
            f"folder of a run or of a {stage}"
        )
    kind = str(read_json(folder / _CONFIG).get("model_type"))
    if stage == "prior" and kind == "mini_dalle_latent_prior":
        raise ValueError(
            f"prior.init_from is {given}, whose prior is one of Gaussian latents; such a prior "
            "starts from random weights, leave it out"
        )
    if kind != f"mini_dalle_{stage}":
        raise ValueError(
            f"{stage}.init_from is {given}, which is a {kind} and no {stage}; give a bundle, a run "
            f"or a {stage}'s folder"
        )
    return folder


def _folder_with_config(folder: Path, stage: Stage) -> Path | None:
    places = (folder, folder / stage)
    return next((place for place in places if (place / _CONFIG).is_file()), None)


def inherited_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that the weights of `init_from` have to fit. A configuration has them, unless it
    gives others. Where there are no weights, there are none: the stages refuse that when they
    start, but the settings of a finished run can still be read.

    Args:
        values: an experiment as plain values.

    Raises:
        ValueError: a config.json is damaged, or of another version.
    """
    found: dict[str, Any] = {}
    if given := values["tokenizer"]["init_from"]:
        with suppress(FileNotFoundError):
            model = to_dict(saved_tokenizer_config(stage_folder(given, "tokenizer")))
            data = {"image_size": model.pop("image_size")}  # the tokenizer's follows the data's
            if model["channels"] == 4:
                data["alpha"] = "keep"
            found |= {"tokenizer": {"model": model}, "data": data}
    if given := values["prior"]["init_from"]:
        with suppress(FileNotFoundError):
            folder = stage_folder(given, "prior")
            prior, stream = saved_prior_config(folder)
            found |= {
                "prior": {"model": to_dict(prior)},
                "text": {"max_length": stream.text_length},
            }
            if prior.text_depth:  # it models no text
                found["prior"]["objective"] = {"text_weight": 0.0}
            # What was trained on random orders can edit, and would forget it.
            if read_json(folder / _CONFIG).get("trained_order") == "random":
                found["prior"]["train"] = {"code_order": "random"}
    return found


def saved_tokenizer_config(folder: Path) -> TokenizerConfig:
    """The configuration of the tokenizer in a folder, as loading it reads it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no tokenizer's, or has a value of another type or out of its range.
    """
    path = folder / _CONFIG
    return build_config(TokenizerConfig, read_json(path, _REMEDY, "model")["model"], path)


def saved_prior_config(folder: Path) -> tuple[PriorConfig, StreamConfig]:
    """The configuration and the stream of the prior in a folder. Raises as
    `saved_tokenizer_config`."""
    path = folder / _CONFIG
    saved = read_json(path, _REMEDY, "model", "stream")
    return (
        build_config(PriorConfig, saved["model"], path),
        build_config(StreamConfig, saved["stream"], path),
    )
