"""Stage 2: caption and codes as one stream, or priors over Gaussian latents. Sees numbers only;
knows nothing of images, data sets or training loops.

`ImagePrior` and `LatentPriorModel` are imported when they are first used, and transformers with
them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stage2_prior.compilation import CompiledSteps, StepShape
from stage2_prior.config import Level, PriorConfig, PriorObjectiveConfig, StreamConfig
from stage2_prior.decoding import joined_samples, sample
from stage2_prior.engine import Engine, Finished, SampleRequest, Samples
from stage2_prior.flows import (
    AggregatedPosterior,
    Flow,
    GaussianMixture,
    LatentPrior,
    LatentPriorConfig,
    LatentPriorModule,
    LatentPriorObjective,
    StandardNormal,
    VampPrior,
    build_latent_prior,
)
from stage2_prior.model import PriorLogits, PriorModule
from stage2_prior.objective import PriorLoss, PriorObjective
from stage2_prior.order import CodeOrder, OrderSchedule
from stage2_prior.sampling import SamplingOptions
from stage2_prior.schedule import SamplingSchedule, sampling_schedule
from stage2_prior.scoring import (
    caption_log_likelihood,
    code_log_likelihood,
    sample_captions,
    score_codes,
    score_each_code,
)
from stage2_prior.sequence import Stream
from stage2_prior.step import Filters
from stage2_prior.text import TextConfig, TextTokenizer

if TYPE_CHECKING:
    from stage2_prior.pretrained import ImagePrior, LatentPriorModel

__all__ = [
    "AggregatedPosterior",
    "CodeOrder",
    "CompiledSteps",
    "Engine",
    "Filters",
    "Finished",
    "Flow",
    "GaussianMixture",
    "ImagePrior",
    "LatentPrior",
    "LatentPriorConfig",
    "LatentPriorModel",
    "LatentPriorModule",
    "LatentPriorObjective",
    "Level",
    "OrderSchedule",
    "PriorConfig",
    "PriorLogits",
    "PriorLoss",
    "PriorModule",
    "PriorObjective",
    "PriorObjectiveConfig",
    "SampleRequest",
    "Samples",
    "SamplingOptions",
    "SamplingSchedule",
    "StandardNormal",
    "StepShape",
    "Stream",
    "StreamConfig",
    "TextConfig",
    "TextTokenizer",
    "VampPrior",
    "build_latent_prior",
    "caption_log_likelihood",
    "code_log_likelihood",
    "joined_samples",
    "sample",
    "sample_captions",
    "sampling_schedule",
    "score_codes",
    "score_each_code",
]


def __getattr__(name: str) -> Any:
    if name not in ("ImagePrior", "LatentPriorModel"):
        raise AttributeError(f"module 'stage2_prior' has no attribute {name!r}")
    from stage2_prior import pretrained

    return getattr(pretrained, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
