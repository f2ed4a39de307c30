"""log p(x | caption) of 8-bit images: bounds by the posterior, and plain Monte Carlo from the
prior. Knows a model of images; nothing of files or prompts.

Legend: B images, K samples of each, H W pixels, C channels. z is the codes or the latents.

    elbo                 E_q[log p(x|z) + log p(z) - log q(z|x)] by a sample (Kingma & Welling 2013,
                         https://arxiv.org/abs/1312.6114, eq. 2)
    importance_weighted  log 1/K sum_k p(x|z_k) p(z_k) / q(z_k|x) (Burda et al. 2015,
                         https://arxiv.org/abs/1509.00519, eq. 8), which rises to log p(x) with K
    description_length   log p(x|z) + log p(z), the ELBO of a posterior that is one code grid
    naive                log 1/K sum_k p(x|z_k), z_k from the prior. Its mean is below log p(x), by
                         far where few z explain an image
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from pipeline.likelihood.model import ImageModel
from pipeline.runtime.threads import free_threads
from stage1_tokenizer import to_model_range

Method = Literal["bound", "naive"]
Bound = Literal["elbo", "importance_weighted", "description_length", "naive"]


@dataclass(frozen=True)
class ImageLikelihood:
    """Bounds of -log p(x | caption). Tensors are float64 on the CPU."""

    nats: Tensor
    """(B,) a bound of -log p(x | caption) in nats per image: -log p(x | caption) is at most its
    mean over the samples' seeds."""
    distortion: Tensor | None
    """(B,) -log p(x|z) in nats per image, the mean over the samples of the posterior; None for
    `naive`."""
    rate: Tensor | None
    """(B,) log q(z|x) - log p(z | caption) in nats per image, the mean over the same samples. One
    code grid has log q = 0. With one sample, distortion and rate sum to `nats`; with more, to the
    negative ELBO, which is no less."""
    bound: Bound
    num_samples: int
    """K."""
    dimensions: int
    """Height x width x channels of an image."""

    @property
    def bits_per_dimension(self) -> Tensor:
        """(B,) `nats` in bits, divided by the dimensions."""
        return self.nats / (self.dimensions * math.log(2))


@free_threads()
@torch.inference_mode()
def image_likelihood(
    model: ImageModel,
    text_ids: Tensor,
    images: Tensor,
    *,
    num_samples: int = 1,
    method: Method = "bound",
    seed: int = 0,
    batch_size: int = 64,
) -> ImageLikelihood:
    """How likely each image is given its caption. It depends on the seed, the image and the
    caption, not on the other images.

    Args:
        text_ids: (B,T) captions.
        images: uint8 (B,H,W,C) of the model's size.
        num_samples: K. A posterior that is one code grid has one sample, whatever K is.
        method: `bound` is the description length of a posterior that is one code grid, else the
            ELBO of one sample or the importance-weighted bound of several. `naive` samples from the
            prior.
        batch_size: samples at a time.

    Raises:
        ValueError: the decoder gives an image no probability, a number is below 1, the method is
            unknown, or the images have another size than the model's.
    """
    check_probability(model, images)
    for name, value in (("num_samples", num_samples), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if method not in get_args(Method):
        raise ValueError(f"method is {method!r}; choose bound or naive")
    if method == "bound" and model.is_deterministic:
        num_samples = 1
    seeds = sample_seeds(images, num_samples, seed)
    image_of_sample = torch.arange(len(images)).repeat_interleave(num_samples)
    distortions = []
    rates = []
    for samples in torch.arange(len(seeds)).split(batch_size):
        rows = image_of_sample[samples]
        distortion, rate = _nats_of_samples(
            model, text_ids[rows], images[rows], [seeds[i] for i in samples], method
        )
        distortions.append(distortion.double().cpu())
        rates.append(rate.double().cpu())
    distortion = torch.cat(distortions).view(-1, num_samples)
    rate = torch.cat(rates).view(-1, num_samples)
    is_naive = method == "naive"
    return ImageLikelihood(
        nats=math.log(num_samples) - torch.logsumexp(-(distortion + rate), dim=1),
        distortion=None if is_naive else distortion.mean(1),
        rate=None if is_naive else rate.mean(1),
        bound=_bound(model, num_samples, method),
        num_samples=num_samples,
        dimensions=images[0].numel(),
    )


def _nats_of_samples(
    model: ImageModel, text_ids: Tensor, images: Tensor, seeds: list[int], method: Method
) -> tuple[Tensor, Tensor]:
    """-log p(x|z) and log q(z|x) - log p(z) (B,) of one sample per row of text ids (B,T) and images
    (B,H,W,C). Where z comes from the prior, q is the prior, and the second is 0."""
    images = images.to(model.tokenizer.device)
    text_ids = text_ids.to(images.device)
    if method == "naive":
        z = model.sample_prior(text_ids, seeds)
        rate = torch.zeros(len(images), dtype=torch.float64)
    else:
        sampled = model.sample_posterior(to_model_range(images), seeds)
        z = sampled.z
        rate = sampled.log_q.double() - model.log_prior(text_ids, z).double()
    values = images.permute(0, 3, 1, 2)
    return model.tokenizer.likelihood.exact_nll(values, model.parameters(z)), rate


def _bound(model: ImageModel, num_samples: int, method: Method) -> Bound:
    if method == "naive":
        return "naive"
    if model.is_deterministic:
        return "description_length"
    return "elbo" if num_samples == 1 else "importance_weighted"


def check_probability(model: ImageModel, images: Tensor) -> None:
    """Raises ValueError where the decoder gives one of the images (B,H,W,C) no probability, or
    where they have another form than the model's."""
    expected = (*model.tokenizer.size, model.tokenizer.own_config.channels)
    if images.dtype != torch.uint8 or tuple(images.shape[1:]) != expected:
        raise ValueError(
            f"images are {images.dtype} {tuple(images.shape)} and must be torch.uint8 (batch, "
            f"{', '.join(map(str, expected))})"
        )
    if not model.tokenizer.likelihood.covers(images):
        raise ValueError(
            f"a decoder of tokenizer.model.likelihood {model.tokenizer.own_config.likelihood} "
            "gives some of the values of these images no probability; train a tokenizer with "
            "tokenizer.model.likelihood: discretized_logistic"
        )


def sample_seeds(images: Tensor, num_samples: int, seed: int) -> list[int]:
    """Seeds of K samples of each image uint8 (B,H,W,C), image after image: B*K. They depend on the
    image's pixels and the seed alone."""
    contents = [hashlib.sha256(image.numpy().tobytes()).digest() for image in images.cpu()]
    return [
        int.from_bytes(hashlib.sha256(f"{seed}/{k}/".encode() + content).digest()[:7], "big")
        for content in contents
        for k in range(num_samples)
    ]
