"""What pipelines over codes and over Gaussian latents share: their parts, prompts as text ids,
seeds, saving. Samples nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Self

import torch
from torch import Tensor

from pipeline.inference.bundle import Bundle, Card, write_bundle
from pipeline.inference.hub import push_bundle
from pipeline.inference.known_prompts import KnownPrompts
from stage1_tokenizer import TokenizerModule
from stage1_tokenizer.caller import warn_user
from stage2_prior import LatentPriorModule, PriorModule, SamplingOptions, TextTokenizer


def image_seed(seed: int, number: int) -> int:
    """Seed of a prompt's image `number`. It depends on nothing else, so neither a batch nor a split
    changes an image."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:7], "big")


def check_at_least_one(name: str, count: int) -> None:
    """Raises ValueError where a count is below 1."""
    if count < 1:
        raise ValueError(f"{name} is {count}; it must be at least 1")


class BasePipeline:
    """The parts of a bundle, chained by subclasses.

    Args:
        tokenizer: codes or latents -> images.
        prior: caption -> codes or latents.
        text: caption -> text ids.
        defaults: sampling options where a call gives none.
        trained_on: the bundle's description of its data.
        known_prompts: styles and names of icons, by which prompts are checked.
        card: the model card that was read with the parts.
    """

    def __init__(
        self,
        tokenizer: TokenizerModule,
        prior: PriorModule | LatentPriorModule,
        text: TextTokenizer,
        defaults: SamplingOptions | None = None,
        trained_on: dict[str, Any] | None = None,
        known_prompts: KnownPrompts | None = None,
        card: Card | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.prior = prior
        self.text = text
        self.defaults = defaults or SamplingOptions()
        self.trained_on = trained_on or {}
        self.known_prompts = known_prompts
        self.card = card

    @property
    def reads_prompts(self) -> bool:
        """Whether images depend on prompts."""
        return True

    def to(self, device: torch.device | str) -> Self:
        """Moves both stages; returns itself."""
        self.tokenizer.to(device)
        self.prior.to(device)
        return self

    def save_pretrained(
        self, folder: str | Path, *, dtype: Literal["fp32", "bf16"] = "fp32"
    ) -> None:
        """Writes the bundle, whole or not at all. A card that came with the parts is kept.

        Args:
            dtype: bf16 halves its size. Weights are rounded to 8 bits of precision, and loaded in
                fp32 again.
        """
        write_bundle(
            Path(folder),
            Bundle(
                self.tokenizer,
                self.prior,
                self.text,
                self.defaults,
                self.trained_on,
                self.known_prompts,
                self.card,
            ),
            dtype,
        )

    def push_to_hub(
        self,
        name: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> str:
        """Uploads the bundle to the repository `name`, as `push_bundle` does, which has the
        arguments and the errors. Returns the address of the commit."""
        with TemporaryDirectory() as folder:
            bundle = Path(folder) / "bundle"
            self.save_pretrained(bundle)
            return push_bundle(bundle, name, private=private, revision=revision, token=token)

    def text_ids(self, prompts: Sequence[str], truncate: bool = False) -> Tensor:
        """Prompts (B) as ids (B,T). Those of icons are read in the words of training, where their
        name and style are known (`KnownPrompts.as_trained`).

        Raises:
            ValueError: a prompt is too long (unless `truncate`), or empty where the prior was
                trained without caption dropout.
        """
        empty = any(not prompt.strip() for prompt in prompts)
        if empty and not self.prior.config.trained_with_caption_dropout:
            raise ValueError(
                "an empty prompt needs a prior trained with caption dropout, and this one was not; "
                "give a prompt"
            )
        if self.known_prompts:
            prompts = [self.known_prompts.as_trained(prompt) for prompt in prompts]
        return self.text.encode(prompts, truncate=truncate)

    def _warn_of(self, prompts: Sequence[str]) -> None:
        """Warns of empty prompts, and of what no training saw."""
        if any(not prompt.strip() for prompt in prompts):
            warn_user(
                "an empty prompt is sampled without a caption; give a prompt to say what to show"
            )
        if self.known_prompts:
            for prompt in dict.fromkeys(prompts):
                for problem in self.known_prompts.problems(prompt):
                    warn_user(problem)


def checked_prompts(prompts: str | Sequence[str]) -> list[str]:
    """One prompt or several as a list.

    Raises:
        ValueError: there is none.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise ValueError("no prompt was given; give at least one, '' samples without a caption")
    return prompts
