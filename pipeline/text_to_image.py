"""`TextToImagePipeline`: prompts -> pictures, and the bundle it is saved in. Knows both stages' interfaces, not their insides."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.utils import logging as transformers_logging

from pipeline.checkpoints import write_folder
from stage1_tokenizer import ImageTokenizer
from stage2_prior import ImagePrior, SamplingOptions, TextTokenizer, sample

FORMAT = 1
# Bars of a split second for files of a few megabytes would only break the messages that matter.
transformers_logging.disable_progress_bar()


@dataclass
class TextToImageOutput:
    """Pictures in prompt-major order: all of the first prompt, then all of the second."""

    images: list[Image.Image]
    codes: Tensor
    """(N,h,w) int64; (N, codes) where the tokenizer has several levels."""
    log_likelihood: Tensor
    """(N,) log p(codes | prompt) in nats."""
    seeds: list[int]
    """(N,) what each picture's random numbers were drawn from."""


def picture_seed(seed: int, number: int) -> int:
    """Seed of a prompt's picture `number`; it depends on nothing else, so a batch or a split changes no picture."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:7], "big")


class TextToImagePipeline:
    """Both stages chained.

    Args:
        tokenizer: codes -> pictures.
        prior: caption -> codes.
        text: caption -> text ids.
        defaults: sampling options where a call gives none.
        trained_on: what the bundle says of its data.

    Raises:
        ValueError: the prior was made for other codes or another vocabulary.
    """

    def __init__(
        self,
        tokenizer: ImageTokenizer,
        prior: ImagePrior,
        text: TextTokenizer,
        defaults: SamplingOptions | None = None,
        trained_on: dict[str, Any] | None = None,
    ) -> None:
        self.tokenizer, self.prior, self.text = tokenizer, prior, text
        self.defaults = defaults or SamplingOptions()
        self.trained_on = trained_on or {}
        stream = prior.stream.config
        own = [(tuple(level.grid), level.num_codes) for level in tokenizer.layout]
        expected = [(tuple(level.grid), level.num_codes) for level in stream.levels]
        if own != expected:
            raise ValueError(f"the tokenizer makes codes (grid, count) {own} and the prior models {expected}; they do not belong together")
        if (text.vocab_size, text.length) != (stream.text_vocab_size, stream.text_length):
            raise ValueError(
                f"the text tokenizer has {text.vocab_size} entries and {text.length} slots, the prior {stream.text_vocab_size} "
                f"and {stream.text_length}; they do not belong together"
            )

    def to(self, device: torch.device | str) -> TextToImagePipeline:
        """Moves both stages; returns itself."""
        self.tokenizer.to(device)
        self.prior.to(device)
        return self

    def compile(self) -> TextToImagePipeline:
        """Makes ready for many pictures; returns itself. The prior computes in bf16 where the device does so natively, and its step is
        compiled: some ten seconds once for each batch size. Likelihoods and codes may differ a little from those of fp32.
        """
        from pipeline.runtime import uses_bf16  # here, since it brings accelerate along, which drawing needs for nothing else

        if uses_bf16("auto", self.prior.device):
            self.prior.to(torch.bfloat16)
        self.prior.compile_sampling()
        return self

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int = 0,
        batch_size: int = 64,
        truncate: bool = False,
    ) -> TextToImageOutput:
        """Samples pictures; an option left out takes the bundle's default.

        The same seed gives the same pictures for a prompt, whatever else is asked for in the call. An empty prompt samples
        without a caption and warns that it does.

        Raises:
            ValueError: a prompt is too long (unless `truncate`), an option is out of range, or guidance (or an empty prompt) is
                asked of a prior that was trained without caption dropout.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise ValueError("no prompt was given; give at least one, '' samples without a caption")
        if num_images_per_prompt < 1 or batch_size < 1:
            raise ValueError(f"num_images_per_prompt is {num_images_per_prompt} and batch_size {batch_size}; both must be at least 1")
        given: dict[str, Any] = {
            "guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        }  # fmt: skip
        options = replace(self.defaults, **{k: v for k, v in given.items() if v is not None})
        if any(not prompt.strip() for prompt in prompts):
            if not self.prior.config.trained_with_caption_dropout:
                raise ValueError("an empty prompt needs a prior trained with caption dropout, and this one was not; give a prompt")
            warnings.warn("an empty prompt is sampled without a caption", stacklevel=2)
        ids = self.text.encode(prompts, truncate=truncate).repeat_interleave(num_images_per_prompt, dim=0)
        seeds = [picture_seed(seed, i) for _ in prompts for i in range(num_images_per_prompt)]
        codes, likelihoods, images = [], [], []
        for first in range(0, len(ids), batch_size):
            part = slice(first, first + batch_size)
            drawn = sample(self.prior, ids[part], seeds[part], options)
            grid = self._as_grid(drawn.codes)
            images += self.tokenizer.to_images(grid)
            codes.append(grid.cpu())
            likelihoods.append(drawn.log_likelihood.cpu())
        return TextToImageOutput(images, torch.cat(codes), torch.cat(likelihoods), seeds)

    def _as_grid(self, codes: Tensor) -> Tensor:
        """The stream's flat codes in the tokenizer's form: (B,h,w) for a single level, flat for several."""
        levels = self.tokenizer.layout
        return codes.reshape(len(codes), *levels[0].grid) if len(levels) == 1 else codes

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the bundle, whole or not at all."""

        def write(beside: Path) -> None:
            self.tokenizer.save_pretrained(beside / "tokenizer")
            self.prior.save_pretrained(beside / "prior")
            self.text.save(beside / "text_tokenizer")
            description = {
                "format": FORMAT,
                "tokenizer_fingerprint": self.tokenizer.fingerprint,
                "prior_fingerprint": self.prior.fingerprint,
                "text_tokenizer_fingerprint": _file_fingerprint(beside / "text_tokenizer" / "tokenizer.json"),
                "sampling": asdict(self.defaults),
                "trained_on": self.trained_on,
            }
            (beside / "pipeline.json").write_text(json.dumps(description, indent=2) + "\n")

        write_folder(Path(folder), write)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> TextToImagePipeline:
        """Loads a bundle.

        Raises:
            FileNotFoundError: the folder is no bundle.
            ValueError: a part is missing, cut, of another format, or swapped for another bundle's; says which.
        """
        folder = Path(folder)
        try:
            description = json.loads((folder / "pipeline.json").read_text())
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{folder} holds no pipeline.json, so it is no bundle; `minidalle run` makes one in runs/NAME/bundle"
            ) from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{folder}/pipeline.json is cut or damaged ({error}); copy the bundle again") from error
        if not isinstance(description, dict):
            raise ValueError(f"{folder}/pipeline.json does not describe a bundle; copy the bundle again")
        if description.get("format") != FORMAT:
            raise ValueError(f"{folder} has bundle format {description.get('format')!r}, and this version reads {FORMAT}")
        if not all(isinstance(description.get(part), dict) for part in ("sampling", "trained_on")):
            raise ValueError(f"{folder}/pipeline.json does not describe a bundle; copy the bundle again")
        known = {f.name for f in fields(SamplingOptions)}
        if unknown := set(description["sampling"]) - known:
            raise ValueError(f"{folder}/pipeline.json has unknown sampling options {sorted(unknown)}; known are {sorted(known)}")
        for part in ("tokenizer", "prior", "text_tokenizer"):
            if not (folder / part).is_dir():
                raise ValueError(f"the bundle {folder} has no {part}/; copy the bundle again")
        tokenizer = ImageTokenizer.load(folder / "tokenizer").eval()
        prior = ImagePrior.load(folder / "prior")
        found = {
            "tokenizer": tokenizer.fingerprint,
            "prior": prior.fingerprint,
            "text_tokenizer": _file_fingerprint(folder / "text_tokenizer" / "tokenizer.json"),
        }
        for part, fingerprint in found.items():
            if fingerprint != description.get(f"{part}_fingerprint"):
                raise ValueError(
                    f"{folder}/{part} has fingerprint {fingerprint} and pipeline.json expects "
                    f"{description.get(f'{part}_fingerprint')}; that part comes from another bundle, copy the bundle again"
                )
        return cls(
            tokenizer, prior, TextTokenizer.load(folder / "text_tokenizer"),
            SamplingOptions(**description["sampling"]), description["trained_on"],
        )  # fmt: skip


def _file_fingerprint(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; copy the bundle again") from None
