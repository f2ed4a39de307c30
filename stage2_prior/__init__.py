"""Stage 2: caption and codes as one stream, or priors over Gaussian latents. Sees numbers only;
knows nothing of images, data sets or training loops."""

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
    LatentPriorModel,
    LatentPriorObjective,
    StandardNormal,
    VampPrior,
    build_latent_prior,
)
from stage2_prior.model import ImagePrior, PriorLogits
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
    "LatentPriorObjective",
    "Level",
    "OrderSchedule",
    "PriorConfig",
    "PriorLogits",
    "PriorLoss",
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
