"""Log-likelihoods of given codes and captions under a prior, in nats; and captions sampled from it.
Knows ids; no images, no words.

Legend: B images, T text positions, N codes of an image, P captions to compare for one image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stage2_prior.model import CodebookTables, PriorModule
from stage2_prior.order import seeded_orders
from stage2_prior.sampling import per_seed_uniforms, sample_from_uniform, warp_logits
from stage2_prior.transformer import CacheView, KeyValueCache, attention_mask

NUM_SCORED_ORDERS = 4
"""Random orders that an image is scored in. The mean over four has half the deviation of one."""


@torch.inference_mode()
def code_log_likelihood(
    prior: PriorModule, text_ids: Tensor, codes: Tensor, orders: Tensor | None = None
) -> Tensor:
    """log p(code | caption, codes before it): (B,N) in nats, by image position.

    Args:
        text_ids: (B,T) captions; `Stream.null_caption` scores without one.
        codes: (B,N) each counted within its level.
        orders: (B,N) the order of the codes; raster by default. An image's likelihood differs
            between orders.
    """
    stream = prior.stream
    device = prior.device
    text_ids = text_ids.to(device)
    codes = codes.to(device)
    if orders is None and stream.config.any_order:
        orders = torch.arange(stream.image_length).expand(len(codes), -1)
    orders = None if orders is None else orders.to(device)
    fed = stream.text_first(text_ids, codes, orders)
    computed = prior(fed.ids, fed.position_ids, targets=fed.targets, text_logits=False)
    logits, classes = stream.in_order(computed.image.float(), codes, orders)
    log_p = logits.log_softmax(-1).gather(2, classes[..., None])[..., 0]
    return log_p if orders is None else torch.empty_like(log_p).scatter_(1, orders, log_p)


def score_codes(prior: PriorModule, text_ids: Tensor, codes: Tensor) -> Tensor:
    """log p(codes | caption) of images whose order is not known: (B,) in nats.

    Codes come in raster order. Where the prior was trained on random orders, the score is the mean
    log-likelihood over `NUM_SCORED_ORDERS` seeded orders. They are the same for every image, so a
    score depends on nothing but the image and its caption. The mean is a lower bound of the
    log-likelihood under a mixture of these orders (Jensen's inequality).

    Args:
        text_ids: (B,T) captions; `Stream.null_caption` scores without one.
        codes: (B,N) each counted within its level.
    """
    return score_each_code(prior, text_ids, codes).sum(1)


def score_each_code(prior: PriorModule, text_ids: Tensor, codes: Tensor) -> Tensor:
    """What each code adds to `score_codes`: (B,N) in nats, by image position; arguments as
    there."""
    if prior.config.trained_order != "random":
        return code_log_likelihood(prior, text_ids, codes)
    orders = seeded_orders(range(NUM_SCORED_ORDERS), prior.stream.image_length)
    in_orders = [
        code_log_likelihood(prior, text_ids, codes, order.expand(len(codes), -1))
        for order in orders
    ]
    return torch.stack(in_orders).mean(0)


@torch.inference_mode()
def caption_log_likelihood(prior: PriorModule, text_ids: Tensor, codes: Tensor) -> Tensor:
    """log p(caption | codes) of each of the captions (P,T) for one image's codes (N,): (P,) in
    nats. The codes are computed once.

    Raises:
        ValueError: the prior was not trained with codes first.
    """
    tables, cache = _read_codes(prior, codes[None], len(text_ids))
    text_ids = text_ids.to(prior.device)
    positions = torch.arange(prior.stream.text_length, device=prior.device)
    cached = positions[:-1] + prior.stream.image_length
    past = CacheView(cache, cached, attention_mask(cached, cached, cache.capacity))
    features = prior.features(
        text_ids[:, :-1], positions[:-1], positions[1:], tables, past, num_text=0
    )
    targets = text_ids[:, 1:]
    logits: Tensor = prior.text_head(features).float()
    log_p = logits.log_softmax(-1).gather(2, targets[..., None])[..., 0]
    return log_p.masked_fill(targets == prior.stream.config.pad_id, 0).sum(1)


@torch.inference_mode()
def sample_captions(
    prior: PriorModule,
    codes: Tensor,
    seeds: Sequence[int],
    *,
    temperature: float = 1.0,
    top_p: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Samples a caption for each row of codes (B,N), row i with seeds[i]: text ids (B,T), and log
    p(caption | codes) (B,) in nats.

    Raises:
        ValueError: the prior was not trained with codes first.
    """
    stream = prior.stream
    device = prior.device
    tables, cache = _read_codes(prior, codes, len(codes))
    ids = stream.null_caption(len(codes), device)
    ids[:, 1:] = stream.config.pad_id
    noise = per_seed_uniforms(seeds, stream.text_length).to(device)
    log_likelihood = torch.zeros(len(codes), device=device)
    ended = torch.zeros(len(codes), dtype=torch.bool, device=device)
    for position in range(stream.text_length - 1):
        cached = torch.tensor([stream.image_length + position], device=device)
        past = CacheView(cache, cached, attention_mask(cached, cached, cache.capacity))
        now = torch.tensor([position], device=device)
        features = prior.features(
            ids[:, position : position + 1], now, now + 1, tables, past, num_text=0
        )
        logits = prior.text_head(features[:, 0]).float()
        # Pad and start are no words, and training gives them next to no probability.
        word = logits.clone()
        word[:, [stream.config.pad_id, stream.config.start_id]] = float("-inf")
        drawn = sample_from_uniform(warp_logits(word, temperature, None, top_p), noise[:, position])
        if position == stream.text_length - 2:  # the last position ends every caption
            drawn = torch.full_like(drawn, stream.config.end_id)
        log_p = logits.log_softmax(-1).gather(1, drawn[:, None])[:, 0]
        log_likelihood += log_p.masked_fill(ended, 0)
        ids[:, position + 1] = torch.where(ended, stream.config.pad_id, drawn)
        ended |= drawn == stream.config.end_id
    return ids, log_likelihood


def _read_codes(
    prior: PriorModule, codes: Tensor, rows: int
) -> tuple[CodebookTables, KeyValueCache]:
    """A cache for `rows` captions that holds the codes (1 or rows, N), each computed once."""
    if prior.text_encoder or not prior.config.trained_image_first:
        raise ValueError(
            "captions need a prior that was trained with codes first in part of its batches, and "
            "this one was not; train one with sequence.captioning_fraction=0.2 and "
            "prior.model.text_depth=0"
        )
    codes = codes.to(prior.device)
    tables = prior.tables()
    every = torch.arange(prior.stream.length, device=prior.device).roll(prior.stream.image_length)
    positions = every[: codes.shape[1] + 1]
    cached = torch.arange(codes.shape[1], device=prior.device)
    read = prior.new_cache(len(codes), codes.shape[1])
    past = CacheView(read, cached, attention_mask(cached, cached, read.capacity))
    prior.features(
        prior.stream.code_ids(codes), positions[:-1], positions[1:], tables, past, num_text=0
    )
    cache = prior.new_cache(rows)
    every_row = torch.arange(rows, device=prior.device)
    cache.copy_from(read, every_row.clamp(max=len(codes) - 1), every_row)
    return tables, cache
