"""What a run starts from: the bundle, run or stage folder that `init_from` names. Knows folders and their JSON; loads no weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pipeline.config import Experiment

Stage = Literal["tokenizer", "prior"]


def stage_folder(given: str | Path, stage: Stage) -> Path:
    """The folder of a stage in a bundle or a run, or the one that is given itself.

    Raises:
        FileNotFoundError: there is no such stage, or it is not finished.
        ValueError: it is the other stage's folder.
    """
    folder = Path(given)
    if not (folder / "config.json").is_file():
        folder = folder / stage
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{stage}.init_from is {given}, and no finished {stage} is there; give a bundle, the folder of a run or of a {stage}"
        )
    kind = str(_read(folder / "config.json").get("model_type"))
    if kind != f"mini_dalle_{stage}":
        raise ValueError(f"{stage}.init_from is {given}, which is a {kind} and no {stage}; give a bundle, a run or a {stage}'s folder")
    return folder


def bundle_of(experiment: Experiment) -> Path | None:
    """The bundle that a run starts from, or that of the run it starts from; None where there is none."""
    for given in filter(None, (experiment.prior.init_from, experiment.tokenizer.init_from)):
        places = (Path(given), Path(given) / "bundle", Path(given).parent, Path(given).parent / "bundle")
        for place in places:
            if (place / "pipeline.json").is_file():
                return place
    return None


def known_codes(prior: Path) -> str:
    """Fingerprint of the tokenizer whose codes a prior was trained on.

    Raises:
        ValueError: neither a bundle nor a run is around it to say so.
    """
    if (prior.parent / "pipeline.json").is_file():
        said = _read(prior.parent / "pipeline.json").get("tokenizer_fingerprint")
    else:
        written = prior / "settings.json"
        said = _read(written).get("settings", {}).get("codes", {}).get("tokenizer") if written.is_file() else None
    if not said:
        raise ValueError(f"{prior} does not say which tokenizer's codes it knows; give its bundle, or the folder of its run")
    return str(said)


def check_codes(given: str, fingerprint: str) -> Path:
    """The folder of the prior to start from, which knows the codes of the tokenizer with this fingerprint.

    Raises:
        ValueError: it knows another tokenizer's codes; names both fingerprints.
    """
    prior = stage_folder(given, "prior")
    if (known := known_codes(prior)) != fingerprint:
        raise ValueError(
            f"the prior in {prior} knows the codes of tokenizer {known}, and this run's tokenizer is {fingerprint}, whose codes mean "
            f"something else; set tokenizer.init_from={given} and tokenizer.frozen=true"
        )
    return prior


def inherited(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that a configuration has from what it starts from, unless it says otherwise: what the weights have to fit.

    Args:
        values: an experiment as plain values.
    """
    found: dict[str, Any] = {}
    if given := values["tokenizer"]["init_from"]:
        model = dict(_model(given, "tokenizer"))
        size = model.pop("image_size", None)  # the tokenizer's follows the data's
        found |= {"tokenizer": {"model": model}} | ({"data": {"image_size": size}} if size else {})
    if given := values["prior"]["init_from"]:
        config = _config(given, "prior")
        stream = config.get("stream") or {}
        # What was trained on random orders can edit, and would forget it.
        order = {"train": {"order": "random"}} if config.get("trained_order") == "random" else {}
        found |= {"prior": {"model": config.get("model") or {}} | order}
        found |= {"text": {"length": stream["text_length"]}} if "text_length" in stream else {}
    return found


def check_origins(experiment: Experiment) -> None:
    """Refuses, before any work, weights that do not fit the configuration.

    Raises:
        ValueError: settings differ; names the first of them and both values.
        FileNotFoundError: there is nothing where `init_from` points to.
    """
    from stage1_tokenizer import TokenizerConfig
    from stage2_prior import PriorConfig

    if given := experiment.tokenizer.init_from:
        _same("tokenizer", experiment.tokenizer.model, stage_folder(given, "tokenizer"), asdict(TokenizerConfig()))
    if given := experiment.prior.init_from:
        folder = stage_folder(given, "prior")
        _same("prior", experiment.prior.model, folder, asdict(PriorConfig()))
        stream, order = _read(folder / "config.json").get("stream") or {}, experiment.prior.train.order
        if order != "raster" and not stream.get("any_order"):
            raise ValueError(f"prior.train.order is {order}, and the prior in {folder} knows raster order alone; leave it out")
        if (length := experiment.text.length) < stream.get("text_length", 0):
            raise ValueError(
                f"text.length is {length}, and the prior in {folder} has {stream['text_length']} text slots; leave it out, or set it higher"
            )


def _same(stage: Stage, model: Any, folder: Path, defaults: dict[str, Any]) -> None:
    own, filled = _flat(json.loads(json.dumps(asdict(model)))), _flat(json.loads(json.dumps(defaults)))
    theirs = filled | _flat(_read(folder / "config.json")["model"])  # a field that there was none of has its default
    if differ := [name for name in sorted(own) if own[name] != theirs[name]]:
        said = [f"{stage}.model.{name} is {own[name]} and {theirs[name]} there" for name in differ[:3]]
        more = f", and {len(differ) - 3} more differ" if len(differ) > 3 else ""
        raise ValueError(
            f"the {stage} in {folder} is of another architecture: {', '.join(said)}{more}; leave these settings out and they follow "
            "what is started from"
        )


def _model(given: str, stage: Stage) -> dict[str, Any]:
    return _config(given, stage).get("model") or {}


def _config(given: str, stage: Stage) -> dict[str, Any]:
    """A stage's config.json; nothing where there is none, which the stages refuse when they begin: a run that is done can be read."""
    try:
        return _read(stage_folder(given, stage) / "config.json")
    except FileNotFoundError:
        return {}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is cut or damaged ({error}); copy it again") from error
