"""What a prior over Gaussian latents minimises: -log p(z | caption). Knows vectors and text ids; no
optimizer, and nothing of what made the latents.

Legend: B batch, n dimensions of a latent vector, T text slots.

Over latents that are sampled from posteriors, this is the part of the negative evidence lower bound
in which the prior takes part (Tomczak & Welling 2018, https://arxiv.org/abs/1705.07120, section 2).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from stage2_prior.flows.model import LatentPriorModule
from stage2_prior.objective import PriorLoss, drop_captions


class LatentPriorObjective:
    """Batches are mappings with `latents` (B,n) and, for a conditional prior, `text_ids` (B,T).

    Args:
        prior: what is trained.
        null_caption: text ids (T,) of the empty caption; needed with `caption_dropout`.
        caption_dropout: fraction of captions replaced by it in training.
    """

    def __init__(
        self,
        prior: LatentPriorModule,
        null_caption: Tensor | None = None,
        caption_dropout: float = 0.0,
    ) -> None:
        self.prior = prior
        self.null_caption = null_caption
        self.caption_dropout = caption_dropout if prior.context_features else 0.0
        self.networks: dict[str, nn.Module] = {"prior": prior}

    def compile(self) -> None:
        """Compiles the prior in place; parameter names stay."""
        self.prior.compile(dynamic=False)

    def record_training(self) -> None:
        """Records in the prior's configuration what it is trained for; sampling refuses the
        rest."""
        self.prior.config.trained_with_caption_dropout = self.caption_dropout > 0

    def losses(
        self,
        batch: Mapping[str, Tensor],
        step: int,
        networks: Mapping[str, nn.Module] | None = None,
    ) -> Iterator[PriorLoss]:
        """The one loss, in nats per latent dimension; `prior_nll` is in nats per image. Drops
        captions by torch's global generator. `networks` are called in place of the objective's own,
        such as the same ones wrapped by DDP."""
        prior = (networks or self.networks)["prior"]
        latents = batch["latents"]
        nll = -prior(latents, self._with_dropout(batch.get("text_ids"))).mean()
        yield PriorLoss("prior", nll / latents.shape[1], {"prior_nll": nll.detach()})

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
        """`prior_nll` of held-out latents, in nats per image. No collectives, no caption dropout.

        Raises:
            ValueError: there are none.
        """
        prior = self.prior
        found = [
            # Not the call, which is compiled for the batches of training.
            -prior.log_prob(batch["latents"], prior.encode_text(batch.get("text_ids"))).cpu()
            for batch in batches
        ]
        if not found:
            raise ValueError(
                "there are no held-out images to evaluate on; raise data.val_fraction or add images"
            )
        return {"prior_nll": float(torch.cat(found).mean())}

    def _with_dropout(self, text_ids: Tensor | None) -> Tensor | None:
        """Text ids (B,T), some of which are those of the empty caption."""
        if text_ids is None or not self.caption_dropout or self.null_caption is None:
            return text_ids
        return drop_captions(text_ids, self.null_caption.to(text_ids.device), self.caption_dropout)
