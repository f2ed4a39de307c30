"""What `best_of` chooses by: the prior's own likelihoods, what the images have in common, or a
scorer that sees images and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.runtime.threads import free_threads
from stage1_tokenizer.file_checks import UnsafeFile
from stage1_tokenizer.perceptual import checked_folder
from stage1_tokenizer.pixels import to_rgb
from stage2_prior import PriorModule, Samples, code_log_likelihood

PMI_WEIGHT = 0.6
"""Weight of the rank by PMI against the rank by log-likelihood in `choice_scores`."""
_BATCH = 32


def choice_scores(log_likelihood: Tensor, null_log_likelihood: Tensor) -> Tensor:
    """Scores (B,N) of N images for each of B prompts; the image with the highest is chosen. Given
    log p(codes | caption) and log p(codes) (B,N), in nats.

    An image scores by two ranks among the N: that of log p(codes | caption), and, with less weight,
    that of the pointwise mutual information log p(codes | caption) - log p(codes). The likelihood
    alone prefers images like those of the training to a new combination. The mutual information
    alone prefers images that are unlikely with any caption, such as smears. Ranks need no common
    scale, which differs by guidance and by the number of codes. docs/sampling.md has accuracies.
    """
    pmi = log_likelihood - null_log_likelihood
    return _rank(log_likelihood) + PMI_WEIGHT * _rank(pmi)


def best_rows(prior: PriorModule, drawn: Samples, best_of: int, *, batch_size: int = 64) -> Tensor:
    """Which of B*N samples the prior chooses (B,): one of each N = `best_of` that follow one
    another."""
    given = drawn.log_likelihood.cpu().view(-1, best_of)
    null = _null_log_likelihood(prior, drawn, batch_size).view(-1, best_of)
    return highest(choice_scores(given, null))


def consensus_scores(images: Sequence[Image.Image], best_of: int) -> Tensor:
    """Scores (B,N) of B*N images, N = `best_of` of which follow one another; the image with the
    highest is chosen. A score is minus the mean squared distance of pixels, with transparency on
    white, to the mean of the N images.

    So the image nearest to all others is chosen: what the samples agree on. This is minimum Bayes
    risk decoding (Kumar & Byrne 2004) with the squared error as loss. A smear that was sampled once
    is dropped, whatever its likelihood.
    """
    pixels = torch.from_numpy(np.stack([np.asarray(to_rgb(image)) for image in images]))
    groups = pixels.view(-1, best_of, pixels[0].numel()).float()
    return -((groups - groups.mean(1, keepdim=True)) ** 2).mean(2)


def highest(scores: Tensor) -> Tensor:
    """Scores (B,N) -> (B,) the place of the highest of each row among all B*N."""
    return scores.argmax(1) + torch.arange(0, scores.numel(), scores.shape[1])


@free_threads()
def _null_log_likelihood(prior: PriorModule, drawn: Samples, batch_size: int) -> Tensor:
    """log p(codes) (B,) in nats, in the order drawn. Sampling gives it where every code was guided;
    else it is computed."""
    if drawn.null_log_likelihood is not None:
        return drawn.null_log_likelihood.cpu()
    null = prior.stream.null_caption(len(drawn.codes))
    totals = [
        code_log_likelihood(prior, *part).sum(1)
        for part in zip(
            null.split(batch_size),
            drawn.codes.split(batch_size),
            drawn.orders.split(batch_size),
            strict=True,
        )
    ]
    return torch.cat(totals).cpu()


def _rank(values: Tensor) -> Tensor:
    """How many of the values in its row (B,N) each is above, less how many it is below. Values that
    differ by rounding are equal."""
    difference = values[:, :, None] - values[:, None, :]
    return ((difference > 1e-4).sum(2) - (difference < -1e-4).sum(2)).float()


class ImageTextScorer(Protocol):
    """Scores how well images show their prompts; more is better."""

    def __call__(
        self, images: Sequence[Image.Image], prompts: Sequence[str]
    ) -> Sequence[float] | Tensor: ...


JudgeName = Literal["likelihood", "consensus"]
Judge = ImageTextScorer | JudgeName
"""What chooses among images: `choice_scores`, `consensus_scores`, or a scorer."""


class CLIPScorer:
    """Cosine similarity of image and prompt in a CLIP model's space (Radford et al. 2021).

    Args:
        name: a folder, or a name of the Hub, of a transformers CLIP model with its processor.

    Raises:
        ValueError: there is no such model, or it does not compare images with text.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        from transformers import AutoModel, AutoTokenizer
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        try:
            folder = checked_folder(name)
            # Without a word on it, transformers asks on the terminal whether to run such code.
            model = AutoModel.from_pretrained(folder, trust_remote_code=False)
            if not hasattr(model, "get_image_features"):
                raise ValueError(
                    f"it is a {type(model).__name__}, which compares no images with text"
                )
            self.model = model.eval()
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            # The plain backend: the other needs torchvision.
            self.processor = AutoImageProcessor.from_pretrained(
                folder, backend="pil", trust_remote_code=False
            )
            # What else is wrong shows now; two lengths, since the shorter one is padded.
            self([Image.new("RGB", (32, 32))] * 2, ["a", "a \u2603Z"])
        except UnsafeFile:
            raise
        except Exception as error:  # transformers raises all kinds for damaged files
            first = " ".join(str(error).split())[:200]
            raise ValueError(
                f"the scorer {name!r} cannot be loaded as a CLIP model ({first}); give a folder "
                "that holds one with its processor, or a Hub name with network access"
            ) from error
        self.model.to(device)

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """A score in [-1,1] for each image, transparency on white, with its prompt: (N,)."""
        scores = []
        for first in range(0, len(images), _BATCH):
            part = slice(first, first + _BATCH)
            text = self.tokenizer(
                list(prompts[part]), padding=True, truncation=True, return_tensors="pt"
            )
            shown = [to_rgb(image) for image in images[part]]
            pixels = self.processor(images=shown, return_tensors="pt")
            out = self.model(**text.to(self.model.device), **pixels.to(self.model.device))
            scores.append(torch.cosine_similarity(out.image_embeds, out.text_embeds))
        return torch.cat(scores).cpu()
