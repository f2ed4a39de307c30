"""The bundle: one folder that holds everything a pipeline needs. Knows files and fingerprints;
samples nothing."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from pipeline.config.json_file import read_json
from pipeline.inference.known_prompts import FILE as PROMPTS_FILE
from pipeline.inference.known_prompts import KnownPrompts, as_json, read_known_prompts
from pipeline.inference.model_card import FILE as CARD
from pipeline.inference.model_card import model_card, with_metrics
from pipeline.runtime.atomic_io import atomic_write_dir, atomic_write_text, sha256_of
from stage1_tokenizer import TokenizerModule
from stage1_tokenizer.file_checks import (
    UnsafeFile,
    build_config,
    check_file,
    check_folder,
    check_part,
)
from stage1_tokenizer.quantizers import GaussianQuantizer
from stage2_prior import LatentPriorModule, PriorModule, SamplingOptions, TextTokenizer, VampPrior
from stage2_prior.text_checks import MAX_TOKENIZER_BYTES

FORMAT = 1
_PARTS = ("tokenizer", "prior", "text_tokenizer")
_MAX_CARD_BYTES = 2**22
"""Of a model card, and of each image beside it."""
_Model = TypeVar("_Model", TokenizerModule, PriorModule | LatentPriorModule)
_LATENT = LatentPriorModule.config_class.model_type


class Card(NamedTuple):
    """A model card as it was read."""

    description: dict[str, Any]
    """What `pipeline.json` held then."""
    known_prompts: KnownPrompts | None
    files: dict[str, bytes]
    """The card, and the images that it shows."""


class Bundle(NamedTuple):
    """What a bundle holds."""

    tokenizer: TokenizerModule
    prior: PriorModule | LatentPriorModule
    text: TextTokenizer
    defaults: SamplingOptions
    trained_on: dict[str, Any]
    known_prompts: KnownPrompts | None = None
    """Styles and names of icons."""
    card: Card | None = None
    """Kept while the bundle is as it describes; else a new one is written."""


def write_bundle(folder: Path, bundle: Bundle, dtype: Literal["fp32", "bf16"] = "fp32") -> None:
    """Writes the bundle, completely or not at all, with weights of this precision.

    Raises:
        ValueError: the prior was turned to bf16, as `TextToImagePipeline.compile` does.
    """
    if bundle.prior.dtype == torch.bfloat16:
        raise ValueError(
            "the prior is in bf16, as compile() makes it, and its fp32 weights are gone; load the "
            "bundle again to save it"
        )
    if dtype == "bf16":
        bundle = bundle._replace(tokenizer=rounded(bundle.tokenizer), prior=rounded(bundle.prior))

    def write(beside: Path) -> None:
        bundle.tokenizer.save_pretrained(beside / "tokenizer")
        bundle.prior.save_pretrained(beside / "prior")
        bundle.text.save(beside / "text_tokenizer")
        if bundle.known_prompts:
            prompts = as_json(bundle.known_prompts)
            (beside / PROMPTS_FILE).write_text(prompts, encoding="utf-8")
        description = {
            "format": FORMAT,
            "tokenizer_fingerprint": bundle.tokenizer.fingerprint,
            "prior_fingerprint": bundle.prior.fingerprint,
            "text_tokenizer_fingerprint": file_fingerprint(
                beside / "text_tokenizer" / "tokenizer.json"
            ),
            "sampling": asdict(bundle.defaults),
            "trained_on": bundle.trained_on,
        }
        (beside / "pipeline.json").write_text(json.dumps(description, indent=2) + "\n")
        card = {CARD: _card(bundle, description).encode()}
        same = (json.loads(json.dumps(description)), bundle.known_prompts)
        if bundle.card and (bundle.card.description, bundle.card.known_prompts) == same:
            card = bundle.card.files
        for name, content in card.items():
            (beside / name).write_bytes(content)

    atomic_write_dir(folder, write)


def rounded(model: _Model) -> _Model:
    """A copy with its parameters in bf16. Buffers, such as codebooks and rotations, stay fp32."""
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return copied


def _card(bundle: Bundle, description: Mapping[str, Any]) -> str:
    tokenizer = bundle.tokenizer
    channels = tokenizer.own_config.channels
    parts = {
        "kind": {1: "gray", 3: "RGB", 4: "transparent (RGBA)"}.get(channels, ""),
        "height": tokenizer.size[0],
        "width": tokenizer.size[1],
        "quantizer": tokenizer.own_config.quantizer,
        "codes": [(level.grid, level.num_codes) for level in tokenizer.layout],
        "tokenizer_parameters": _count(tokenizer),
        "prior_parameters": _count(bundle.prior),
    }
    return model_card(description, bundle.known_prompts, parts)


def _card_files(folder: Path) -> dict[str, bytes]:
    """The card and the images that it shows, but for what is not safe to read."""
    files: dict[str, bytes] = {}
    for path in (folder / CARD, *sorted(folder.glob("*.png"))):
        if path.name != CARD and f"({path.name})".encode() not in files.get(CARD, b""):
            continue
        with suppress(OSError, UnsafeFile):
            check_file(path, _MAX_CARD_BYTES)
            files[path.name] = path.read_bytes()
    return files


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def read_bundle(folder: Path) -> Bundle:
    """Loads what `write_bundle` wrote.

    Raises:
        FileNotFoundError: the folder is no bundle.
        ValueError: a part is missing, truncated, of another format, or swapped for another
            bundle's; names it.
    """
    description = read_description(folder)
    check_folder(folder)
    for part in _PARTS:
        if not (folder / part).is_dir():
            raise ValueError(f"the bundle {folder} has no {part}/; copy the bundle again")
        check_part(folder, part)
    tokenizer = TokenizerModule.from_pretrained(folder / "tokenizer").eval()
    prior = _read_prior(folder / "prior")
    fingerprints = {
        "tokenizer": tokenizer.fingerprint,
        "prior": prior.fingerprint,
        "text_tokenizer": file_fingerprint(folder / "text_tokenizer" / "tokenizer.json"),
    }
    for part, fingerprint in fingerprints.items():
        expected = description.get(f"{part}_fingerprint")
        if fingerprint != expected:
            raise ValueError(
                f"{folder}/{part} has fingerprint {fingerprint} and pipeline.json expects "
                f"{expected}; that part comes from another bundle, copy the bundle again"
            )
    if isinstance(prior, LatentPriorModule):
        attach_encoder(prior, tokenizer)
    known_prompts = read_known_prompts(folder)
    files = _card_files(folder)
    return Bundle(
        tokenizer,
        prior,
        TextTokenizer.load(folder / "text_tokenizer"),
        build_config(SamplingOptions, description["sampling"], folder / "pipeline.json"),
        description["trained_on"],
        known_prompts,
        Card(copy.deepcopy(description), known_prompts, files) if CARD in files else None,
    )


def add_metrics(folder: Path, evaluation: Path) -> None:
    """Writes the results of `evaluate` into a bundle's model card; does nothing where there are
    none, or they are of other weights."""
    if not (evaluation.is_file() and (folder / CARD).is_file()):
        return
    types = {"settings": dict, "intervals.*": list}
    metrics = read_json(evaluation, "delete it and evaluate again", types=types)
    measured = metrics["settings"].get("fingerprints")
    description = read_description(folder)
    if measured == {part: description[f"{part}_fingerprint"] for part in ("tokenizer", "prior")}:
        card = (folder / CARD).read_text(encoding="utf-8")
        atomic_write_text(folder / CARD, with_metrics(card, metrics))


def attach_encoder(prior: LatentPriorModule, tokenizer: TokenizerModule) -> None:
    """Gives a VampPrior the encoder of its tokenizer, which is not saved with it; no other kind
    needs one."""
    vamp = prior.prior
    quantizer = tokenizer.quantizer
    if isinstance(vamp, VampPrior) and isinstance(quantizer, GaussianQuantizer):

        def posterior(pixels: Tensor) -> tuple[Tensor, Tensor]:
            # Not `tokenizer.posterior`, which has no gradient.
            found = quantizer.posterior(tokenizer.encoder(pixels.to(tokenizer.dtype)))
            return found.mean, found.log_std

        vamp.attach(posterior)


def _read_prior(folder: Path) -> PriorModule | LatentPriorModule:
    """A prior of the kind that its config.json names."""
    config = folder / "config.json"
    latent = config.exists() and (
        read_json(config, "copy the bundle again").get("model_type") == _LATENT
    )
    prior: PriorModule | LatentPriorModule = (
        LatentPriorModule if latent else PriorModule
    ).from_pretrained(folder)
    return prior


def read_description(folder: Path) -> dict[str, Any]:
    """What `pipeline.json` holds.

    Raises:
        FileNotFoundError: the folder is no bundle.
        ValueError: the file is corrupted or of another format.
    """
    path = folder / "pipeline.json"
    try:
        description = read_json(path, "copy the bundle again")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{folder} holds no pipeline.json, so it is no bundle; give a folder that `minidalle "
            "run` made (runs/NAME/bundle), or user/name of the Hub"
        ) from None
    if description and description.get("format") != FORMAT:
        raise ValueError(
            f"{folder} has bundle format {description.get('format')!r}, and this version reads "
            f"{FORMAT}; use the version that wrote it"
        )
    if not all(isinstance(description.get(part), dict) for part in ("sampling", "trained_on")):
        raise ValueError(f"{path} does not describe a bundle; copy the bundle again")
    known = {option.name for option in fields(SamplingOptions)}
    if unknown := set(description["sampling"]) - known:
        raise ValueError(
            f"{path} has unknown sampling options {sorted(unknown)}; known are {sorted(known)}, "
            "copy the bundle again"
        )
    return description


def file_fingerprint(path: Path) -> str:
    """Of the content of a tokenizer.json, 16 hexadecimal digits."""
    try:
        check_file(path, MAX_TOKENIZER_BYTES)
        return sha256_of(path)[:16]
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; copy the bundle again") from None
