"""How likely given images are under a whole pipeline: images and prompts, checked, to the functions
of `pipeline.likelihood`. Knows PIL images and prompts; computes nothing itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

from pipeline.inference.scoring import checked_pairs
from pipeline.likelihood.estimate import ImageLikelihood, Method, image_likelihood
from pipeline.likelihood.model import CodeModel, LatentModel, image_model
from pipeline.likelihood.surprise import Surprise, surprise
from stage1_tokenizer import TokenizerModule
from stage1_tokenizer.pixels import from_pil
from stage2_prior import LatentPriorModule, PriorModule, TextTokenizer

_EXACT_MODES = ("RGB", "L", "P", "1")
"""Modes whose pixels have one value in RGB, unless some are transparent."""
_EXACT_WITH_ALPHA = (*_EXACT_MODES, "RGBA", "LA")
"""The same in RGBA."""


class HasStages(Protocol):
    """A pipeline."""

    tokenizer: TokenizerModule
    text: TextTokenizer
    trained_on: dict[str, Any]

    @property
    def prior(self) -> PriorModule | LatentPriorModule: ...

    def text_ids(self, prompts: Sequence[str], truncate: bool) -> Tensor: ...


class LikelihoodMixin:
    """Likelihoods of given images, for pipelines."""

    def likelihood(
        self: HasStages,
        images: Image.Image | Sequence[Image.Image],
        prompts: str | Sequence[str],
        *,
        num_samples: int = 1,
        method: Method = "bound",
        seed: int = 0,
        batch_size: int = 64,
        truncate: bool = False,
    ) -> ImageLikelihood:
        """Bounds of log p(image | prompt) of exact 8-bit pixels, in nats; of four channels, of the
        premultiplied values. A result depends on the
        seed, the image and its prompt, not on the other images of the call.

        The parameters are eight because each is an option of its own that users name.

        Args:
            images: RGB images of the pipeline's size; RGBA ones, too, of four channels.
            prompts: one per image. An empty one stands for no caption.
            num_samples: samples of a posterior that is a distribution, or of the prior (`naive`).
            method: `bound` is by the posterior: the description length, the ELBO or, with several
                samples, the importance-weighted bound. `naive` is Monte Carlo from the prior.
            batch_size: samples at a time.
            truncate: truncate prompts that are too long.

        Raises:
            ValueError: an image has another size or mode, the decoder gives it no probability, a
                number is below 1, there are not as many prompts as images, or a prompt is too long
                (unless `truncate`), or empty where the prior was trained without caption dropout.
        """
        pixels, ids = checked_inputs(self, images, prompts, truncate)
        return image_likelihood(
            model_of(self),
            ids,
            pixels,
            num_samples=num_samples,
            method=method,
            seed=seed,
            batch_size=batch_size,
        )

    def surprise(
        self: HasStages,
        images: Image.Image | Sequence[Image.Image],
        prompts: str | Sequence[str],
        *,
        seed: int = 0,
        truncate: bool = False,
    ) -> list[Surprise]:
        """Where the bits of each image are: per code and per pixel. Arguments and errors as
        `likelihood`."""
        pixels, ids = checked_inputs(self, images, prompts, truncate)
        return surprise(model_of(self), ids, pixels, seed=seed)


def model_of(pipe: HasStages) -> CodeModel | LatentModel:
    """A pipeline's stages as one model of images, which encodes as the prior's codes were
    encoded."""
    bf16 = bool(pipe.trained_on.get("codes_in_bf16", False))
    return image_model(pipe.tokenizer, pipe.prior, codes_in_bf16=bf16)


def text_ids_of(pipe: HasStages, prompts: Sequence[str], truncate: bool) -> Tensor:
    """Text ids (B,T). A prior that takes no caption takes any."""
    if isinstance(pipe.prior, PriorModule) or pipe.prior.context_features:
        return pipe.text_ids(prompts, truncate)
    return pipe.text.encode(prompts, truncate=True)


def checked_inputs(
    pipe: HasStages,
    images: Image.Image | Sequence[Image.Image],
    prompts: str | Sequence[str],
    truncate: bool,
) -> tuple[Tensor, Tensor]:
    """Pixels uint8 (B,H,W,C) and text ids (B,T).

    Raises:
        ValueError: as `LikelihoodMixin.likelihood`.
    """
    config = pipe.tokenizer.own_config
    given = [images] if isinstance(images, Image.Image) else list(images)
    for number, image in enumerate(given):
        check_mode(image, config.channels, "the image" if len(given) == 1 else f"image {number}")
    given, prompts = checked_pairs(given, prompts, config)
    return from_pil(given, channels=config.channels), text_ids_of(pipe, prompts, truncate)


def check_mode(image: Image.Image, channels: int, name: str) -> None:
    """Raises ValueError where the pixels of an image have no one value in 8-bit RGB, or RGBA for a
    tokenizer of four channels; says so of `name`."""
    if channels == 4:
        if image.mode not in _EXACT_WITH_ALPHA:
            raise ValueError(
                f"{name} has mode {image.mode}, and a likelihood is that of 8-bit RGBA pixels; "
                "convert it to 8-bit RGBA first"
            )
    elif image.mode not in _EXACT_MODES or "transparency" in image.info:
        kind = "transparency" if image.mode in _EXACT_MODES else f"mode {image.mode}"
        raise ValueError(
            f"{name} has {kind}, and a likelihood is that of 8-bit RGB pixels; convert it to "
            "8-bit RGB first"
        )
