"""Metrics of a tokenizer of Gaussian latents and its prior on validation images. Knows models and
arrays; writes nothing."""

from __future__ import annotations

import numpy as np
import torch

from pipeline.data.source import Source
from pipeline.evaluation.metrics import BATCH, mean_psnr
from pipeline.inference.latent_pipeline import LatentPipeline
from stage1_tokenizer import to_model_range, to_uint8
from stage1_tokenizer.metrics import ssim


@torch.no_grad()
def latent_metrics(pipe: LatentPipeline, source: Source, count: int) -> dict[str, float]:
    """Metrics on the first `count` images of a source and their first captions.

    `psnr` and `ssim` are those of the posterior's mean. In nats per image, through one seeded
    sample z of each posterior: `nll` = -log p(x|z), `prior_nll` = -log p(z|caption), `kl` =
    log q(z|x) - log p(z|caption) and `elbo` = -(`nll` + `kl`). `nll` is the training loss where the
    likelihood gives the images no exact probability.
    """
    tokenizer = pipe.tokenizer
    likelihood = tokenizer.likelihood
    noise = torch.Generator().manual_seed(0)
    real = []
    drawn = []
    nats: dict[str, list[torch.Tensor]] = {"nll": [], "kl": [], "prior_nll": []}
    for first in range(0, count, BATCH):
        rows = range(first, min(first + BATCH, count))
        images = torch.from_numpy(source.images(rows)).to(tokenizer.device)
        pixels = to_model_range(images)
        posterior = tokenizer.posterior(pixels)
        z = posterior.sample(noise)
        context = None
        if pipe.prior.context_features:
            context = pipe.prior.encode_text(pipe.text.encode(source.captions(rows), truncate=True))
        prior_nll = -pipe.prior.log_prob(z, context)
        parameters = tokenizer.latent_parameters(z)
        values = images.permute(0, 3, 1, 2)
        covered = likelihood.covers(values)
        nll = (
            likelihood.exact_nll(values, parameters)
            if covered
            else likelihood.nll(pixels, parameters)
        )
        nats["nll"].append(nll)
        nats["kl"].append(posterior.log_prob(z) + prior_nll)
        nats["prior_nll"].append(prior_nll)
        real.append(images.cpu().numpy())
        drawn.append(to_uint8(tokenizer.decode_latents(posterior.mean)).cpu().numpy())
    truth = np.concatenate(real)
    reconstruction = np.concatenate(drawn)
    means = {name: float(torch.cat(values).mean()) for name, values in nats.items()}
    return {
        "psnr": mean_psnr(truth, reconstruction),
        "ssim": ssim(truth, reconstruction),
        **means,
        "elbo": -(means["nll"] + means["kl"]),
    }
