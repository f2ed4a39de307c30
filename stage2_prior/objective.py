"""What stage 2 minimises: weighted cross-entropy of text and codes. Knows ids and losses, no
optimizer and no data set.

-log p(text, codes) = -sum log p(text_t | text_<t) - sum log p(code_i | text, code_<i)   (DALL-E,
2021, section 2.2)

The two sums are averaged separately (nats per text token, nats per code) and weighted, since their
difficulty differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from stage2_prior.config import PriorObjectiveConfig
from stage2_prior.model import PriorLogits, PriorModule
from stage2_prior.order import OrderSchedule, seeded_orders, training_orders
from stage2_prior.sequence import TokenSequence


@dataclass(frozen=True)
class PriorLoss:
    """One loss to step: for the optimizer of `group`."""

    group: str
    value: Tensor
    metrics: dict[str, Tensor]


def drop_captions(text_ids: Tensor, null_caption: Tensor, fraction: float) -> Tensor:
    """Text ids (B,T), a random fraction of which become the empty caption (T,) or (B,T), by torch's
    global generator."""
    dropped = torch.rand(len(text_ids), device=text_ids.device) < fraction
    return torch.where(dropped[:, None], null_caption, text_ids)


class PriorObjective:
    """Batches are mappings with `text_ids` (B,T) and `codes` (B,N), int64.

    Args:
        prior: what is trained.
        config: the weights of the losses.
        schedule: the orders of the codes.
        image_first: fraction of the batches whose codes come before the caption, so that the prior
            learns to caption.
        activation_checkpointing: as of `PriorModule.forward`.

    Raises:
        ValueError: the schedule has other orders than raster, and the prior does not take the
            position of the next code as input.
    """

    def __init__(
        self,
        prior: PriorModule,
        config: PriorObjectiveConfig,
        schedule: OrderSchedule | None = None,
        image_first: float = 0.0,
        *,
        activation_checkpointing: bool = False,
    ) -> None:
        self.prior = prior
        self.stream = prior.stream
        self.config = config
        self.schedule = schedule or OrderSchedule()
        self.image_first = image_first
        self.activation_checkpointing = activation_checkpointing
        self.networks: dict[str, nn.Module] = {"prior": prior}
        self._training_cross_entropy: Callable[..., Tensor] = F.cross_entropy
        if self.schedule.order != "raster" and not self.stream.config.any_order:
            raise ValueError(
                f"order {self.schedule.order} needs a prior whose stream has any_order=True"
            )
        if prior.text_encoder and (config.text_weight > 0 or image_first > 0):
            raise ValueError(
                "a prior with a text encoder models no text, since each word knows the next; set "
                "text_weight=0 and image_first=0, or build the prior with text_depth=0"
            )

    def compile(self) -> None:
        """Compiles the network in place, whose parameter names stay, and the training loss. With a
        thousand logits per code the loss takes a twentieth of a step."""
        self.prior.compile(dynamic=False)
        self._training_cross_entropy = torch.compile(F.cross_entropy, dynamic=False)

    def record_training(self) -> None:
        """Records in the prior's configuration what it is trained for; sampling refuses the
        rest."""
        self.prior.config.trained_with_caption_dropout = self.config.caption_dropout > 0
        self.prior.config.trained_order = self.schedule.order
        self.prior.config.trained_image_first = self.image_first > 0

    def losses(
        self,
        batch: Mapping[str, Tensor],
        step: int,
        networks: Mapping[str, nn.Module] | None = None,
    ) -> Iterator[PriorLoss]:
        """The one loss of this stage, in nats. Drops captions, permutes and corrupts codes by
        torch's global generator. `networks` are called in place of the objective's own, such as the
        same ones wrapped by DDP."""
        prior = (networks or self.networks)["prior"]
        text_ids = batch["text_ids"]
        codes = batch["codes"]
        # Spread evenly, by the step alone: the same batches on every process.
        if math.floor((step + 1) * self.image_first) > math.floor(step * self.image_first):
            yield self._caption_loss(prior, text_ids, codes)
            return
        if self.config.caption_dropout:
            null = self.stream.null_caption(len(text_ids), text_ids.device)
            text_ids = drop_captions(text_ids, null, self.config.caption_dropout)
        orders = None
        if self.stream.config.any_order:
            orders = training_orders(
                len(codes), self.stream.image_length, self.schedule.random_share(step), codes.device
            )
        words = _over_processes(self._words(text_ids))
        with_text = self.config.text_weight > 0
        text_loss, image_loss, smoothed = self._cross_entropies(
            prior, text_ids, codes, words, orders, self._corrupted(codes), with_text=with_text
        )
        metrics = {"nats_per_code": image_loss.detach()}
        if with_text:
            metrics["nats_per_text_token"] = text_loss.detach()
        yield PriorLoss("prior", smoothed + self.config.text_weight * text_loss, metrics)

    def _caption_loss(self, prior: nn.Module, text_ids: Tensor, codes: Tensor) -> PriorLoss:
        words = _over_processes(self._words(text_ids))
        loss, logits = self._caption_cross_entropy(prior, text_ids, codes, words)
        # Other batches predict the codes. DDP needs a gradient of every parameter all the same.
        return PriorLoss(
            "prior", loss + 0 * logits.image.sum(), {"nats_per_caption_token": loss.detach()}
        )

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
        """Held-out nats per code and per text token, means over all tokens; a prior with a text
        encoder models no text. No collectives, no caption dropout. Codes come in the order that
        training ends with; random orders are the same in every evaluation."""
        self.prior.eval()
        models_text = not self.prior.text_encoder
        sums = torch.zeros(5, dtype=torch.float64)
        for batch in batches:
            text_ids = batch["text_ids"]
            all_codes = batch["codes"]
            words = self._words(text_ids)
            codes = all_codes.numel()
            orders = None
            if self.stream.config.any_order:
                orders = torch.arange(self.stream.image_length).expand(len(all_codes), -1)
                if self.schedule.order == "random":
                    first = int(sums[3]) // self.stream.image_length
                    orders = seeded_orders(
                        range(first, first + len(all_codes)), self.stream.image_length
                    )
                orders = orders.to(all_codes.device)
            text, image, _ = self._cross_entropies(
                self.prior, text_ids, all_codes, words, orders, with_text=models_text
            )
            caption = (
                self._caption_cross_entropy(self.prior, text_ids, all_codes, words)[0]
                if self.image_first
                else torch.zeros(())
            )
            sums += torch.tensor(
                [
                    float(text * words),
                    float(words),
                    float(image) * codes,
                    codes,
                    float(caption * words),
                ],
                dtype=torch.float64,
            )
        self.prior.train()
        if not sums[3]:
            raise ValueError(
                "there are no held-out images to evaluate on; raise data.val_fraction or add images"
            )
        metrics = {"nats_per_code": float(sums[2] / sums[3])}
        num_words = float(sums[1].clamp(min=1))
        if models_text:
            metrics["nats_per_text_token"] = float(sums[0]) / num_words
        if self.image_first:
            metrics["nats_per_caption_token"] = float(sums[4]) / num_words
        return metrics

    def _corrupted(self, codes: Tensor) -> Tensor:
        """Codes (B,N), of which `code_corruption` are replaced by random ones of their level."""
        if not self.config.code_corruption:
            return codes
        first, past = self.stream.level_edges.to(codes.device)
        rates = 2 * self.config.code_corruption * torch.rand(len(codes), 1, device=codes.device)
        replaced = torch.rand(codes.shape, device=codes.device) < rates
        others = (torch.rand(codes.shape, device=codes.device) * (past - first)).long()
        return torch.where(replaced, others, codes)

    def _words(self, text_ids: Tensor) -> Tensor:
        """Number of text tokens that a batch predicts, float32."""
        return (self.stream.text_targets(text_ids) != -100).sum().float()

    def _cross_entropies(
        self,
        prior: nn.Module,
        text_ids: Tensor,
        codes: Tensor,
        words: Tensor,
        orders: Tensor | None,
        read: Tensor | None = None,
        *,
        with_text: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Nats per text token, of which there are `words`, or 0 where the text is not asked for;
        nats per code; nats per code with label smoothing. `read` (B,N) are the codes that the prior
        reads, by default those that it predicts."""
        fed = self.stream.text_first(text_ids, codes if read is None else read, orders)
        logits = self._call(prior, fed, text_logits=with_text)
        text = logits.text.sum()  # of no logits: 0. DDP needs a gradient of every parameter.
        if with_text:
            text = self._text_cross_entropy(logits.text, text_ids, words)
        image_logits, targets = self.stream.in_order(logits.image.float(), codes, orders)
        flat = image_logits.flatten(0, 1)
        image = self._cross_entropy(flat, targets.flatten())
        smoothing = self.config.label_smoothing
        if not smoothing:
            return text, image, image
        # The cross-entropy with the uniform distribution over the classes of a position's level.
        log_p = flat.log_softmax(-1)
        finite = torch.isfinite(log_p)
        uniform = -(log_p.masked_fill(~finite, 0).sum(-1) / finite.sum(-1)).mean()
        return text, image, (1 - smoothing) * image + smoothing * uniform

    def _caption_cross_entropy(
        self, prior: nn.Module, text_ids: Tensor, codes: Tensor, words: Tensor
    ) -> tuple[Tensor, PriorLogits]:
        """Nats per text token given the codes, and all logits."""
        fed = self.stream.image_first(text_ids, codes)
        logits = self._call(prior, fed, image_first=True)
        return self._text_cross_entropy(logits.text, text_ids, words), logits

    def _call(
        self,
        prior: nn.Module,
        fed: TokenSequence,
        *,
        image_first: bool = False,
        text_logits: bool = True,
    ) -> PriorLogits:
        logits: PriorLogits = prior(
            fed.ids,
            fed.position_ids,
            targets=fed.targets,
            image_first=image_first,
            text_logits=text_logits,
            activation_checkpointing=self.activation_checkpointing,
        )
        return logits

    def _text_cross_entropy(self, logits: Tensor, text_ids: Tensor, words: Tensor) -> Tensor:
        # A batch of null captions has no text target: its sum is 0, not 0 / 0.
        targets = self.stream.text_targets(text_ids).flatten()
        flat = logits.float().flatten(0, 1)
        total = self._cross_entropy(flat, targets, ignore_index=-100, reduction="sum")
        return total / words.clamp(min=1)

    @property
    def _cross_entropy(self) -> Callable[..., Tensor]:
        # Held-out batches have many sizes, and each would be compiled.
        return self._training_cross_entropy if self.prior.training else F.cross_entropy


def _over_processes(words: Tensor) -> Tensor:
    """The mean of a count over all processes. Gradients are averaged over them, so each process
    divides by the mean count."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(words)
        words = words / dist.get_world_size()
    return words
