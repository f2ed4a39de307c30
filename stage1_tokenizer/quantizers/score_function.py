"""The score function: hard sampled codes, and a gradient that needs no relaxation but varies much.
Knows logits and costs.

Legend: B batch, D features of a code, h w code grid, K codes.

REINFORCE, Williams 1992; for discrete latents, with a baseline: Mnih & Gregor 2014
(https://arxiv.org/abs/1402.0030), eq. 5-7.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stage1_tokenizer.options import ScoreFunctionOptions
from stage1_tokenizer.quantizers.base import Quantized, sum_over_processes
from stage1_tokenizer.quantizers.categorical import Categorical, gumbel_noise_like, kl_to_uniform


class ScoreFunctionQuantizer(Categorical):
    """Codes are sampled while training; the encoder learns by d E[cost] = E[(cost - baseline) d log
    q(codes)].

    The objective calls `surrogate` with the cost of the sampled codes, which is their likelihood
    alone; the decoder's own gradient does not reach the encoder, nor do a perceptual distance or a
    discriminator. The gradient is unbiased where the cost is that of the whole image. The cost of a
    neighbourhood is biased: a code also moves pixels farther away, as far as the decoder sees.
    """

    relaxed = True
    baseline: Tensor
    initialized: Tensor

    def __init__(self, num_codes: int, code_dim: int, options: ScoreFunctionOptions) -> None:
        super().__init__(num_codes, code_dim)
        self.options = options
        self.register_buffer("baseline", torch.tensor(0.0))
        self.register_buffer("initialized", torch.tensor(False))

    def forward(self, features: Tensor, temperature: float | None = None) -> Quantized:
        """Logits (B,K,h,w) -> codes sampled from them where there is a `temperature` (its value is
        not used), else the likeliest."""
        with torch.autocast(features.device.type, enabled=False):
            log_q = self.log_assignment(features)
            kl = kl_to_uniform(log_q).mean()
            likeliest = self.encode(features)
            codes = (
                likeliest
                if temperature is None
                else (log_q + gumbel_noise_like(log_q)).argmax(dim=-1)
            )
            sampled = None if temperature is None else log_q.gather(-1, codes[..., None])[..., 0]
            loss = self.against_disuse(
                log_q, self.options.diversity, self.options.inverse_temperature
            )
            latents = self.look_up(codes).permute(0, 3, 1, 2)
            metrics = self.use_of(likeliest, kl)
        return Quantized(latents, codes, loss, kl=kl, log_q=sampled, metrics=metrics)

    def surrogate(self, cost: Tensor, log_q: Tensor) -> Tensor:
        """Scalar whose gradient estimates that of the expected cost: costs (B,C,H,W) in nats, log_q
        (B,h,w) of the codes that had them.

        Its value is zero: it adds a gradient to the objective, not a cost. In training it moves the
        baseline, after using it. The first baseline is the mean of its own batch, so that the
        gradient of that step alone is too small, by 1 - 1/B.
        """
        credited, places = self._credited(cost.detach(), log_q.shape[1], log_q.shape[2])
        total = sum_over_processes(torch.stack([credited.sum(), len(credited) * places.sum()]))
        mean = total[0] / total[1]
        baseline = torch.where(self.initialized, self.baseline, mean)
        if self.training:
            self.baseline.copy_(torch.lerp(mean, baseline, self.options.baseline_decay))
            self.initialized.fill_(True)
        weighted = ((credited - baseline * places) * log_q).sum(dim=(1, 2)).mean()
        return weighted - weighted.detach()

    def _credited(self, cost: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """What each code is held to account for (B,h,w), and how many times the baseline's share
        that is (h,w).

        That is the whole image, or the pixels of its place and of those around it, of which there
        are fewer at the edges.
        """
        if self.options.credit_assignment == "image":
            return cost.sum(dim=(1, 2, 3))[:, None, None].expand(-1, height, width), torch.ones(
                height, width, device=cost.device
            )
        places = (
            cost.sum(dim=1).unflatten(2, (width, -1)).unflatten(1, (height, -1)).sum(dim=(2, 4))
        )
        around = [
            F.avg_pool2d(v[:, None], 3, stride=1, padding=1, divisor_override=1)[:, 0]
            for v in (places, torch.ones_like(places[:1]))
        ]
        return around[0], around[1][0]
