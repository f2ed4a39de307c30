"""`sample`: a whole batch of images, by an engine that has a row for each. Knows ids and codes; no
text, no images.

Legend: B images, T text positions, N codes of an image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stage2_prior.compilation import CompiledAtFirstUse, Steps
from stage2_prior.engine import Engine, Finished, SampleRequest, Samples
from stage2_prior.model import PriorModule
from stage2_prior.sampling import SamplingOptions
from stage2_prior.schedule import sampling_schedule


# Eight parameters: the four by keyword are independent of each other and have defaults.
@torch.inference_mode()
def sample(
    prior: PriorModule,
    text_ids: Tensor,
    seeds: Sequence[int],
    options: SamplingOptions,
    *,
    known: Tensor | None = None,
    codes: Tensor | None = None,
    orders: Tensor | None = None,
    compiled: bool = False,
) -> Samples:
    """Samples one image's codes for each row of `text_ids` (B,T), row i with seeds[i].

    Args:
        known: (N,) or (B,N) bool, the image positions whose codes are given and kept, as many in
            every row; none by default.
        codes: (B,N) the given codes; other positions are ignored.
        orders: (B,N) the order of the sampled codes. By default raster order, or an order from each
            image's seed where the prior was trained on random ones.
        compiled: whether steps of a single code are compiled.

    Raises:
        ValueError: guidance was asked of a prior trained without caption dropout; its null caption
            means nothing. Or the order needs a prior that was trained on random orders, or there
            are more steps than codes to sample.
        FloatingPointError: the logits are not finite; names the step.
    """
    schedule = sampling_schedule(prior, seeds, options, known=known, codes=codes, orders=orders)
    compiled = compiled and max(schedule.step_sizes) == 1
    steps = CompiledAtFirstUse(prior) if compiled else Steps()
    engine = Engine(prior, schedule.num_rows * len(seeds), steps=steps)
    kept = None if known is None else known.expand(len(seeds), -1)
    for i, seed in enumerate(seeds):
        request = SampleRequest(
            text_ids=text_ids[i],
            seed=seed,
            options=options,
            known=None if kept is None else kept[i],
            codes=None if codes is None else codes[i],
            order=schedule.orders[i],
        )
        engine.submit(request)
    finished: list[Finished] = []
    while len(finished) < len(seeds):
        finished += engine.step()
    failed = [one.failed_step for one in finished if one.failed_step is not None]
    if failed:
        raise FloatingPointError(
            f"the prior's logits are not finite at step {min(failed)}; its weights are "
            "corrupted, go back to an earlier checkpoint"
        )
    finished.sort(key=lambda one: one.ticket)
    with torch.inference_mode(False):  # so that the result can be part of a gradient
        return joined_samples([one.samples for one in finished if one.samples is not None])


def joined_samples(parts: Sequence[Samples]) -> Samples:
    """The images of all parts, in order."""
    null = [part.null_log_likelihood for part in parts if part.null_log_likelihood is not None]
    return Samples(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.log_likelihood for part in parts]),
        torch.cat(null) if len(null) == len(parts) else None,
        torch.cat([part.orders for part in parts]),
    )
