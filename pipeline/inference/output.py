"""What pipelines return. Knows tensors and images alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor


@dataclass
class Scores:
    """What `TextToImagePipeline.score` returns."""

    log_likelihood: Tensor
    """(N,) log p(codes | prompt) in nats. Where the prior was trained on random orders, it is the
    mean over seeded orders; see `score_codes`."""
    pmi: Tensor | None
    """(N,) log p(codes | prompt) - log p(codes | null caption) in nats, 0 for an empty prompt; None
    where the prior was trained without caption dropout."""


@dataclass
class TextToImageOutput:
    """Images in prompt-major order: all of the first prompt, then all of the second."""

    images: list[Image.Image]
    """RGB, or straight RGBA where the tokenizer has four channels."""
    codes: Tensor
    """(N,h,w) int64; (N, codes) where the tokenizer has several levels; (N,0) where latents are
    Gaussian."""
    log_likelihood: Tensor
    """(N,) log p(codes | prompt) in nats, in the order sampled, without guidance, temperature or
    filters. Edits count the resampled codes only. Of Gaussian latents: the log-density of
    `latents`."""
    seeds: list[int]
    """(N,) the seed of each image's random numbers."""
    latents: Tensor | None = None
    """(N,n) Gaussian latents; None where there are codes."""

    def rows(self, chosen: Sequence[int]) -> TextToImageOutput:
        """Some of the images."""
        rows = list(chosen)
        return TextToImageOutput(
            [self.images[i] for i in rows],
            self.codes[rows],
            self.log_likelihood[rows],
            [self.seeds[i] for i in rows],
            None if self.latents is None else self.latents[rows],
        )
