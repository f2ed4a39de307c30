"""What `best_of` chooses by: the prior's own likelihoods, or a scorer that sees images and
prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

NULL_WEIGHT = 0.1
"""Weight of the likelihood without a caption in `choice_scores`."""
_BATCH = 32


def choice_scores(log_likelihood: Tensor, null_log_likelihood: Tensor) -> Tensor:
    """log p(codes | caption) - w log p(codes), of each image (B,); the highest is chosen.

    The first term alone prefers images like those of the training, which a new combination in a
    caption is not; the second one takes a little of this preference away. With w = 1 the score is
    the pointwise mutual information, which prefers images that are unlikely with any caption, such
    as smears. docs/sampling.md has the accuracies by w.
    """
    return log_likelihood - NULL_WEIGHT * null_log_likelihood


class ImageTextScorer(Protocol):
    """Scores how well images show their prompts; more is better."""

    def __call__(
        self, images: Sequence[Image.Image], prompts: Sequence[str]
    ) -> Sequence[float] | Tensor: ...


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
            model = AutoModel.from_pretrained(name)
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            # The plain backend: the other needs torchvision.
            self.processor = AutoImageProcessor.from_pretrained(name, backend="pil")
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"the scorer {name!r} cannot be loaded as a CLIP model "
                f"({str(error).splitlines()[0]}); give a folder that holds one with "
                "its processor, or a Hub name with network access"
            ) from error
        if not hasattr(model, "get_image_features"):
            raise ValueError(
                f"the scorer {name!r} is {type(model).__name__}, which does not compare images "
                "with text; give a CLIP model"
            )
        self.model = model.to(device).eval()

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """A score in [-1,1] for each image with its prompt: (N,)."""
        scores = []
        for first in range(0, len(images), _BATCH):
            part = slice(first, first + _BATCH)
            text = self.tokenizer(
                list(prompts[part]), padding=True, truncation=True, return_tensors="pt"
            )
            pixels = self.processor(images=list(images[part]), return_tensors="pt")
            out = self.model(**text.to(self.model.device), **pixels.to(self.model.device))
            scores.append(torch.cosine_similarity(out.image_embeds, out.text_embeds))
        return torch.cat(scores).cpu()
