"""What stage 1 minimises. Knows likelihoods and schedules; no optimizer, no data set.

The evidence lower bound (Kingma & Welling 2013): log p(x) >= E_q[log p(x given codes)] - KL(q(codes given x) || p(codes)), here with
the uniform prior; its negative, in nats a picture, is divided by the number of dimensions so that losses compare across sizes. Where
the posterior is one code (`vq` and others) the KL is the constant h w log K (van den Oord 2017, section 3.1) and the quantizer's own
losses take its place.
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
from stage1_tokenizer.quantizers import codebook_statistics, count_codes, counts_by_level


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
        tokenizer, dimensions = self.tokenizer, pixels[0].numel()
        heat = temperature(step, self.config) if tokenizer.quantizer.relaxed else None
        output = self.networks["tokenizer"](pixels, heat)
        quantized = output.quantized
        nll = tokenizer.likelihood.nll(pixels, output.parameters)
        # Divergences are in nats a picture as the likelihood is; distances and entropies of the quantizer stand as they are.
        value = nll.mean() / dimensions + quantized.loss
        if quantized.kl is not None:
            value = value + kl_weight(step, self.config) * quantized.kl / dimensions
        if quantized.log_q is not None:
            value = value + tokenizer.quantizer.surrogate(nll, quantized.log_q) / dimensions
        metrics = dict(quantized.metrics)
        with torch.no_grad():
            metrics["nll"] = nll.detach().mean()
            metrics["psnr"] = peak_signal_to_noise(pixels, tokenizer.likelihood.picture(output.parameters)).mean()
        if heat is not None:
            metrics["temperature"] = torch.tensor(heat)
        yield TokenizerLoss("tokenizer", value, metrics)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Tensor]) -> dict[str, float]:
        """Held-out figures with hard codes: psnr (dB), nll (nats a picture), bits_per_dimension, codebook use (over all levels and, where
        there are several, of each); for relaxed quantizers also `relaxed_psnr` at the last temperature and the gap. No collectives."""
        tokenizer = self.tokenizer
        tokenizer.eval()
        psnr, soft_psnr, nll = [], [], []
        layout = tokenizer.layout
        counts = torch.zeros(sum(level.num_codes for level in layout), dtype=torch.long)
        dimensions = 1
        for batch in batches:
            pixels = to_model_range(batch)
            dimensions = pixels[0].numel()
            output = tokenizer(pixels)
            nll.append(tokenizer.likelihood.nll(pixels, output.parameters).cpu())
            psnr.append(peak_signal_to_noise(pixels, tokenizer.likelihood.picture(output.parameters)).cpu())
            counts += count_codes(output.quantized.codes.cpu(), layout)
            if tokenizer.quantizer.relaxed:
                soft = tokenizer(pixels, self.config.temperature_end).parameters
                soft_psnr.append(peak_signal_to_noise(pixels, tokenizer.likelihood.picture(soft)).cpu())
        tokenizer.train()
        if not psnr:
            raise ValueError("there are no held-out pictures to evaluate on; raise data.held_out or add pictures")
        nats = float(torch.cat(nll).mean())
        figures = {
            "psnr": float(torch.cat(psnr).mean()),
            "nll": nats,
            "bits_per_dimension": float(bits_per_dimension(nats, dimensions)),
        }
        for name, part in counts_by_level(counts, layout).items():
            statistics = codebook_statistics(part)
            figures |= {
                f"codebook_usage{name}": statistics.usage,
                f"codebook_perplexity{name}": statistics.perplexity,
                f"dead_codes{name}": float(statistics.dead),
            }
        if soft_psnr:
            figures["relaxed_psnr"] = float(torch.cat(soft_psnr).mean())
            figures["relaxed_gap"] = figures["relaxed_psnr"] - figures["psnr"]
        return figures
