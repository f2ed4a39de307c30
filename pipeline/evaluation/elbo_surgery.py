"""ELBO surgery: the mean bound of held-out images in three parts. Knows posteriors, priors and the
decoder's likelihood; no data sets and no files.

Legend: n images, B images of a batch, M latent dimensions or codes of an image, K codes, h w code
grid. Densities and probabilities are logarithms in nats.

Hoffman & Johnson 2016, "ELBO surgery: yet another way to carve up the variational evidence lower
bound". With q_agg(z) = 1/n sum_j q(z|x_j), the mean ELBO of the images is

    E log p(x|z) - (E log q(z|x) - E log q_agg(z)) - (E log q_agg(z) - E log p(z))

reconstruction, less the mutual information I of image and latents, less the marginal KL(q_agg ||
p). A prior changes the third part alone, and the best one is q_agg.

The estimates take one latent sample z_i per image, and the same samples in all parts. So the parts
add up exactly, and each is unbiased for these n images. I is at most log n, since q_agg holds
q(z|x) itself with weight 1/n. As an estimate for all images that there are, I is too low, and the
marginal KL is too high by as much (Poole et al. 2019, https://arxiv.org/abs/1905.06922, section 2).
The bias is large where I is near log n. Sampling error may bring either slightly below 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.inference.scoring import score_codes_batched
from stage1_tokenizer import GaussianPosterior, TokenizerModule, to_model_range
from stage1_tokenizer.quantizers.binary import BinaryQuantizer
from stage1_tokenizer.quantizers.bits import pack, unpack
from stage1_tokenizer.quantizers.gaussian import GaussianQuantizer
from stage2_prior import LatentPriorModule, PriorModule
from stage2_prior.flows.base import standard_normal_log_prob
from stage2_prior.sampling import sample_from_uniform

BATCH = 64

LogPrior = Callable[[Tensor], Tensor]
"""Latents (n,M) -> log p(z) (n,)."""


class Posteriors(Protocol):
    """q(z|x) of B images. Latents are (.,M): floats, or codes in the order of the stream."""

    def sample(self, generator: torch.Generator) -> Tensor:
        """One sample per image, (B,M)."""
        ...

    def log_probs(self, latents: Tensor) -> Tensor:
        """log q(z_i | x_j) of latents (n,M) under each image: (n,B), float64."""
        ...


@dataclass(frozen=True)
class GaussianPosteriors:
    """Of Gaussian latents."""

    posterior: GaussianPosterior

    def sample(self, generator: torch.Generator) -> Tensor:
        return self.posterior.sample(generator)

    def log_probs(self, latents: Tensor) -> Tensor:
        latents = latents.double()
        each = [
            GaussianPosterior(mean, log_std).log_prob(latents)
            for mean, log_std in zip(
                self.posterior.mean.double().split(1),
                self.posterior.log_std.double().split(1),
                strict=True,
            )
        ]
        return torch.stack(each, dim=1)


@dataclass(frozen=True)
class CategoricalPosteriors:
    """Codes that are independent given the image (`gumbel`, `score_function`)."""

    log_q: Tensor
    """(B,M,K) log-probabilities."""

    def sample(self, generator: torch.Generator) -> Tensor:
        uniform = torch.rand(self.log_q.shape[:2], generator=generator)
        return sample_from_uniform(self.log_q, uniform.to(self.log_q.device))

    def log_probs(self, latents: Tensor) -> Tensor:
        places = torch.arange(latents.shape[1], device=latents.device)
        each = [own[places, latents].double().sum(1) for own in self.log_q]
        return torch.stack(each, dim=1)


@dataclass(frozen=True)
class BitPosteriors:
    """Codes of bits that are independent given the image (`binary`)."""

    logits: Tensor
    """(B,bits,h,w)."""

    def sample(self, generator: torch.Generator) -> Tensor:
        uniform = torch.rand(self.logits.shape, generator=generator).to(self.logits.device)
        return pack(uniform < self.logits.sigmoid()).flatten(1)

    def log_probs(self, latents: Tensor) -> Tensor:
        # log sigmoid(s l) of signs s is linear in s: its mean over both signs, plus s l / 2.
        signs = unpack(latents, self.logits.shape[1]).transpose(1, 2).flatten(1).double()
        logits = self.logits.flatten(1).double()
        means = (F.logsigmoid(logits) + F.logsigmoid(-logits)).sum(1) / 2
        return signs @ logits.T / 2 + means


@dataclass(frozen=True)
class PointPosteriors:
    """One grid of codes for certain (`vq` and other deterministic quantizers). I is the entropy of
    the n grids then: log n if all differ."""

    codes: Tensor
    """(B,M)."""

    def sample(self, generator: torch.Generator) -> Tensor:
        return self.codes

    def log_probs(self, latents: Tensor) -> Tensor:
        same = (latents[:, None] == self.codes).all(dim=2)
        return torch.where(same, 0.0, -math.inf).double()


def posteriors_of(tokenizer: TokenizerModule, pixels: Tensor) -> Posteriors:
    """The posteriors of pixels (B,C,H,W) in [-1,1]."""
    quantizer = tokenizer.quantizer
    if isinstance(quantizer, GaussianQuantizer):
        return GaussianPosteriors(tokenizer.posterior(pixels))
    if isinstance(quantizer, BinaryQuantizer):
        return BitPosteriors(tokenizer.encoder(pixels.to(tokenizer.dtype)).float())
    log_q = tokenizer.log_assignment(pixels)
    if log_q is None:
        return PointPosteriors(tokenizer.encode(pixels).flatten(1))
    return CategoricalPosteriors(log_q.flatten(1, 2))


def is_stochastic(tokenizer: TokenizerModule) -> bool:
    """Whether an image's latents are a distribution. A single point has I = log n, whatever the
    model is."""
    return tokenizer.quantizer.relaxed


@dataclass(frozen=True)
class ElboParts:
    """Means over images, in nats per image."""

    reconstruction: float
    """E log p(x|z), of 8-bit values."""
    mutual_information: float
    """I of image and latents."""
    marginal_kl: float
    """KL(q_agg || p)."""

    @property
    def elbo(self) -> float:
        return self.reconstruction - self.mutual_information - self.marginal_kl


@dataclass(frozen=True)
class Densities:
    """Log densities (n,) at a sample z_i of each image's posterior."""

    own: Tensor
    """log q(z_i | x_i)."""
    aggregated: Tensor
    """log q_agg(z_i)."""


