"""What a prior thinks of given codes and captions, in nats; and captions drawn from it. Knows ids;
no images, no words.

Legend: B images, T text slots, N codes of an image, P captions that are compared for one
image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stage2_prior.model import CodebookTables, ImagePrior
from stage2_prior.sampling import per_seed_uniforms, sample_from_uniform, warp_logits
from stage2_prior.transformer import CacheView, KeyValueCache, attention_mask


@torch.inference_mode()
def code_log_likelihood(
    prior: ImagePrior, text_ids: Tensor, codes: Tensor, orders: Tensor | None = None
) -> Tensor:
    """log p(code | caption, codes before it): (B,N) in nats, by image position.

    Args:
        text_ids: (B,T) captions; those of `Stream.null_caption` score without one.
        codes: (B,N) each counted within its level.
        orders: (B,N) in which order the codes come; raster by default. One image has another
            likelihood in each order.
    """
    stream, device = prior.stream, prior.device
    text_ids, codes = text_ids.to(device), codes.to(device)
    if orders is None and stream.config.any_order:
        orders = torch.arange(stream.image_length).expand(len(codes), -1)
    orders = None if orders is None else orders.to(device)
    fed = stream.text_first(text_ids, codes, orders)
    logits, classes = stream.in_order(
        prior(fed.ids, fed.slots, targets=fed.targets).image.float(), codes, orders
    )
    log_p = logits.log_softmax(-1).gather(2, classes[..., None])[..., 0]
    return log_p if orders is None else torch.empty_like(log_p).scatter_(1, orders, log_p)


@torch.inference_mode()
def caption_log_likelihood(prior: ImagePrior, text_ids: Tensor, codes: Tensor) -> Tensor:
    """log p(caption | codes) of each of the captions (P,T) for one image's codes (N,): (P,) in
    nats. The codes are read once.

    Raises:
        ValueError: the prior was not trained with codes first.
    """
    tables, cache = _read_codes(prior, codes[None], len(text_ids))
    text_ids = text_ids.to(prior.device)
    slots = torch.arange(prior.stream.text_length, device=prior.device)
    places = slots[:-1] + prior.stream.image_length
    past = CacheView(cache, places, attention_mask(places, places, cache.capacity))
    features = prior.features(text_ids[:, :-1], slots[:-1], slots[1:], tables, past)
    targets = text_ids[:, 1:]
    log_p = prior.text_head(features).float().log_softmax(-1).gather(2, targets[..., None])[..., 0]
    return log_p.masked_fill(targets == prior.stream.config.pad_id, 0).sum(1)


@torch.inference_mode()
def sample_captions(
    prior: ImagePrior,
    codes: Tensor,
    seeds: Sequence[int],
    *,
    temperature: float = 1.0,
    top_p: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Draws a caption for each row of codes (B,N), row i with seeds[i]: text ids (B,T), and log
    p(caption | codes) (B,) in nats.

    Raises:
        ValueError: the prior was not trained with codes first.
    """
    stream, device = prior.stream, prior.device
    tables, cache = _read_codes(prior, codes, len(codes))
    ids = stream.null_caption(len(codes), device)
    ids[:, 1:] = stream.config.pad_id
    noise = per_seed_uniforms(seeds, stream.text_length).to(device)
    log_likelihood = torch.zeros(len(codes), device=device)
    ended = torch.zeros(len(codes), dtype=torch.bool, device=device)
    for slot in range(stream.text_length - 1):
        place = torch.tensor([stream.image_length + slot], device=device)
        past = CacheView(cache, place, attention_mask(place, place, cache.capacity))
        now = torch.tensor([slot], device=device)
        logits = prior.text_head(
            prior.features(ids[:, slot : slot + 1], now, now + 1, tables, past)[:, 0]
        ).float()
        # Pad and start are no words, and training gives them next to nothing.
        word = logits.clone()
        word[:, [stream.config.pad_id, stream.config.start_id]] = float("-inf")
        drawn = sample_from_uniform(warp_logits(word, temperature, None, top_p), noise[:, slot])
        if slot == stream.text_length - 2:  # the last slot ends every caption
            drawn = torch.full_like(drawn, stream.config.end_id)
        log_p = logits.log_softmax(-1).gather(1, drawn[:, None])[:, 0]
        log_likelihood += log_p.masked_fill(ended, 0)
        ids[:, slot + 1] = torch.where(ended, stream.config.pad_id, drawn)
        ended |= drawn == stream.config.end_id
    return ids, log_likelihood


def _read_codes(
    prior: ImagePrior, codes: Tensor, rows: int
) -> tuple[CodebookTables, KeyValueCache]:
    """A cache for `rows` captions that holds the codes (1 or rows, N), which are read once."""
    if not prior.config.trained_image_first:
        raise ValueError(
            "captions need a prior that was trained with codes first in part of its batches, and "
            "this one was not; train one with "
            "sequence.captioning_fraction=0.2"
        )
    codes = codes.to(prior.device)
    tables = prior.tables()
    slots = torch.arange(prior.stream.length, device=prior.device).roll(prior.stream.image_length)[
        : codes.shape[1] + 1
    ]
    places = torch.arange(codes.shape[1], device=prior.device)
    read = prior.new_cache(len(codes), codes.shape[1])
    past = CacheView(read, places, attention_mask(places, places, read.capacity))
    prior.features(prior.stream.code_ids(codes), slots[:-1], slots[1:], tables, past)
    cache = prior.new_cache(rows)
    cache.copy_from(read, torch.arange(rows, device=prior.device).clamp(max=len(codes) - 1))
    return tables, cache
