"""What stage 1 minimises. Knows likelihoods and schedules; no optimizer, no data set.

The evidence lower bound (Kingma & Welling 2013): log p(x) >= E_q[log p(x given codes)] - KL(q(codes
given x) || p(codes)), here with the uniform prior; its negative, in nats per image, is divided by
the number of dimensions so that losses compare across sizes. A quantizer's `diversity`, a
perceptual distance and a discriminator are no parts of the bound and come on top of it. Where the
posterior is one code (`vq` and others) the KL is the constant h w log K (van den Oord 2017, section
3.1) and the quantizer's own losses take its place.

Gaussian latents have the prior N(0, I) and an analytic KL, times beta = `kl_weight` (beta-VAE,
Higgins et al. 2017). With a learned prior the KL is log q(z given image) - log p(z) at the sampled
latents (Tomczak & Welling 2018, https://arxiv.org/abs/1705.07120).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from stage1_tokenizer.codebook_health import check
from stage1_tokenizer.codebook_redundancy import agreement_by_level, distinct_codes, unchanged_codes
from stage1_tokenizer.config import ObjectiveConfig, TokenizerConfig, joint_problems
from stage1_tokenizer.discriminator import (
    Discriminator,
    adaptive_weight,
    generator_loss,
    hinge_loss,
    lecam,
    loss_at_image,
    requires_grad_off,
)
from stage1_tokenizer.latent_prior import PriorLogProb
from stage1_tokenizer.likelihoods import Likelihood, bits_per_dimension
from stage1_tokenizer.metrics import peak_signal_to_noise
from stage1_tokenizer.model import TokenizerModule
from stage1_tokenizer.perceptual import build_distance
from stage1_tokenizer.pixels import dequantized, to_model_range, to_uint8
from stage1_tokenizer.posterior import GaussianLatents
from stage1_tokenizer.quantizers import count_codes, statistics_by_level
from stage1_tokenizer.quantizers.gaussian import active_dimensions

_NO_IMAGES = "there are no held-out images to evaluate on; raise data.val_fraction or add images"


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


@dataclass(frozen=True)
class _Weighted:
    """A term of a loss."""

    value: Tensor
    weight: Tensor | float


class TokenizerObjective:
    """Batches are uint8 images (B,H,W,C). A discriminator and a learned prior are each a further
    network with a loss of its own per step.

    Args:
        latent_prior: a module with `log_prob`: latents (B,n) -> (B,) in nats, in place of N(0, I).
            Its parameters are trained, too: each step maximises its log-probability of the sampled
            latents, whatever the weight of the KL is.

    Raises:
        ValueError: settings contradict each other, or the tokenizer takes no such prior.
    """

    def __init__(
        self,
        tokenizer: TokenizerModule,
        config: ObjectiveConfig,
        *,
        latent_prior: nn.Module | None = None,
    ) -> None:
        problems = joint_problems(asdict(tokenizer.own_config), asdict(config))
        if latent_prior is not None:
            problems += _latent_prior_problems(tokenizer.own_config)
        if problems:
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
        self.latent_prior = PriorLogProb(latent_prior) if latent_prior is not None else None
        if self.latent_prior is not None:
            if self.latent_prior.learns:
                self.networks["latent_prior"] = self.latent_prior
            else:
                self.latent_prior.eval()

    @property
    def best_metric(self) -> str:
        """Name of the metric of `evaluate` that chooses among weights; smaller is better. While the
        KL warms up, the likelihood alone would prefer latents without noise."""
        return "nll" if self.tokenizer.own_config.has_codes else "loss"

    def compile(self) -> None:
        """Compiles the networks in place; parameter names stay as they are."""
        self.tokenizer.compile_networks()
        if self.discriminator is not None:
            self.discriminator.compile_networks()

    def losses(
        self, batch: Tensor, step: int, networks: Mapping[str, nn.Module] | None = None
    ) -> Iterator[TokenizerLoss]:
        """The tokenizer's loss, then the discriminator's and the learned prior's. The first is the
        negative log-likelihood per dimension, plus what the quantizer, a perceptual distance and a
        discriminator add.
        `networks` are called in place of the objective's own, such as the same ones wrapped by
        DDP."""
        networks = networks or self.networks
        pixels = to_model_range(batch)
        tokenizer = self.tokenizer
        dimensions = pixels[0].numel()
        current_temperature = (
            temperature(step, self.config) if tokenizer.quantizer.relaxed else None
        )
        output = networks["tokenizer"](
            pixels, current_temperature, reencode=self.config.reencoding_weight > 0
        )
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
        kl = quantized.kl
        if self.latent_prior is not None and quantized.gaussian is not None:
            kl = self._divergence(quantized.gaussian).mean()
            metrics["kl"] = kl.detach()
        if kl is not None:
            value = value + kl_weight(step, self.config) * kl / dimensions
        if quantized.log_q is not None:
            value = value + tokenizer.quantizer.surrogate(nll_map, quantized.log_q) / dimensions
        if output.reencoding is not None:
            value = value + self.config.reencoding_weight * output.reencoding
            metrics["reencoding_nll"] = output.reencoding.detach()
        if current_temperature is not None and quantized.gaussian is None:
            metrics["temperature"] = torch.tensor(current_temperature)
        judged = self.discriminator is not None and step >= self.config.discriminator.start
        if judged:
            adversarial = self._adversarial_loss(reconstruction, drawn, output.parameters)
            metrics["adversarial"] = adversarial.value.detach()
            value = value + adversarial.weight * adversarial.value
        yield TokenizerLoss("tokenizer", value, metrics)
        if judged:
            yield self._discriminator_loss(networks["discriminator"], pixels, drawn.detach())
        if "latent_prior" in networks and quantized.gaussian is not None:
            yield _prior_loss(networks["latent_prior"], quantized.gaussian.z.detach())

    def check_health(self, metrics: Mapping[str, float], step: int) -> str | None:
        """A warning about codes or latents that go to waste, by the scalars of a training step,
        with what to do; or None."""
        return check(self.tokenizer.own_config, metrics, step)

    def _divergence(self, latents: GaussianLatents) -> Tensor:
        """The KL of each image's latents (B,) from the prior; with a learned one, its estimate at
        the sampled latents."""
        posterior = latents.posterior
        if self.latent_prior is None:
            return posterior.kl_to_standard()
        # A frozen prior is no network that is trained, so nobody else moves it to the device.
        self.latent_prior.to(latents.z.device)
        # Not the wrapped module: its gradients belong to its own loss.
        with requires_grad_off(self.latent_prior) as prior:
            return posterior.log_prob(latents.z) - prior(latents.z)

    def _adversarial_loss(
        self, reconstruction: Tensor, drawn: Tensor, parameters: Tensor
    ) -> _Weighted:
        """The decoder's loss against the discriminator, of drawn pixels (B,C,H,W) and the
        decoder's output (B,P,H,W)."""
        assert self.discriminator is not None
        options = self.config.discriminator
        # Not the wrapped module: its gradients belong to the other loss.
        with requires_grad_off(self.discriminator) as judge:
            value = loss_at_image(generator_loss(judge(drawn).float()), drawn)
        scale = adaptive_weight(reconstruction, value, parameters) if options.adaptive else 1.0
        return _Weighted(value, options.weight * scale)

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
        """Held-out metrics with hard codes: psnr (dB), nll (nats per image) and
        distortion_bits_per_dimension of the exact probability of 8-bit images given their codes,
        codebook use, distinct codes and reencode_agreement (over all levels and, where there are
        several, of each); for relaxed quantizers also `relaxed_psnr` at the last temperature and
        the gap. No collectives.

        Where images have no probability (`bernoulli`, unless all are black and white), nll is the
        training loss, and there are no bits. Of Gaussian latents: see
        `_evaluate_latents`."""
        tokenizer = self.tokenizer
        if not tokenizer.own_config.has_codes:
            return self._evaluate_latents(batches)
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
            nats, covered = _nll(tokenizer.likelihood, batch, output.parameters)
            nll.append(nats.cpu())
            exact &= covered
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
            raise ValueError(_NO_IMAGES)
        mean_nll = float(torch.cat(nll).mean())
        metrics = {"psnr": float(torch.cat(psnr).mean()), "nll": mean_nll}
        if exact:
            metrics["distortion_bits_per_dimension"] = bits_per_dimension(mean_nll, dimensions)
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

    def _evaluate_latents(self, batches: Iterable[Tensor]) -> dict[str, float]:
        """Held-out metrics of Gaussian latents.

        `psnr` is that of the posterior's mean, as `reconstruct` shows it. `nll`, `kl` and `elbo` =
        -(nll + kl) are in nats per image, through one sample of each image's posterior, seeded.
        `nll` and `bits_per_dimension`, that of the ELBO, are of the exact probability of 8-bit
        images, where they have one (see `evaluate`). The parts of the latter are
        `distortion_bits_per_dimension` of `nll` and `rate_bits_per_dimension` of `kl`. `loss` is
        `nll` + `kl_weight` * `kl` in nats per dimension.
        """
        tokenizer = self.tokenizer
        networks = [tokenizer, *([self.latent_prior] if self.latent_prior is not None else [])]
        for network in networks:
            network.eval()
        psnr = []
        nll = []
        kl = []
        means = []
        dimensions = 1
        exact = True
        noise = torch.Generator().manual_seed(0)
        for batch in batches:
            pixels = to_model_range(batch)
            dimensions = pixels[0].numel()
            posterior = tokenizer.posterior(pixels)
            latents = GaussianLatents(posterior, posterior.sample(noise))
            parameters = tokenizer.latent_parameters(latents.z)
            nats, covered = _nll(tokenizer.likelihood, batch, parameters)
            nll.append(nats.cpu())
            exact &= covered
            kl.append(self._divergence(latents).cpu())
            drawn = tokenizer.decode_latents(posterior.mean)
            psnr.append(peak_signal_to_noise(pixels, drawn).cpu())
            means.append(posterior.mean.cpu())
        for network in self.networks.values():
            network.train()
        if not psnr:
            raise ValueError(_NO_IMAGES)
        distortion = float(torch.cat(nll).mean())
        rate = float(torch.cat(kl).mean())
        metrics = {
            "psnr": float(torch.cat(psnr).mean()),
            "nll": distortion,
            "kl": rate,
            "elbo": -(distortion + rate),
            "loss": (distortion + self.config.kl_weight * rate) / dimensions,
        }
        if exact:
            metrics["distortion_bits_per_dimension"] = bits_per_dimension(distortion, dimensions)
            metrics["rate_bits_per_dimension"] = bits_per_dimension(rate, dimensions)
            metrics["bits_per_dimension"] = bits_per_dimension(distortion + rate, dimensions)
        if len(torch.cat(means)) > 1:
            metrics["active_dimensions"] = float(active_dimensions(torch.cat(means)))
        return metrics