def densities(latents: Tensor, posteriors: Iterable[Posteriors]) -> Densities:
    """Of latents (n,M), a sample per image, and the posteriors of the same images in batches, in
    the same order."""
    own: list[Tensor] = []
    sums = []
    first = 0
    for batch in posteriors:
        table = batch.log_probs(latents)
        own.append(table[first : first + table.shape[1]].diagonal())
        sums.append(table.logsumexp(1))
        first += table.shape[1]
    aggregated = torch.stack(sums, dim=1).logsumexp(1) - math.log(len(latents))
    return Densities(torch.cat(own), aggregated)


def elbo_parts(log_likelihood: Tensor, at: Densities, log_prior: Tensor) -> ElboParts:
    """From log p(x_i | z_i) (n,), the posteriors' densities, and log p(z_i) (n,)."""
    return ElboParts(
        float(log_likelihood.double().mean()),
        float((at.own - at.aggregated).mean()),
        float((at.aggregated - log_prior.to(at.aggregated)).mean()),
    )


@torch.no_grad()
def surgery(
    tokenizer: TokenizerModule, images: Tensor, priors: Mapping[str, LogPrior], seed: int = 0
) -> dict[str, ElboParts]:
    """The ELBO's parts under each prior, all at the same samples.

    It takes n^2 M operations.

    Args:
        images: uint8 (n,H,W,C), held out.
        priors: name -> log p(z).

    Raises:
        ValueError: an image has no probability (`Likelihood.covers`).
    """
    generator = torch.Generator().manual_seed(seed)
    batches = images.to(tokenizer.device).split(BATCH)
    samples = []
    log_likelihood = []
    for batch in batches:
        samples.append(posteriors_of(tokenizer, to_model_range(batch)).sample(generator))
        parameters = _parameters(tokenizer, samples[-1])
        nats = tokenizer.likelihood.exact_nll(batch.permute(0, 3, 1, 2), parameters)
        log_likelihood.append(-nats)
    latents = torch.cat(samples)
    # Again, rather than kept: one batch of `gumbel` may take hundreds of MB.
    again = (posteriors_of(tokenizer, to_model_range(batch)) for batch in batches)
    at = densities(latents, again)
    return {
        name: elbo_parts(torch.cat(log_likelihood), at, log_prior(latents))
        for name, log_prior in priors.items()
    }


