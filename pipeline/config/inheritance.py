"""What a configuration inherits from the bundle, run or stage that it starts from. Knows folders
and their JSON; loads no weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pipeline.config.json_file import read_json

Stage = Literal["tokenizer", "prior"]


def stage_folder(given: str | Path, stage: Stage) -> Path:
    """The folder of a stage in a bundle or a run, or the one that is given itself.

    Raises:
        FileNotFoundError: there is no such stage, or it is not finished.
        ValueError: it is the other stage's folder, or has a prior of Gaussian latents.
    """
    folder = Path(given)
    if not (folder / "config.json").is_file():
        folder = folder / stage
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{stage}.init_from is {given}, and no finished {stage} is there; give a bundle, the "
            f"folder of a run or of a {stage}"
        )
    kind = str(read_json(folder / "config.json").get("model_type"))
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


def inherited_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that the weights of `init_from` have to fit. A configuration has them, unless it
    gives others.

    Args:
        values: an experiment as plain values.
    """
    found: dict[str, Any] = {}
    if given := values["tokenizer"]["init_from"]:
        model = dict(_config(given, "tokenizer").get("model") or {})
        size = model.pop("image_size", None)  # the tokenizer's follows the data's
        data = {"image_size": size} if size else {}
        if model.get("channels") == 4:
            data["alpha"] = "keep"
        found |= {"tokenizer": {"model": model}} | ({"data": data} if data else {})
    if given := values["prior"]["init_from"]:
        config = _config(given, "prior")
        stream = config.get("stream") or {}
        # What was trained on random orders can edit, and would forget it.
        order = (
            {"train": {"code_order": "random"}} if config.get("trained_order") == "random" else {}
        )
        found |= {"prior": {"model": config.get("model") or {}} | order}
        found |= {"text": {"max_length": stream["text_length"]}} if "text_length" in stream else {}
    return found


def _config(given: str, stage: Stage) -> dict[str, Any]:
    """A stage's config.json; empty where there is none. The stages refuse that when they start, but
    the settings of a finished run can still be read."""
    try:
        return read_model_config(stage_folder(given, stage))
    except FileNotFoundError:
        return {}


def read_model_config(folder: Path) -> dict[str, Any]:
    """What config.json of a stage holds: `model`, and of a prior `stream`, as JSON objects.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no stage's.
    """
    path = folder / "config.json"
    config = read_json(path, "copy it again", "model")
    stream = config.get("stream") or {}
    length = stream.get("text_length", 0) if isinstance(stream, dict) else None
    if not isinstance(config["model"], dict) or type(length) is not int:
        raise ValueError(f"{path} is not the configuration of a stage; copy it again")
    return config
