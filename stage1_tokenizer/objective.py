"""What stage 1 minimises. Knows likelihoods and schedules; no optimizer, no data set.

The evidence lower bound (Kingma & Welling 2013): log p(x) >= E_q[log p(x given codes)] - KL(q(codes given x) || p(codes)), here with
the uniform prior; its negative, in nats a picture, is divided by the number of dimensions so that losses compare across sizes. For
`vq` the KL is the constant h w log K (the posterior is one code, van den Oord 2017, section 3.1) and the quantizer's own losses take
its place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stage1_tokenizer.config import ObjectiveConfig
from stage1_tokenizer.likelihoods import bits_per_dimension
from stage1_tokenizer.model import ImageTokenizer
from stage1_tokenizer.pixels import to_model_range
from stage1_tokenizer.quantizers import codebook_statistics


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
    return falling_cosine(step, config.temperature_steps, config.temperature_start, config.temperature_end)


def peak_signal_to_noise(pixels: Tensor, pictures: Tensor) -> Tensor:
    """PSNR in dB of each picture (B,), both in [-1,1] (peak 2)."""
    error = (pixels - pictures.clamp(-1, 1)).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp(min=1e-10))


class TokenizerObjective:
    """Batches are uint8 pictures (B,H,W,C)."""

    def __init__(self, tokenizer: ImageTokenizer, config: ObjectiveConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.networks: dict[str, nn.Module] = {"tokenizer": tokenizer}

    def losses(self, batch: Tensor, step: int) -> Iterator[TokenizerLoss]:
        """The one loss of this stage: negative log-likelihood a dimension, plus the quantizer's part."""
        pixels = to_model_range(batch)
        relaxed = self.tokenizer.own_config.quantizer == "gumbel"
        heat = temperature(step, self.config) if relaxed else None
        output = self.networks["tokenizer"](pixels, heat)
        nll = self.tokenizer.likelihood.nll(pixels, output.parameters).mean()
        dimensions = pixels[0].numel()
        # gumbel's KL is in nats a picture as the likelihood is; vq's losses are distances, and stand as they are.
        own = kl_weight(step, self.config) * output.loss / dimensions if relaxed else output.loss
        metrics = dict(output.metrics)
        with torch.no_grad():
            metrics["nll"] = nll.detach()
            metrics["psnr"] = peak_signal_to_noise(pixels, self.tokenizer.likelihood.picture(output.parameters)).mean()
        if heat is not None:
            metrics["temperature"] = torch.tensor(heat)
        yield TokenizerLoss("tokenizer", nll / dimensions + own, metrics)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Tensor]) -> dict[str, float]:
        """Held-out figures with hard codes: psnr (dB), nll (nats a picture), bits_per_dimension, codebook use; for gumbel also
        `relaxed_psnr` at the last temperature and the gap to it. No collectives."""
        tokenizer, relaxed = self.tokenizer, self.tokenizer.own_config.quantizer == "gumbel"
        tokenizer.eval()
        psnr, soft_psnr, nll = [], [], []
        counts = torch.zeros(tokenizer.num_codes, dtype=torch.long)
        dimensions = 1
        for batch in batches:
            pixels = to_model_range(batch)
            dimensions = pixels[0].numel()
            output = tokenizer(pixels)
            nll.append(tokenizer.likelihood.nll(pixels, output.parameters).cpu())
            psnr.append(peak_signal_to_noise(pixels, tokenizer.likelihood.picture(output.parameters)).cpu())
            counts += torch.bincount(output.codes.flatten().cpu(), minlength=tokenizer.num_codes)
            if relaxed:
                soft = tokenizer(pixels, self.config.temperature_end).parameters
                soft_psnr.append(peak_signal_to_noise(pixels, tokenizer.likelihood.picture(soft)).cpu())
        tokenizer.train()
        if not psnr:
            raise ValueError("there are no held-out pictures to evaluate on; raise data.held_out or add pictures")
        statistics = codebook_statistics(counts)
        nats = float(torch.cat(nll).mean())
        figures = {
            "psnr": float(torch.cat(psnr).mean()),
            "nll": nats,
            "bits_per_dimension": float(bits_per_dimension(nats, dimensions)),
            "codebook_usage": statistics.usage,
            "codebook_perplexity": statistics.perplexity,
            "dead_codes": float(statistics.dead),
        }
        if relaxed:
            figures["relaxed_psnr"] = float(torch.cat(soft_psnr).mean())
            figures["relaxed_gap"] = figures["relaxed_psnr"] - figures["psnr"]
        return figures