def fixed_prior(tokenizer: TokenizerModule) -> LogPrior:
    """The prior that stage 1 is trained with: N(0, I), or uniform over codes."""
    if not tokenizer.own_config.has_codes:
        return lambda latents: standard_normal_log_prob(latents.double())
    nats = sum(level.length * math.log(level.num_codes) for level in tokenizer.layout)
    return lambda latents: torch.full((len(latents),), -nats, dtype=torch.float64)


def learned_prior(prior: PriorModule | LatentPriorModule, text_ids: Tensor) -> LogPrior:
    """log p(z | caption) by stage 2, for captions (n,T), which an unconditional prior ignores. Of
    a `PriorModule` that was trained on random orders it is the lower bound of `score_codes`."""
    if isinstance(prior, PriorModule):
        return lambda codes: score_codes_batched(prior, text_ids, codes, BATCH)
    if not prior.context_features:
        return prior.log_prob
    return lambda latents: prior(latents, text_ids)


def surgery_metrics(
    tokenizer: TokenizerModule,
    prior: PriorModule | LatentPriorModule,
    images: Tensor,
    text_ids: Tensor,
    no_caption: Tensor,
) -> dict[str, float]:
    """The parts in nats per image, of held-out images uint8 (n,H,W,C) with captions (n,T):

    `elbo_reconstruction`, `mutual_information`, `marginal_kl_fixed_prior` (N(0, I), or uniform) and
    `marginal_kl` (the prior of stage 2, if it is unconditional or was trained without captions,
    too). In the ELBO given captions, E log q_agg(z) - E log p(z | caption) takes the last one's
    place. That is `marginal_kl_given_captions`: the marginal KL less what captions tell of z. It
    may be below 0.

    Nothing where the posterior is a point, or an image has no probability.

    Args:
        no_caption: (1,T) text ids of the empty caption.
    """
    values = images.permute(0, 3, 1, 2)
    if not is_stochastic(tokenizer) or not tokenizer.likelihood.covers(values):
        return {}
    priors = {"marginal_kl_fixed_prior": fixed_prior(tokenizer)}
    is_conditional = isinstance(prior, PriorModule) or prior.context_features > 0
    if not is_conditional or prior.config.trained_with_caption_dropout:
        priors["marginal_kl"] = learned_prior(prior, no_caption.expand(len(images), -1))
    if is_conditional:
        priors["marginal_kl_given_captions"] = learned_prior(prior, text_ids)
    parts = surgery(tokenizer, images, priors)
    first = parts["marginal_kl_fixed_prior"]
    shared = {
        "elbo_reconstruction": first.reconstruction,
        "mutual_information": first.mutual_information,
    }
    return shared | {name: of_prior.marginal_kl for name, of_prior in parts.items()}


def _parameters(tokenizer: TokenizerModule, latents: Tensor) -> Tensor:
    """The likelihood's parameters (B,P,H,W) of latents or codes (B,M)."""
    if not tokenizer.own_config.has_codes:
        return tokenizer.latent_parameters(latents)
    codes = latents if len(tokenizer.layout) > 1 else latents.unflatten(1, tokenizer.grid)
    return tokenizer.code_parameters(codes)
