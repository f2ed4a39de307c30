"""Stages that start from weights: what they take over, adapters beside matrices (LoRA), and words that are new. Knows both stages' models.

LoRA (Hu et al. 2021) is peft's: while training, each matrix of the blocks has a product of two narrow ones beside it, and they alone are
trained. Afterwards it is added to the matrix, so that what is delivered is a prior like any other; the adapter lies beside it.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from pipeline.checkpoints import disk_errors, write_folder
from pipeline.config import Experiment, PriorSection, TextConfig, TokenizerSection, TrainConfig, to_dict
from pipeline.origins import check_codes, stage_folder
from pipeline.settings import finish, finished, needed, start
from stage1_tokenizer import ImageTokenizer
from stage2_prior import ImagePrior, TextTokenizer

_ADAPTED = ("query_key_value", "output", "gate_up", "down")
"""The matrices of a block."""
_ADAPTER = "adapter"
"""In a prior's folder: the adapter alone, in peft's own form."""


def new_tokenizer(section: TokenizerSection) -> ImageTokenizer:
    """A tokenizer to train: random, or with the weights of `init_from`."""
    tokenizer = ImageTokenizer(section.model)
    if section.init_from is not None:
        tokenizer.load_state_dict(_load_tokenizer(section.init_from).state_dict())
    return tokenizer


def tokenizer_identity(section: TokenizerSection) -> str | None:
    """Fingerprint of what a tokenizer starts from, wherever that lies."""
    return None if section.init_from is None else _load_tokenizer(section.init_from).fingerprint


def take_tokenizer(experiment: Experiment, folder: Path) -> None:
    """Copies the tokenizer of `tokenizer.init_from`, which is not trained, into the run.

    Raises:
        ValueError: the folder holds another tokenizer; or the prior to start from knows another one's codes.
    """
    assert experiment.tokenizer.init_from is not None
    tokenizer = _load_tokenizer(experiment.tokenizer.init_from)
    if experiment.prior.init_from is not None:  # said now, not after an hour of encoding
        check_codes(experiment.prior.init_from, tokenizer.fingerprint)
    settings = {"init_from": tokenizer.fingerprint, "frozen": True, "train": to_dict(TrainConfig())}
    if not finished(folder, settings):
        finish(start(experiment, folder, settings), tokenizer, folder, settings, {})


class PriorOrigin:
    """The prior and vocabulary that another prior starts from.

    Raises:
        ValueError: the prior knows other codes than those of the tokenizer `fingerprint`, or has no vocabulary beside it.
    """

    def __init__(self, given: str, fingerprint: str) -> None:
        folder = check_codes(given, fingerprint)
        words = folder.parent / "text_tokenizer"
        self.prior = ImagePrior.load(needed(folder, "train-prior"))
        self.text = TextTokenizer.load(words)
        self.identity = {
            "prior": self.prior.fingerprint,
            "text_tokenizer": hashlib.sha256((words / "tokenizer.json").read_bytes()).hexdigest()[:16],
        }
        """What stays the same wherever it lies."""
        self._spelled: list[list[int]] = []

    def vocabulary(self, captions: Iterable[str], config: TextConfig) -> TextTokenizer:
        """The text tokenizer, with `config.length` slots and up to `config.new_entries` entries more for these captions."""
        text = self.text
        if config.new_entries:
            text, self._spelled = text.grown(captions, config.new_entries)
        return TextTokenizer(text.fast, config.length)

    def fill(self, prior: ImagePrior) -> None:
        """Gives a prior for that vocabulary the weights."""
        prior.start_from(self.prior, self._spelled)

    def pieces(self, text: TextTokenizer, captions: list[str]) -> str:
        """How finely captions are cut by the old vocabulary and by the new one, in words."""
        words = max(sum(len(caption.split()) for caption in captions), 1)
        old, new = (sum(length - 2 for length in tokenizer.lengths(captions)) / words for tokenizer in (self.text, text))
        line = f"the vocabulary of the prior it starts from, {self.text.vocab_size} entries, cuts a word into {old:.2f} pieces"
        added = text.vocab_size - self.text.vocab_size
        return f"{line}; {added} entries more, into {new:.2f}" if added else line


class Adapter:
    """What LoRA trains beside the matrices of a prior's blocks, which stay as they are, like everything else.

    Raises:
        ValueError: peft is not installed.
    """

    def __init__(self, prior: ImagePrior, section: PriorSection, identity: dict[str, str]) -> None:
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError:
            raise ValueError(f"prior.lora_rank is {section.lora_rank}, which needs peft; pip install peft, or set it to 0") from None
        config: Any = LoraConfig(
            r=section.lora_rank,
            lora_alpha=section.lora_alpha,
            target_modules=list(_ADAPTED),
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)  # peft asks transformers so
            self._model: Any = get_peft_model(prior, config)  # changes the prior in place
        config.base_model_name_or_path = f"prior {identity['prior']}"  # to whoever finds the adapter alone

    def end(self, folder: Path, accelerator: Accelerator) -> None:
        """Writes the adapter into `folder`/adapter, in peft's own form, and adds it to the matrices: the prior is a plain one again."""

        def write(beside: Path) -> None:
            self._model.save_pretrained(str(beside), save_embedding_layers=False)
            (beside / "README.md").unlink(missing_ok=True)  # a card of blanks to fill in

        if accelerator.is_main_process:
            with disk_errors():
                write_folder(folder / _ADAPTER, write)
        prior = self._model.merge_and_unload()
        prior.requires_grad_(True)


def _load_tokenizer(given: str) -> ImageTokenizer:
    return ImageTokenizer.load(needed(stage_folder(given, "tokenizer"), "train-tokenizer"))
