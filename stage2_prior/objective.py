"""What stage 2 minimises: weighted cross-entropy of text and codes. Knows ids and losses, no optimizer and no data set.

-log p(text, codes) = -sum log p(text_t | text_<t) - sum log p(code_i | text, code_<i)   (DALL-E, 2021, section 2.2)

The two sums are averaged apart (nats a text token, nats a code) and weighted, since they are of unlike difficulty.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from stage2_prior.config import PriorObjectiveConfig
from stage2_prior.model import ImagePrior


@dataclass(frozen=True)
class PriorLoss:
    """One loss to step: for the optimizer of `group`."""

    group: str
    value: Tensor
    metrics: dict[str, Tensor]


class PriorObjective:
    """Batches are mappings with `text_ids` (B,T) and `codes` (B,N), int64."""

    def __init__(self, prior: ImagePrior, config: PriorObjectiveConfig) -> None:
        self.prior = prior
        self.stream = prior.stream
        self.config = config
        self.networks: dict[str, nn.Module] = {"prior": prior}
        prior.config.trained_with_caption_dropout = config.caption_dropout > 0

    def losses(self, batch: Mapping[str, Tensor], step: int) -> Iterator[PriorLoss]:
        """The one loss of this stage, in nats; `step` is not used by it. Drops captions with torch's random state."""
        text_ids, codes = batch["text_ids"], batch["codes"]
        if self.config.caption_dropout:
            dropped = torch.rand(len(text_ids), device=text_ids.device) < self.config.caption_dropout
            null = self.stream.null_caption(len(text_ids), text_ids.device)
            text_ids = torch.where(dropped[:, None], null, text_ids)
        words = self._words(text_ids)
        if dist.is_available() and dist.is_initialized():  # gradients are averaged over processes: each counts by the mean count
            dist.all_reduce(words)
            words = words / dist.get_world_size()
        text_loss, image_loss, smoothed = self._cross_entropies(self.networks["prior"], text_ids, codes, words)
        value = smoothed + self.config.text_weight * text_loss
        yield PriorLoss("prior", value, {"nats_per_code": image_loss.detach(), "nats_per_text_token": text_loss.detach()})

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
        """Held-out nats per code and per text token, means over all tokens; no collectives, no dropout of captions."""
        self.prior.eval()
        sums = torch.zeros(4, dtype=torch.float64)
        for batch in batches:
            words, codes = self._words(batch["text_ids"]), batch["codes"].numel()
            text, image, _ = self._cross_entropies(self.prior, batch["text_ids"], batch["codes"], words)
            sums += torch.tensor([float(text * words), float(words), float(image) * codes, codes], dtype=torch.float64)
        self.prior.train()
        if not sums[3]:
            raise ValueError("there are no held-out pictures to evaluate on; raise data.held_out or add pictures")
        return {
            "nats_per_text_token": float(sums[0] / sums[1].clamp(min=1)),
            "nats_per_code": float(sums[2] / sums[3]),
        }

    def _words(self, text_ids: Tensor) -> Tensor:
        """How many text tokens a batch predicts, float32."""
        return (self.stream.text_targets(text_ids) != -100).sum().float()

    def _cross_entropies(self, prior: nn.Module, text_ids: Tensor, codes: Tensor, words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Nats a text token, of which there are `words`; nats a code; the latter with label smoothing."""
        ids = self.stream.inputs(text_ids, codes[:, :-1])
        positions = torch.arange(ids.shape[1], device=ids.device)
        logits = prior(ids, positions, num_text=self.stream.text_length - 1)
        image_logits = logits.image.float()
        mask = self.stream.code_mask()
        if mask is not None:
            image_logits = image_logits.masked_fill(~mask.to(ids.device), float("-inf"))
        # A batch of null captions has no text target: the sum over nothing is 0, not 0 / 0.
        text_targets = self.stream.text_targets(text_ids).flatten()
        text = F.cross_entropy(logits.text.float().flatten(0, 1), text_targets, ignore_index=-100, reduction="sum")
        text = text / words.clamp(min=1)
        flat, targets = image_logits.flatten(0, 1), self.stream.image_targets(codes).flatten()
        image = F.cross_entropy(flat, targets)
        smoothing = self.config.label_smoothing
        if not smoothing:
            return text, image, image
        # Minus the mean log-probability over the classes a position may hold is the smoothing's cross-entropy.
        log_p = flat.log_softmax(-1)
        finite = torch.isfinite(log_p)
        uniform = -(log_p.masked_fill(~finite, 0).sum(-1) / finite.sum(-1)).mean()
        return text, image, (1 - smoothing) * image + smoothing * uniform
