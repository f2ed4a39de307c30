"""The two stages as one model of images: p(z | caption) p(x | z), and the posterior q(z | x). Knows
the stages' interfaces; nothing of files or prompts.

Legend: B images, T text positions, N codes of an image, n latent dimensions, K codes to choose
from, C channels, H W pixels. z is the codes (B,h,w), or flat (B,N) of several levels, or Gaussian
latents (B,n).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stage1_tokenizer import TokenizerModule
from stage2_prior import (
    LatentPrior,
    LatentPriorModule,
    PriorModule,
    SamplingOptions,
    StandardNormal,
    sample,
    score_codes,
)
from stage2_prior.sampling import per_seed_normals, per_seed_uniforms, sample_from_uniform


@dataclass(frozen=True)
class PosteriorSample:
    """One sample of the posterior of each image."""

    z: Tensor
    """Codes or latents."""
    log_q: Tensor
    """(B,) log q(z | x) in nats; 0 where the posterior is one code grid."""


class ImageModel(Protocol):
    """A tokenizer and a prior of what it encodes images as."""

    tokenizer: TokenizerModule

    @property
    def is_deterministic(self) -> bool:
        """Whether the posterior of an image is one code grid."""
        ...

    def sample_posterior(self, pixels: Tensor, seeds: Sequence[int]) -> PosteriorSample:
        """Of pixels (B,C,H,W) in [-1,1], row i with seeds[i]."""
        ...

    def sample_prior(self, text_ids: Tensor, seeds: Sequence[int]) -> Tensor:
        """z of captions (B,T), row i with seeds[i]."""
        ...

    def log_prior(self, text_ids: Tensor, z: Tensor) -> Tensor:
        """log p(z | caption) (B,) in nats."""
        ...

    def parameters(self, z: Tensor) -> Tensor:
        """The parameters of p(x | z) (B,P,H,W)."""
        ...


class CodeModel:
    """Codes and an autoregressive prior.

    Args:
        codes_in_bf16: encode in bf16, if the prior was trained on such codes.
    """

    def __init__(
        self, tokenizer: TokenizerModule, prior: PriorModule, *, codes_in_bf16: bool = False
    ) -> None:
        self.tokenizer = tokenizer
        self.prior = prior
        self.codes_in_bf16 = codes_in_bf16

    @property
    def is_deterministic(self) -> bool:
        return not self.tokenizer.quantizer.relaxed

    def sample_posterior(self, pixels: Tensor, seeds: Sequence[int]) -> PosteriorSample:
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.codes_in_bf16):
            log_assignment = self.tokenizer.log_assignment(pixels)
            if log_assignment is None:
                return PosteriorSample(self.tokenizer.encode(pixels), pixels.new_zeros(len(pixels)))
        grid = log_assignment.shape[1:3]
        uniform = per_seed_uniforms(seeds, grid.numel()).to(pixels.device).unflatten(1, grid)
        codes = sample_from_uniform(log_assignment, uniform)
        log_q = log_assignment.gather(-1, codes[..., None]).double().sum(dim=(1, 2, 3))
        return PosteriorSample(codes, log_q)

    def sample_prior(self, text_ids: Tensor, seeds: Sequence[int]) -> Tensor:
        codes = sample(self.prior, text_ids, seeds, SamplingOptions()).codes
        levels = self.tokenizer.layout
        return codes.unflatten(1, levels[0].grid) if len(levels) == 1 else codes

    def log_prior(self, text_ids: Tensor, z: Tensor) -> Tensor:
        return score_codes(self.prior, text_ids, z.flatten(1))

    def parameters(self, z: Tensor) -> Tensor:
        return self.tokenizer.code_parameters(z)


class LatentModel:
    """Gaussian latents and a prior of vectors, N(0, I) where there is none."""

    is_deterministic = False

    def __init__(
        self, tokenizer: TokenizerModule, prior: LatentPriorModule | LatentPrior | None = None
    ) -> None:
        self.tokenizer = tokenizer
        if prior is None:
            prior = StandardNormal(tokenizer.latent_dim).to(tokenizer.device)
        self.prior = prior

    def sample_posterior(self, pixels: Tensor, seeds: Sequence[int]) -> PosteriorSample:
        posterior = self.tokenizer.posterior(pixels)
        z = posterior.from_noise(
            per_seed_normals(seeds, posterior.mean.shape[1]).to(posterior.mean)
        )
        return PosteriorSample(z, posterior.log_prob(z))

    def sample_prior(self, text_ids: Tensor, seeds: Sequence[int]) -> Tensor:
        noise = per_seed_normals(seeds, self.prior.noise_features)
        return self.prior.from_noise(noise, self._context(text_ids))

    def log_prior(self, text_ids: Tensor, z: Tensor) -> Tensor:
        return self.prior.log_prob(z, self._context(text_ids))

    def parameters(self, z: Tensor) -> Tensor:
        return self.tokenizer.latent_parameters(z)

    def _context(self, text_ids: Tensor) -> Tensor | None:
        if isinstance(self.prior, LatentPriorModule):
            return self.prior.encode_text(text_ids)
        return None


def image_model(
    tokenizer: TokenizerModule,
    prior: PriorModule | LatentPriorModule | LatentPrior | None,
    *,
    codes_in_bf16: bool = False,
) -> CodeModel | LatentModel:
    """The model of a pair.

    Args:
        prior: of codes, or of latents; None stands for N(0, I).
        codes_in_bf16: as in `CodeModel`.

    Raises:
        ValueError: the prior models something else than the tokenizer makes.
    """
    if isinstance(prior, PriorModule):
        tokenizer.require_codes("a prior of codes")
        return CodeModel(tokenizer, prior, codes_in_bf16=codes_in_bf16)
    dimensions = tokenizer.latent_dim if prior is None else prior.latent_features
    if not tokenizer.latent_dim or dimensions != tokenizer.latent_dim:
        own = f"{tokenizer.latent_dim} latent dimensions" if tokenizer.latent_dim else "codes"
        raise ValueError(
            f"the tokenizer has {own}, and the prior is one of Gaussian latents"
            f"{'' if prior is None else f' with {dimensions} dimensions'}; give the prior that was "
            "trained with this tokenizer"
        )
    return LatentModel(tokenizer, prior)
