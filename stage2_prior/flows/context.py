"""Captions as the context of a prior over latents. Knows text ids; nothing of words, and nothing of
what the context is for.

Legend: B batch, T text slots, C features of a context.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CaptionContext(nn.Module):
    """The mean of the embeddings of a caption's ids, through an MLP of one hidden layer.

    The mean and the result are normalized, for otherwise captions differ by a few hundredths at
    first, and a flow learns to ignore them. The order of the words is not seen. An empty caption
    has its start and end ids alone, so it is one more context: that of the unconditional case.

    Args:
        vocab_size: entries of the text vocabulary.
        pad_id: text id of unused slots, which are left out of the mean.
        context_features: C.
    """

    def __init__(self, vocab_size: int, pad_id: int, context_features: int) -> None:
        super().__init__()
        self.pad_id = pad_id
        self.embedding = nn.Embedding(vocab_size, context_features)
        self.hidden = nn.Linear(context_features, 2 * context_features)
        self.output = nn.Linear(2 * context_features, context_features)

    def forward(self, text_ids: Tensor) -> Tensor:
        """Text ids (B,T) -> context (B,C), in the weights' dtype also under autocast."""
        with torch.autocast(text_ids.device.type, enabled=False):
            used = (text_ids != self.pad_id)[..., None]
            total = (self.embedding(text_ids) * used).sum(1)
            mean = total / used.sum(1).clamp(min=1)
            hidden = F.silu(self.hidden(F.layer_norm(mean, mean.shape[-1:])))
            return F.layer_norm(self.output(hidden), (self.output.out_features,))
