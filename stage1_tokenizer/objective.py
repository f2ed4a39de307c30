"""What stage 1 minimises. Knows likelihoods and schedules; no optimizer, no data set.

The evidence lower bound (Kingma & Welling 2013): log p(x) >= E_q[log p(x given codes)] - KL(q(codes
given x) || p(codes)), here with the uniform prior; its negative, in nats per image, is divided by
the number of dimensions so that losses compare across sizes. A quantizer's `diversity`, a
perceptual distance and a discriminator are no parts of the bound and come on top of it. Where the
posterior is one code (`vq` and others) the KL is the constant h w log K (van den Oord 2017, section
3.1) and the quantizer's own losses take its place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from stage1_tokenizer.codebook_health import check
from stage1_tokenizer.codebook_redundancy import agreement_by_level, distinct_codes, unchanged_codes
from stage1_tokenizer.config import ObjectiveConfig, joint_problems
from stage1_tokenizer.discriminator import (
    Discriminator,
    adaptive_weight,
    generator_loss,
    hinge_loss,
    lecam,
    loss_at_image,
    requires_grad_off,
)
from stage1_tokenizer.likelihoods import bits_per_dimension
from stage1_tokenizer.metrics import peak_signal_to_noise
from stage1_tokenizer.model import ImageTokenizer
from stage1_tokenizer.perceptual import build_distance
from stage1_tokenizer.pixels import dequantized, to_model_range, to_uint8
from stage1_tokenizer.quantizers import count_codes, statistics_by_level


@dataclass(frozen=True)
class TokenizerLoss:
    """One loss to step: for the optimizer of `group`."""

    group: str
    value: Tensor
    metrics: dict[str, Tensor]


def falling_cosine(step: int, steps: int, start: float, end: float) -> float:
    """From `start` at step 0 to `end` at `steps` and after."""
    progress = min(step / steps, 1.0) if steps else 1.0
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def kl_weight(step: int, config: ObjectiveConfig) -> float:
    """Weight of the KL: a cosine from 0 up to `kl_weight`."""
    return falling_cosine(step, config.kl_ramp_steps, 0.0, config.kl_weight)


def temperature(step: int, config: ObjectiveConfig) -> float:
    """Temperature of the Gumbel-softmax: a cosine from start to end."""
    return falling_cosine(
        step, config.temperature_steps, config.temperature_start, config.temperature_end
    )


class TokenizerObjective:
    """Batches are uint8 images (B,H,W,C). With a discriminator there are two networks and two
    losses per step."""

    def __init__(self, tokenizer: ImageTokenizer, config: ObjectiveConfig) -> None:
        if problems := joint_problems(asdict(tokenizer.own_config), asdict(config)):
            raise ValueError("; ".join(problems))
        self.tokenizer = tokenizer
        self.config = config
        self.networks: dict[str, nn.Module] = {"tokenizer": tokenizer}
        self.distance = build_distance(config.perceptual)
        options = config.discriminator
        self.discriminator = (
            Discriminator(tokenizer.own_config.channels, options.width, options.layers)
            if options.weight
            else None
        )
        if self.discriminator is not None:
            self.networks["discriminator"] = self.discriminator

    def compile(self) -> None:
        """Compiles the networks in place; parameter names stay as they are."""
        self.tokenizer.compile_networks()
        if self.discriminator is not None:
            self.discriminator.compile_networks()

    def losses(
        self, batch: Tensor, step: int, networks: Mapping[str, nn.Module] | None = None
    ) -> Iterator[TokenizerLoss]:
        """The tokenizer's loss, then the discriminator's. The first is the negative log-likelihood
        per dimension, plus what the quantizer, a perceptual distance and a discriminator add.
        `networks` are called in place of the objective's own, such as the same ones wrapped by
        DDP."""
        networks = networks or self.networks
        pixels = to_model_range(batch)
        tokenizer = self.tokenizer
        dimensions = pixels[0].numel()
        current_temperature = (
            temperature(step, self.config) if tokenizer.quantizer.relaxed else None
        )
        output = networks["tokenizer"](pixels, current_temperature)
        quantized = output.quantized
        drawn = tokenizer.likelihood.image(output.parameters)
        target = dequantized(pixels) if tokenizer.likelihood.learns_scale else pixels
        nll_map = tokenizer.likelihood.nll_map(target, output.parameters)
        nll = nll_map.flatten(1).sum(1).mean()
        metrics = {
            **quantized.metrics,
            "nll": nll.detach(),
            "psnr": peak_signal_to_noise(pixels, drawn.detach()).mean(),
        }
        reconstruction = nll / dimensions
        if self.distance is not None:
            perceptual = self.distance(pixels, drawn).mean()
            reconstruction = reconstruction + self.config.perceptual.weight * perceptual
            metrics["perceptual"] = perceptual.detach()
        # Divergences are in nats per image like the likelihood. Distances and entropies of the
        # quantizer are not divided.
        value = reconstruction + quantized.loss
        if quantized.kl is not None:
            value = value + kl_weight(step, self.config) * quantized.kl / dimensions
        if quantized.log_q is not None:
            value = value + tokenizer.quantizer.surrogate(nll_map, quantized.log_q) / dimensions
        if current_temperature is not None:
            metrics["temperature"] = torch.tensor(current_temperature)
        options = self.config.discriminator
        if self.discriminator is None or step < options.start:
            yield TokenizerLoss("tokenizer", value, metrics)
            return
        # Not the wrapped module: its gradients belong to the other loss.
        with requires_grad_off(self.discriminator) as judge:
            g_loss = loss_at_image(generator_loss(judge(drawn).float()), drawn)
        weight = options.weight * (
            adaptive_weight(reconstruction, g_loss, output.parameters) if options.adaptive else 1.0
        )
        metrics["adversarial"] = g_loss.detach()
        yield TokenizerLoss("tokenizer", value + weight * g_loss, metrics)
        yield self._discriminator_loss(networks["discriminator"], pixels, drawn.detach())

    def check_health(self, metrics: Mapping[str, float], step: int) -> str | None:
        """A warning about the codebook, by the scalars of a training step, with what to do; or
        None."""
        return check(self.tokenizer.own_config, metrics, step)

    def _discriminator_loss(
        self, discriminator: nn.Module, true: Tensor, drawn: Tensor
    ) -> TokenizerLoss:
        """The discriminator's loss on true and drawn pixels (B,C,H,W)."""
        assert self.discriminator is not None
        # One pass for both, since DDP expects one per step.
        of_true, of_drawn = discriminator(torch.cat([true, drawn])).float().chunk(2)
        value = hinge_loss(of_true, of_drawn)
        metrics = {"logits_real": of_true.detach().mean(), "logits_fake": of_drawn.detach().mean()}
        if self.config.discriminator.lecam:
            value = value + self.config.discriminator.lecam * lecam(
                of_true, of_drawn, self.discriminator.anchors
            )
            self.discriminator.update_ema_anchors(of_true, of_drawn)
        return TokenizerLoss("discriminator", value, metrics)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Tensor]) -> dict[str, float]:
        """Held-out metrics with hard codes: psnr (dB), nll (nats per image) and bits_per_dimension
        of the exact probability of 8-bit images, codebook use, distinct codes and
        reencode_agreement (over all levels and, where there are several, of each); for relaxed
        quantizers also `relaxed_psnr` at the last temperature and the gap. No collectives.

        Where images have no probability (`bernoulli`, unless all are black and white), nll is the
        training loss, and there is no bits_per_dimension."""
        tokenizer = self.tokenizer
        tokenizer.eval()
        psnr = []
        soft_psnr = []
        nll = []
        unchanged = []
        layout = tokenizer.layout
        counts = torch.zeros(sum(level.num_codes for level in layout), dtype=torch.long)
        dimensions = 1
        exact = True
        for batch in batches:
            pixels = to_model_range(batch)
            dimensions = pixels[0].numel()
            output = tokenizer(pixels)
            values = batch.permute(0, 3, 1, 2)
            if tokenizer.likelihood.covers(values):
                nll.append(tokenizer.likelihood.exact_nll(values, output.parameters).cpu())
            else:
                exact = False
                nll.append(tokenizer.likelihood.nll(pixels, output.parameters).cpu())
            drawn = tokenizer.likelihood.image(output.parameters)
            psnr.append(peak_signal_to_noise(pixels, drawn).cpu())
            codes = output.quantized.codes
            counts += count_codes(codes.cpu(), layout)
            unchanged.append(unchanged_codes(tokenizer, codes, to_uint8(drawn)))
            if tokenizer.quantizer.relaxed:
                soft = tokenizer(pixels, self.config.temperature_end).parameters
                soft_psnr.append(
                    peak_signal_to_noise(pixels, tokenizer.likelihood.image(soft)).cpu()
                )
        distinct = distinct_codes(tokenizer, counts)
        tokenizer.train()
        if not psnr:
            raise ValueError(
                "there are no held-out images to evaluate on; raise data.val_fraction or add images"
            )
        nats = float(torch.cat(nll).mean())
        metrics = {"psnr": float(torch.cat(psnr).mean()), "nll": nats}
        if exact:
            metrics["bits_per_dimension"] = bits_per_dimension(nats, dimensions)
        agreement = agreement_by_level(torch.cat(unchanged), layout)
        for name, statistics in statistics_by_level(counts, layout).items():
            metrics |= {
                f"codebook_usage{name}": statistics.usage,
                f"codebook_perplexity{name}": statistics.perplexity,
                f"dead_codes{name}": float(statistics.dead),
                f"distinct_codes{name}": float(distinct[name]),
                f"reencode_agreement{name}": agreement[name],
            }
        if soft_psnr:
            metrics["relaxed_psnr"] = float(torch.cat(soft_psnr).mean())
            metrics["relaxed_gap"] = metrics["relaxed_psnr"] - metrics["psnr"]
        return metrics