def _nll(likelihood: Likelihood, batch: Tensor, parameters: Tensor) -> tuple[Tensor, bool]:
    """Negative log probability (B,) of images uint8 (B,H,W,C) in nats, and whether all have one;
    otherwise their training loss."""
    values = batch.permute(0, 3, 1, 2)
    if likelihood.covers(values):
        return likelihood.exact_nll(values, parameters), True
    return likelihood.nll(to_model_range(batch), parameters), False


def _prior_loss(prior: nn.Module, z: Tensor) -> TokenizerLoss:
    """The learned prior's loss of latents (B,n): -log p(z) in nats per latent dimension."""
    nats = -prior(z).mean()
    return TokenizerLoss("latent_prior", nats / z.shape[1], {"prior_nll": nats.detach()})


def _latent_prior_problems(model: TokenizerConfig) -> list[str]:
    """Why a tokenizer takes no learned prior."""
    if model.has_codes:
        return [
            f"tokenizer.model.quantizer is {model.quantizer} and a latent prior is given; it is a "
            "prior of Gaussian latents, set the quantizer to gaussian"
        ]
    if model.gaussian.free_bits:
        return [
            f"tokenizer.model.gaussian.free_bits is {model.gaussian.free_bits:g} and a latent "
            "prior is given; free bits need the analytic KL to N(0, I), set them to 0"
        ]
    return []
