"""Stages that start from weights: what they take over, adapters of matrices (LoRA), and new words.
Knows both stages' models.

LoRA (Hu et al. 2021) is peft's: in training, a product of two narrow matrices is added to each
matrix of the blocks, and only these are trained. Afterwards it is merged: the result is a prior
like any other, and the adapter lies next to it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator

from pipeline.config.data import as_setting
from pipeline.config.experiment import Experiment, PriorSection, TokenizerSection, flat, to_dict
from pipeline.config.inheritance import (
    Stage,
    saved_prior_config,
    saved_tokenizer_config,
    stage_folder,
)
from pipeline.config.json_file import read_json
from pipeline.config.shipped_bundles import bundle_folder
from pipeline.config.train import TrainConfig
from pipeline.inference.bundle import file_fingerprint
from pipeline.runtime.atomic_io import atomic_write_dir
from pipeline.stages.manifest import StageRun, read_settings, require_complete
from pipeline.training.fsdp import fsdp_requested
from stage1_tokenizer import TokenizerConfig, TokenizerModule
from stage2_prior import PriorConfig, PriorModule, StreamConfig, TextConfig, TextTokenizer

_ADAPTED = ("query_key_value", "output", "gate_up", "down")
"""The matrices of a block."""
_ADAPTER = "adapter"
"""In a prior's folder: the adapter alone, in peft's own form."""


def new_tokenizer(section: TokenizerSection) -> TokenizerModule:
    """A tokenizer to train: random, or with the weights of `init_from`. The codebook of one of
    quantizer `vq` becomes the first one of quantizer `residual`."""
    tokenizer = TokenizerModule(section.model)
    if section.init_from is not None:
        origin = _load_tokenizer(section.init_from)
        weights = origin.state_dict()
        if _adds_depths(section.model, origin.own_config):
            renamed = {
                name.replace("quantizer.", "quantizer.books.0.", 1): weight
                for name, weight in weights.items()
            }
            if origin.own_config.vq.normalize:
                # Residual books do not place their vectors on the sphere when they are read.
                table = origin.quantizer.vectors().detach()
                if "quantizer.books.0.map" in renamed:
                    table = table @ torch.linalg.pinv(renamed["quantizer.books.0.map"].float())
                renamed["quantizer.books.0.codebook"] = table
            weights = tokenizer.state_dict() | renamed
        tokenizer.load_state_dict(weights)
    return tokenizer


def _adds_depths(model: TokenizerConfig, saved: TokenizerConfig) -> bool:
    """Whether a tokenizer quantizes what the vectors of a saved one leave over."""
    return model.quantizer == "residual" and saved.quantizer == "vq"


def tokenizer_identity(section: TokenizerSection) -> str | None:
    """Fingerprint of what a tokenizer starts from, wherever that lies."""
    return None if section.init_from is None else _load_tokenizer(section.init_from).fingerprint


def copy_frozen_tokenizer(experiment: Experiment) -> Path:
    """Copies the tokenizer of `tokenizer.init_from`, which is not trained, into the run, for the
    run's image size; returns `RUN/tokenizer`.

    Raises:
        ValueError: the folder holds another tokenizer; or the prior to start from knows another
            one's codes.
    """
    assert experiment.tokenizer.init_from is not None
    tokenizer = _load_tokenizer(experiment.tokenizer.init_from)
    tokenizer = tokenizer.at_size(experiment.tokenizer.model.image_size)
    if experiment.prior.init_from is not None:  # checked now, not after an hour of encoding
        check_tokenizer_match(experiment.prior.init_from, tokenizer.fingerprint)
    inputs = {"init_from": tokenizer.fingerprint, "frozen": True}
    run = StageRun(experiment, "tokenizer", TrainConfig(), inputs)
    if not run.is_complete():
        run.begin()
        run.finalize(tokenizer, {})
    return run.folder


class PretrainedPrior:
    """The prior and vocabulary that another prior starts from.

    Raises:
        ValueError: the prior was trained on codes of a tokenizer other than `fingerprint`, or has
            no vocabulary next to it.
    """

    def __init__(self, given: str, fingerprint: str) -> None:
        folder = check_tokenizer_match(given, fingerprint)
        words = folder.parent / "text_tokenizer"
        self.prior = PriorModule.from_pretrained(require_complete(folder, "train-prior"))
        self.text = TextTokenizer.load(words)
        self.identity = {
            "prior": self.prior.fingerprint,
            "text_tokenizer": file_fingerprint(words / "tokenizer.json"),
        }
        """Fingerprints, the same wherever the files lie."""
        self._spelled: list[list[int]] = []

    def extend_vocab(self, captions: Iterable[str], config: TextConfig) -> TextTokenizer:
        """The text tokenizer with `config.max_length` slots and up to `config.num_new_tokens` new
        entries for these captions, which start like the pieces that spelled them, or like the
        words of `config.new_tokens_like`."""
        text = self.text
        if config.num_new_tokens:
            text, self._spelled = text.extend_vocab(captions, config.num_new_tokens)
        if config.new_tokens_like:
            before, *like = self.text.token_ids(["a", *(f"a {w}" for w in config.new_tokens_like)])
            alike = [i for ids in like for i in ids[len(before) :]]
            self._spelled = [alike] * len(self._spelled)
        return text.with_length(config.max_length)

    def load_into(self, prior: PriorModule) -> None:
        """Copies the weights into a prior for the extended vocabulary."""
        prior.load_pretrained(self.prior, self._spelled)

    def pieces(self, text: TextTokenizer, captions: list[str]) -> str:
        """A line on how many pieces a word has in the old vocabulary and in the new one."""
        words = max(sum(len(caption.split()) for caption in captions), 1)
        old, new = (
            sum(length - 2 for length in tokenizer.lengths(captions)) / words
            for tokenizer in (self.text, text)
        )
        line = (
            f"the vocabulary of the prior it starts from, {self.text.vocab_size} entries, "
            f"cuts a word into {old:.2f} pieces"
        )
        added = text.vocab_size - self.text.vocab_size
        return f"{line}; {added} entries more, into {new:.2f}" if added else line


def require_peft(section: PriorSection) -> None:
    """Raises ValueError where LoRA is asked for and peft is not installed."""
    if section.lora_rank and find_spec("peft") is None:
        raise ValueError(
            f"prior.lora_rank is {section.lora_rank}, which needs peft; pip install peft, or set "
            "it to 0"
        )


class LoRAAdapter:
    """What LoRA trains next to the matrices of a prior's blocks. All weights of the prior are
    frozen, but for the embeddings of new entries of the vocabulary.

    Args:
        old_entries: size of the vocabulary that is frozen; None where no entry is new.

    Raises:
        ValueError: peft is not installed.
    """

    def __init__(
        self,
        prior: PriorModule,
        section: PriorSection,
        identity: dict[str, str],
        old_entries: int | None = None,
    ) -> None:
        require_peft(section)
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=section.lora_rank, lora_alpha=section.lora_alpha, target_modules=list(_ADAPTED)
        )
        with warnings.catch_warnings():
            # Peft calls transformers this way.
            warnings.filterwarnings(
                "ignore", message=".*is_gradient_checkpointing", category=FutureWarning
            )
            self._model = get_peft_model(prior, config)  # changes the prior in place
        rows = prior.text_embedding.weight
        if old_entries is not None and old_entries < len(rows):
            if fsdp_requested():
                raise ValueError(
                    "text.num_new_tokens with prior.lora_rank cannot be sharded: FSDP would train "
                    "the old embeddings, too; start without FSDP, or set text.num_new_tokens=0"
                )
            rows.requires_grad_(True)
            is_new = torch.arange(len(rows)) >= old_entries
            rows.register_hook(lambda gradient: gradient * is_new[:, None].to(gradient))
            rows.no_weight_decay = True  # type: ignore[attr-defined]  # it has no gradient either
        # For readers of the adapter alone.
        config.base_model_name_or_path = f"prior {identity['prior']}"

    def merge_and_save(self, folder: Path, accelerator: Accelerator) -> None:
        """Writes the adapter into `folder`/adapter in peft's format, and merges it: the prior is a
        plain one again."""

        def write(beside: Path) -> None:
            self._model.save_pretrained(str(beside), save_embedding_layers=False)
            (beside / "README.md").unlink(missing_ok=True)  # an empty model card

        if accelerator.is_main_process:
            atomic_write_dir(folder / _ADAPTER, write)
        prior = self._model.merge_and_unload()
        prior.requires_grad_(True)


def _load_tokenizer(given: str) -> TokenizerModule:
    return TokenizerModule.from_pretrained(
        require_complete(stage_folder(given, "tokenizer"), "train-tokenizer")
    )


def parent_bundle(experiment: Experiment) -> Path | None:
    """The bundle that a run starts from, or the bundle of the run that it starts from; None where
    there is none, or its images have another size."""
    for given in filter(None, (experiment.prior.init_from, experiment.tokenizer.init_from)):
        folder = Path(given).expanduser()
        places = [folder, folder / "bundle", folder.parent, folder.parent / "bundle"]
        with suppress(FileNotFoundError):  # an installation without it
            places.append(bundle_folder(given))
        for place in places:
            if (place / "pipeline.json").is_file():
                trained_at = saved_tokenizer_config(place / "tokenizer").image_size
                return place if trained_at == experiment.data.image_size else None
    return None


def tokenizer_fingerprint_of(prior: Path) -> str:
    """Fingerprint of the tokenizer whose codes a prior was trained on.

    Raises:
        ValueError: it lies in neither a bundle nor a run.
    """
    if (prior.parent / "pipeline.json").is_file():
        fingerprint = read_json(prior.parent / "pipeline.json").get("tokenizer_fingerprint")
    else:
        settings = (read_settings(prior) or {}).get("settings", {})
        fingerprint = settings.get("codes", {}).get("tokenizer")
    if not fingerprint:
        raise ValueError(
            f"{prior} does not say which tokenizer's codes it knows; give its bundle, or the "
            "folder of its run"
        )
    return str(fingerprint)


def check_tokenizer_match(given: str, fingerprint: str) -> Path:
    """The folder of the prior to start from, which was trained on the codes of the tokenizer with
    this fingerprint.

    Raises:
        ValueError: it was trained on another tokenizer's codes; names both fingerprints.
    """
    prior = stage_folder(given, "prior")
    if (known := tokenizer_fingerprint_of(prior)) != fingerprint:
        raise ValueError(
            f"the prior in {prior} knows the codes of tokenizer {known}, and this run's tokenizer "
            f"is {fingerprint}, whose codes mean something else; set tokenizer.init_from={given} "
            "and tokenizer.frozen=true"
        )
    return prior


def check_init_from(tokenizer: TokenizerSection, prior: PriorSection, text_length: int) -> None:
    """Refuses, before any work, weights that do not fit the configuration.

    Args:
        text_length: `text.max_length`.

    Raises:
        ValueError: settings differ; names the first of them and both values.
        FileNotFoundError: there is nothing where `init_from` points to.
    """
    if tokenizer.init_from:
        folder = stage_folder(tokenizer.init_from, "tokenizer")
        saved = saved_tokenizer_config(folder)
        compared = saved
        if _adds_depths(tokenizer.model, saved) and not tokenizer.frozen:
            compared = replace(saved, quantizer="residual", residual=tokenizer.model.residual)
        _check_architecture("tokenizer", tokenizer.model, compared, folder)
        original = replace(tokenizer.model, image_size=saved.image_size)
        original.require_resizable(tokenizer.model.image_size)
    if not prior.init_from:
        return
    folder = stage_folder(prior.init_from, "prior")
    saved_model, stream = saved_prior_config(folder)
    if not saved_model.text_depth:  # a text encoder can be added
        if prior.lora_rank and prior.model.text_depth:
            raise ValueError(
                f"prior.model.text_depth is {prior.model.text_depth}, and the prior in {folder} "
                "has no text encoder; with prior.lora_rank its new blocks would not be trained, "
                "set prior.lora_rank=0 or leave prior.model.text_depth out"
            )
        saved_model = replace(saved_model, text_depth=prior.model.text_depth)
    _check_architecture("prior", prior.model, saved_model, folder)
    _check_grid(tokenizer.model, stream, folder)
    order = prior.train.code_order
    if order != "raster" and not stream.any_order:
        raise ValueError(
            f"prior.train.code_order is {order}, and the prior in {folder} knows raster order "
            "alone; leave it out"
        )
    if text_length < stream.text_length:
        raise ValueError(
            f"text.max_length is {text_length}, and the prior in {folder} has "
            f"{stream.text_length} text slots; leave it out, or set it higher"
        )


def _check_grid(model: TokenizerConfig, stream: StreamConfig, folder: Path) -> None:
    """Refuses a prior of images of another grid of codes."""
    known = stream.levels[-1].grid
    if known != model.grid:
        size = [side * model.downsample_factor for side in known]
        raise ValueError(
            f"the prior in {folder} knows grids of {known[0]}x{known[1]} codes, and "
            f"data.image_size {as_setting(model.size)} makes {model.grid[0]}x{model.grid[1]}; set "
            f"data.image_size={as_setting((size[0], size[1]))}, or leave prior.init_from out and "
            "train a new prior"
        )


def _check_architecture(
    stage: Stage,
    model: TokenizerConfig | PriorConfig,
    saved: TokenizerConfig | PriorConfig,
    folder: Path,
) -> None:
    own = flat(to_dict(model))
    own.pop("image_size", None)  # the weights of most tokenizers fit any; see `check_init_from`
    own.pop("dropout", None)  # weights do not depend on it
    theirs = flat(to_dict(saved))
    if differing := [name for name in sorted(own) if own[name] != theirs.get(name)]:
        named = [
            f"{stage}.model.{name} is {own[name]} and {theirs.get(name)} there"
            for name in differing[:3]
        ]
        more = f", and {len(differing) - 3} more differ" if len(differing) > 3 else ""
        raise ValueError(
            f"the {stage} in {folder} is of another architecture: {', '.join(named)}{more}; leave "
            "these settings out and they follow what is started from"
        )
