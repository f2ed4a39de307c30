"""Samples codes from a prior: options, filters as small functions, the loop. Knows ids and logits; no text, no pictures.

Legend: B pictures, T text slots, N codes of a picture, K codes to choose from.

Each picture draws one uniform number a code from a generator of its own and inverts the cumulative distribution, so that its
codes depend on its seed alone and not on the batch it is in.
Guidance: logits = null + scale * (conditional - null), both branches in one batch (Ho & Salimans 2022). It prefers codes that the
caption makes likelier than they would be without it, and so, now and then, one that is next to impossible either way. `min_p` rules
those out by the caption's own distribution, as contrastive decoding does (Li et al. 2022, arXiv:2210.15097, section 3.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stage2_prior.model import ImagePrior


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How codes are chosen (`sampling` in a YAML)."""

    guidance_scale: float = 1.0
    """1 samples the caption's distribution; above 1 moves away from the null caption's, and costs a second branch."""
    temperature: float = 1.0
    """Logits are divided by it; 0 takes the most likely code."""
    top_k: int | None = None
    """Keep only the k most likely codes."""
    top_p: float | None = None
    """Keep the smallest set of codes whose probability reaches p (nucleus sampling, Holtzman et al. 2020)."""
    min_p: float | None = None
    """Keep only codes at least this share as likely as the likeliest one, given the caption and before guidance and temperature. With a
    small one (0.002) guidance can be stronger."""

    def __post_init__(self) -> None:
        problems = []
        if self.guidance_scale < 0:
            problems.append(f"guidance_scale is {self.guidance_scale}; it must be 0 or more (1 is off)")
        if self.temperature < 0:
            problems.append(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            problems.append(f"top_k is {self.top_k}; it must be at least 1, or absent for no limit")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            problems.append(f"top_p is {self.top_p}; it must be in (0, 1], or absent for no limit")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            problems.append(f"min_p is {self.min_p}; it must be in [0, 1], or absent for no limit")
        if problems:
            raise ValueError("; ".join(problems))


@dataclass
class Samples:
    """What `sample` returns."""

    codes: Tensor
    """(B,N) int64, each counted within its level."""
    log_likelihood: Tensor
    """(B,) log p(codes | caption) in nats under the prior itself: no guidance, temperature 1, no filter."""


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Sets all but the k largest logits of each row to -inf; ties with the k-th are kept."""
    k = min(k, logits.shape[-1])
    return logits.masked_fill(logits < logits.topk(k).values[..., -1:], float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Sets all logits outside the smallest set that reaches probability p to -inf; the most likely one always stays."""
    ordered, order = logits.sort(descending=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    return logits.masked_fill((before >= p).scatter(-1, order, before >= p), float("-inf"))


def keep_min_p(logits: Tensor, conditional: Tensor, p: float) -> Tensor:
    """Sets the logits (B,K) of codes that `conditional` (B,K) finds less than p times as likely as its likeliest to -inf."""
    # Compared as probabilities, where p may be 0.
    likelihood = (conditional - conditional.amax(-1, keepdim=True)).exp()
    return logits.masked_fill(likelihood < p, float("-inf"))


def guide(conditional: Tensor, null: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance on logits."""
    return null + scale * (conditional - null)


def filtered(logits: Tensor, options: SamplingOptions) -> Tensor:
    """Temperature, then top-k, then top-p; (B,K) -> (B,K). Temperature 0 keeps the largest logit alone."""
    if options.temperature == 0:
        return keep_top_k(logits, 1)
    logits = logits / options.temperature
    if options.top_k is not None:
        logits = keep_top_k(logits, options.top_k)
    if options.top_p is not None and options.top_p < 1:
        logits = keep_top_p(logits, options.top_p)
    return logits


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Inverts the cumulative distribution: logits (B,K), uniform (B,) in [0,1) -> classes (B,)."""
    cumulative = logits.softmax(-1).cumsum(-1)
    # The last entry is 1 only up to rounding, and a class of probability 0 must never be drawn.
    threshold = uniform[:, None].to(cumulative) * cumulative[:, -1:]
    return (cumulative <= threshold).sum(-1).clamp(max=logits.shape[-1] - 1)


def uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """(B,count) uniform numbers in [0,1), row i from a generator seeded with seeds[i]; the same on every device."""
    return torch.stack([torch.rand(count, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds])


@torch.inference_mode()
def sample(prior: ImagePrior, text_ids: Tensor, seeds: Sequence[int], options: SamplingOptions) -> Samples:
    """Draws one picture's codes for each row of `text_ids` (B,T), row i with seeds[i].

    Raises:
        ValueError: guidance was asked of a prior trained without caption dropout; its null caption means nothing.
        FloatingPointError: the logits are not finite, naming the code at which it happened.
    """
    if options.guidance_scale != 1 and not prior.config.trained_with_caption_dropout:
        raise ValueError(
            f"guidance_scale {options.guidance_scale} needs a prior trained with caption dropout, and this one was not; "
            "sample with guidance_scale=1 or train with prior.objective.caption_dropout=0.1"
        )
    batch, device, stream = len(text_ids), prior.device, prior.stream
    guided = options.guidance_scale != 1
    prompt = text_ids.to(device)
    if guided:
        prompt = torch.cat([prompt, stream.null_caption(batch, device)])
    noise = uniforms(seeds, stream.image_length).to(device)
    positions = torch.arange(stream.length, device=device)
    cache, tables = prior.new_cache(len(prompt)), prior.tables()
    codes = torch.empty(batch, stream.image_length, dtype=torch.long, device=device)
    log_likelihood = torch.zeros(batch, stream.image_length, device=device)

    every = prior.step(prompt, positions[: stream.text_length], tables, cache)
    for i in range(stream.image_length):
        first, past = stream.level_range(i)
        logits = every[:, first:past].float()
        conditional = logits[:batch]
        chosen = guide(conditional, logits[batch:], options.guidance_scale) if guided else conditional
        if options.min_p is not None:
            chosen = keep_min_p(chosen, conditional, options.min_p)
        code = draw(filtered(chosen, options), noise[:, i])
        codes[:, i] = code
        log_likelihood[:, i] = conditional.log_softmax(-1).gather(1, code[:, None])[:, 0]
        if i + 1 < stream.image_length:
            ids = stream.code_ids(code[:, None], start=i)
            ids = torch.cat([ids, ids]) if guided else ids
            slot = stream.text_length + i
            every = prior.step(ids, positions[slot : slot + 1], tables, cache)
    finite = log_likelihood.isfinite().all(0)
    if not finite.all():
        raise FloatingPointError(
            f"the prior's logits are not finite at code {int((~finite).nonzero()[0])}; its weights are damaged, "
            "go back to an earlier checkpoint"
        )
    return Samples(codes, log_likelihood.sum(1))
